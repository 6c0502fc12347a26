"""Energy of a stretch of work, where the board reports it: Intel RAPL, a Jetson's INA3221, an NVIDIA GPU; read only.

What they cover differs (a processor package, the whole board, the GPU alone), so each stands under its own name.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

PERIOD_SECONDS = 0.05  # an INA3221 averages over some milliseconds; the power of a decode loop is steady
SMI = ("nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Counter:
    """Joules since some time, back to 0 after `wraps_at`."""

    name: str
    joules: Callable[[], float]
    wraps_at: float


@dataclass(frozen=True, slots=True)
class Power:
    """Watts now."""

    name: str
    watts: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Meters:
    """All meters this machine lets us read; `reason` says why there is none."""

    counters: tuple[Counter, ...] = ()
    powers: tuple[Power, ...] = ()

    @property
    def reason(self) -> str | None:
        """None when something is measured."""
        if self.counters or self.powers:
            return None
        return "no readable meter: neither intel-rapl, nor an INA3221 under hwmon, nor nvidia-smi with power.draw"

    def around(self, work: Callable[[], Answer]) -> tuple[Answer, dict[str, float]]:
        """What `work` gives, and the joules every meter saw meanwhile, by name."""
        before = [counter.joules() for counter in self.counters]
        with _Sampler(self.powers) as sampler:
            answer = work()
        after = [counter.joules() for counter in self.counters]
        out = {
            counter.name: new - old if new >= old else new - old + counter.wraps_at
            for counter, old, new in zip(self.counters, before, after, strict=True)
        }
        return answer, out | sampler.joules


class _Sampler:
    """Reads powers all the time while its block runs; afterwards `joules` by name."""

    def __init__(self, powers: tuple[Power, ...]) -> None:
        self.joules: dict[str, float] = {}
        self._powers, self._done = powers, threading.Event()
        self._samples: list[list[float]] = []

    def __enter__(self) -> _Sampler:
        self._start = time.perf_counter()
        self._thread = threading.Thread(target=self._watch)
        if self._powers:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self._start
        if not self._powers:
            return
        self._done.set()
        self._thread.join()
        for power, values in zip(self._powers, zip(*self._samples, strict=True), strict=False):
            self.joules[power.name] = seconds * sum(values) / len(values)

    def _watch(self) -> None:
        while True:
            with suppress(OSError, ValueError, IndexError, subprocess.SubprocessError):  # busy: other samples stand
                self._samples.append([power.watts() for power in self._powers])
            if self._done.wait(PERIOD_SECONDS):
                return


def find_meters(root: Path = Path("/sys/class")) -> Meters:
    """The meters under `root`, and nvidia-smi; what cannot be read (RAPL is root's on many systems) is left out."""
    return Meters(_rapl(root), (*_ina3221(root), *_nvidia_smi()))


def _rapl(root: Path) -> tuple[Counter, ...]:
    """Packages only: cores and memory controllers lie inside (intel-rapl:0:1)."""
    found = []
    for zone in sorted(root.glob("powercap/intel-rapl:*")):
        if zone.name.count(":") > 1 or (most := _number(zone / "max_energy_range_uj")) is None:
            continue
        if _number(file := zone / "energy_uj") is not None:
            name = f"rapl {_text(zone / 'name') or zone.name}"
            found.append(Counter(name, lambda file=file: _read(file) / 1e6, most / 1e6))
    return tuple(found)


def _ina3221(root: Path) -> tuple[Power, ...]:
    """Channels with a label: millivolts times milliamperes."""
    found = []
    for chip in sorted(root.glob("hwmon/hwmon*")):
        if _text(chip / "name") != "ina3221":
            continue
        for channel in (1, 2, 3):
            label, volts, amperes = (
                chip / f"{part.format(channel)}" for part in ("in{}_label", "in{}_input", "curr{}_input")
            )
            if _text(label) and _number(volts) is not None and _number(amperes) is not None:
                watts = lambda v=volts, a=amperes: _read(v) * _read(a) / 1e6  # noqa: E731 one value a channel
                found.append(Power(f"ina3221 {_text(label)}", watts))
    return tuple(found)


def _nvidia_smi() -> tuple[Power, ...]:
    """GPUs that report their power ("[N/A]" otherwise)."""
    program = shutil.which(SMI[0])
    if program is None:
        return ()

    def rows() -> list[str]:
        done = subprocess.run([program, *SMI[1:]], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.split("\n")

    try:
        values = rows()
    except (OSError, subprocess.SubprocessError):
        return ()
    reporting = [i for i, value in enumerate(values) if value.strip().replace(".", "", 1).isdigit()]
    return tuple(Power(f"nvidia-smi GPU {i}", lambda i=i: float(rows()[i])) for i in reporting)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip() or None
    except (OSError, UnicodeError):
        return None


def _number(path: Path) -> float | None:
    try:
        return _read(path)
    except (OSError, ValueError):
        return None


def _read(path: Path) -> float:
    return float(path.read_text(encoding="ascii"))
