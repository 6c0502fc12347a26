"""Stages told to the user while they run, and timed: one progress bar with remaining time each."""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jpq_export.ranks import rank

logger = logging.getLogger(__name__)
Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What a stage cost; `resumed` when its result was found finished on disk."""

    name: str
    seconds: float
    peak_rss_bytes: int
    resumed: bool = False

    def to_dict(self) -> dict:
        """For the manifest."""
        return asdict(self)


class Stages:
    """Runs stages by name, draws their bars on stderr, remembers their seconds and peak memory."""

    def __init__(self, console: Console | None = None) -> None:
        keep_freed_memory()
        mute = rank() > 0  # under torchrun one process speaks
        self.console = console or Console(stderr=True, quiet=mute, force_interactive=False if mute else None)
        self.records: list[StageRecord] = []

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[Report]:
        """`with stages.stage("plan", "searching") as report: ... report(done, total)`."""
        columns = (
            TextColumn("{task.description:<44}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        reset_peak_memory()
        start, worked = time.perf_counter(), time.process_time()
        # Disabled in a log file: rich would leave an empty line there for each stage.
        quiet = not self.console.is_interactive
        with Progress(*columns, console=self.console, transient=True, disable=quiet) as bars:
            task = bars.add_task(escape(text), total=None)

            def report(done: int, total: int) -> None:
                bars.update(task, completed=done, total=total)

            yield report
        seconds = time.perf_counter() - start
        return_freed_memory()
        self.records.append(StageRecord(name, round(seconds, 3), peak_memory_bytes()))
        told = (seconds, time.process_time() - worked, self.records[-1].peak_rss_bytes / 1e9)
        logger.info("rank %d: %s took %.1f s, %.1f s of CPU, peak %.2f GB", rank(), name, *told)
        self.console.print(f"[green]✓[/green] {escape(text)} [dim]({seconds:.1f} s)[/dim]")

    def told(self, text: str) -> None:
        """What a stage has found, as a line like its own."""
        self.console.print(f"[green]✓[/green] {escape(text)}", soft_wrap=True)

    def note(self, text: str) -> None:
        """One line beside the stages."""
        self.console.print(f"  {escape(text)}", soft_wrap=True)

    def resumed(self, name: str, text: str) -> None:
        """A stage whose result was already there."""
        self.records.append(StageRecord(name, 0.0, 0, resumed=True))
        self.console.print(f"[green]✓[/green] {escape(text)} [dim](found finished, resumed)[/dim]")


MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
LARGEST_KEPT = 2**30  # bytes


def keep_freed_memory() -> None:
    """Let glibc use freed pages of large tensors again instead of mapping, and clearing, fresh ones for each.

    A recovery step of SmolLM2-135M: 15,000 page faults instead of 105,000, 6% less time (two cores of an EPYC, Zen 4).
    """
    mallopt = _of_libc("mallopt")
    # Older glibc refuses the first, and the second alone would take its own, growing threshold away.
    if mallopt is not None and mallopt(MMAP_THRESHOLD, LARGEST_KEPT):
        mallopt(TRIM_THRESHOLD, LARGEST_KEPT)


def return_freed_memory() -> None:
    """Give freed heap pages back (glibc keeps them), so that one stage's peak is not the next one's base."""
    gc.collect()
    if (trim := _of_libc("malloc_trim")) is not None:
        trim(0)


def _of_libc(name: str) -> Any:
    """A function of the C library, None where there is none such."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def reset_peak_memory() -> None:
    """Start a new high-water mark where Linux allows it; elsewhere the mark is the process's."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        logger.debug("peak memory cannot be reset here; stages report the process's peak so far")


def peak_memory_bytes() -> int:
    """High-water mark of resident memory since the last reset, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        logger.debug("/proc/self/status is not readable; using getrusage")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
