"""The recorded vectors on the device: a safetensors reader in numpy, the same passes, errors against their bounds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jpq_export.errors import BundleError
from jpq_export.parity.compare import peak_error, relative_rms, sketch

FORMAT = "jpq-vectors/1"  # see parity/vectors.py for the layout
DTYPES = {"F32": np.float32, "I64": np.int64}
NEEDED = ("ids.prefill", "ids.padded", "mask.padded", "greedy", "margin", "rounding")
LOGITS = ("logits.last", "logits.prefill", "logits.padded", "logits.decode")
PADDED_STEPS = 4  # columns of the padded batch that are fed one by one, as parity/cases.py
HEADER_MOST = 100_000_000  # the format's own limit


class Session(Protocol):
    """What `EngineSession` is; a sequence that grows."""

    def reset(self) -> None:
        """Begin anew."""
        ...

    def forward(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Logits [seq, vocab] of the new tokens."""
        ...

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Logits [vocab] of the last new token."""
        ...


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """One recorded tensor: relative RMS over its positions and the largest error of one value, with their bounds."""

    name: str
    rel_rms: float
    rel_rms_bound: float
    peak: float
    peak_bound: float

    @property
    def passed(self) -> bool:
        """Whether rounding explains both."""
        return self.rel_rms <= self.rel_rms_bound and self.peak <= self.peak_bound


@dataclass(frozen=True, slots=True)
class DeviceParity:
    """What the device computed against what PyTorch computed; `tie`: the first other token was as good as equal."""

    reference: str
    rows: tuple[ErrorRow, ...]
    steps: int
    equal: int
    tie: bool

    @property
    def passed(self) -> bool:
        """Whether all logits are within bounds and greedy decoding goes the same way."""
        return all(row.passed for row in self.rows) and (self.equal == self.steps or self.tie)


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors (float32 and int64) and metadata; BundleError when the file is missing, cut or malformed."""
    try:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        if not 2 <= length <= min(HEADER_MOST, len(content) - 8):
            raise ValueError(f"header of {length} bytes in a file of {len(content)}")
        header = json.loads(content[8 : 8 + length])
        meta = header.pop("__metadata__", {})
        return {name: _tensor(name, entry, content[8 + length :]) for name, entry in header.items()}, meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path}: not a readable safetensors file ({error}); copy the bundle again") from error


def _tensor(name: str, entry: dict[str, Any], data: bytes) -> np.ndarray:
    dtype, shape = np.dtype(DTYPES[entry["dtype"]]).newbyteorder("<"), tuple(int(n) for n in entry["shape"])
    start, end = (int(at) for at in entry["data_offsets"])
    if not 0 <= start <= end <= len(data) or end - start != prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: {shape} at bytes {start} to {end} of {len(data)}")
    return np.frombuffer(data[start:end], dtype).reshape(shape)


def read_vectors(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The recorded tensors and what computed them; BundleError when one is missing."""
    tensors, meta = read_safetensors(path)
    try:
        described = json.loads(meta["jpq"])
        if described["format"] != FORMAT:
            raise ValueError(f"expected {FORMAT}, got {described['format']!r}")
        reference = str(described["reference"])
    except (KeyError, ValueError, TypeError) as error:
        raise BundleError(f"{path}: not recorded vectors ({error!r}); export the bundle again") from error
    if missing := [name for name in (*NEEDED, *LOGITS) if name not in tensors]:
        raise BundleError(f"{path}: {missing[0]} is missing; export the bundle again")
    return tensors, reference


def check_vectors(
    session: Session, path: Path, *, bounds: Mapping[str, float], progress: Callable[[str], None] | None = None
) -> DeviceParity:
    """Run all recorded cases; `bounds`: {"logits": relative RMS, "peak": its multiple for one value}."""
    recorded, reference = read_vectors(path)
    say = progress or (lambda _text: None)
    say("recorded prompt")
    session.reset()
    prefill = session.forward(recorded["ids.prefill"][0])
    computed = {"logits.prefill": prefill, "logits.last": prefill[-1:]}
    say(f"{len(recorded['greedy'])} greedy tokens")
    computed["logits.decode"] = _decode(session, prefill[-1], recorded["greedy"])
    say("padded sequences")
    computed["logits.padded"] = _padded(session, recorded["ids.padded"], recorded["mask.padded"])
    rows = tuple(_row(name, recorded[name], computed[name], bounds) for name in LOGITS)
    return _judge(reference, rows, recorded, computed["logits.decode"].argmax(-1))


def _decode(session: Session, logits: np.ndarray, greedy: np.ndarray) -> np.ndarray:
    """Logits [steps, vocab] of each recorded choice, feeding the recorded tokens."""
    rows = [logits]
    rows += [session.forward(np.array([token], np.int64))[0] for token in greedy[:-1]]
    return np.stack(rows)


def _padded(session: Session, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits of the real positions, ordered as the batch gave them: by step, then by sequence.

    The engine's batch is 1, so each sequence runs alone with its own padding; attention never crosses sequences.
    """
    first = ids.shape[1] - PADDED_STEPS
    parts: list[list[np.ndarray]] = [[] for _ in range(PADDED_STEPS + 1)]
    for row_ids, row_mask in zip(ids, mask, strict=True):
        session.reset()
        start = 0
        for step, end in enumerate(range(first, ids.shape[1] + 1)):
            logits = session.forward(row_ids[start:end], row_mask[:end])
            parts[step].append(logits[row_mask[start:end].astype(bool)])
            start = end
    return np.concatenate([row for step in parts for row in step])


def _row(name: str, recorded: np.ndarray, computed: np.ndarray, bounds: Mapping[str, float]) -> ErrorRow:
    """Both errors, after folding as it was recorded; infinite when shapes differ."""
    bound, peak_bound = bounds["logits"], bounds["peak"] * bounds["logits"]
    folded = sketch(computed, recorded.shape[-1])
    if folded.shape != recorded.shape:
        return ErrorRow(name, float("inf"), bound, float("inf"), peak_bound)
    return ErrorRow(name, relative_rms(recorded, folded), bound, peak_error(recorded, folded), peak_bound)


def _judge(
    reference: str, rows: tuple[ErrorRow, ...], recorded: Mapping[str, np.ndarray], tokens: np.ndarray
) -> DeviceParity:
    """Tokens chosen after the same prefix; the first other one is forgiven when the recorded margin is rounding."""
    steps = len(tokens)
    different = np.flatnonzero(recorded["greedy"] != tokens)
    if not different.size:
        return DeviceParity(reference, rows, steps, steps, False)
    first = int(different[0])
    tie = bool(recorded["margin"][first] <= recorded["rounding"][first])
    return DeviceParity(reference, rows, steps, first, tie)
