"""Error measures between a reference and a runtime, in numpy and float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class LogitsError:
    """How far a runtime's logits lie from the reference's, over the same positions."""

    rel_rms: float
    max_abs: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float


def relative_rms(reference: np.ndarray, value: np.ndarray) -> float:
    """Root mean square over positions of |value - reference| / |reference|; arrays [..., features].

    Each position is divided by its own norm: the first token of a language model is often a hundred times larger than
    the others and would hide them. A NaN or infinity on either side gives infinity.
    """
    return float(np.sqrt(np.mean(_position_error(reference, value) ** 2)))


def peak_error(reference: np.ndarray, value: np.ndarray) -> float:
    """Largest |value - reference| of one feature, over the RMS of its position and its own size in quadrature.

    Sees one wrong feature among thousands. Its own size counts, because language models have single features a hundred
    times larger than the rest, and rounding errors grow with them.
    """
    difference, scale = _difference(reference, value)
    own = np.hypot(scale[..., None], np.nan_to_num(reference.astype(np.float64), posinf=0.0, neginf=0.0))
    return float((np.abs(difference) / own).max()) if difference.size else 0.0


def _position_error(reference: np.ndarray, value: np.ndarray) -> np.ndarray:
    difference, scale = _difference(reference, value)
    return np.sqrt(np.mean(difference**2, -1)) / scale if difference.size else np.zeros(1)


def _difference(reference: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Difference value - reference [..., features] with non-finite entries infinite, and each position's RMS [...]."""
    if reference.shape != value.shape:
        raise ValueError(f"shapes differ: reference {reference.shape}, value {value.shape}")
    reference, value = reference.astype(np.float64), value.astype(np.float64)
    finite = np.isfinite(reference) & np.isfinite(value)
    difference = np.where(finite, np.where(finite, value, 0) - np.where(finite, reference, 0), np.inf)
    scale = np.sqrt(np.mean(np.where(finite, reference, 0) ** 2, -1)) if reference.size else np.ones(1)
    return difference, np.maximum(scale, np.finfo(np.float32).tiny)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[..., vocab] -> log probabilities, float64."""
    wide = logits.astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def kl_divergence(reference: np.ndarray, value: np.ndarray) -> np.ndarray:
    """KL(reference || value) in nats of every position: logits [..., vocab] -> [...]."""
    p, q = log_softmax(reference), log_softmax(value)
    return np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)


class LogitsTally:
    """Adds up errors over many passes without keeping their logits."""

    def __init__(self) -> None:
        self._errors: list[np.ndarray] = []
        self._kls: list[np.ndarray] = []
        self._agree: list[np.ndarray] = []
        self._largest = 0.0

    @property
    def positions(self) -> int:
        """Positions seen."""
        return sum(map(len, self._errors))

    def add(self, reference: np.ndarray, value: np.ndarray) -> None:
        """Logits [..., vocab] of both sides; a few positions at a time, to keep the float64 copies small."""
        reference, value = reference.reshape(-1, reference.shape[-1]), value.reshape(-1, value.shape[-1])
        for start in range(0, len(reference), 16):
            self._add(reference[start : start + 16], value[start : start + 16])

    def _add(self, reference: np.ndarray, value: np.ndarray) -> None:
        self._errors.append(_position_error(reference, value))
        self._agree.append(reference.argmax(-1) == value.argmax(-1))
        if np.isfinite(reference).all() and np.isfinite(value).all():
            self._kls.append(kl_divergence(reference, value))
            self._largest = max(self._largest, float(np.abs(reference.astype(np.float64) - value).max()))
        else:
            self._kls.append(np.full(len(reference), np.inf))
            self._largest = float("inf")

    def result(self) -> LogitsError:
        """All measures over what was added."""
        errors, kl, agree = (np.concatenate(part) for part in (self._errors, self._kls, self._agree))
        p99 = float(np.sort(kl)[min(len(kl) - 1, int(0.99 * len(kl)))])  # no interpolation: it may hold infinities
        rel_rms = float(np.sqrt(np.mean(errors**2)))
        return LogitsError(rel_rms, self._largest, float(kl.mean()), p99, float(agree.mean()))


def compare_logits(reference: np.ndarray, value: np.ndarray) -> LogitsError:
    """All measures of logits [..., vocab]."""
    tally = LogitsTally()
    tally.add(reference, value)
    return tally.result()


def worst(errors: Iterable[LogitsError]) -> LogitsError:
    """The worst of each measure."""
    rows = list(errors)
    return LogitsError(
        rel_rms=max(row.rel_rms for row in rows),
        max_abs=max(row.max_abs for row in rows),
        kl_mean=max(row.kl_mean for row in rows),
        kl_p99=max(row.kl_p99 for row in rows),
        top1_agreement=min(row.top1_agreement for row in rows),
    )


def margin(logits: np.ndarray) -> float:
    """Distance between the two largest of logits [vocab]."""
    second, first = np.partition(logits.astype(np.float64), -2)[-2:]
    return float(first - second)


def sketch(values: np.ndarray, width: int) -> np.ndarray:
    """Fold the features [..., n] into at most `width` signed sums: float32 [..., min(n, width)] (count sketch).

    Charikar, Chen and Farach-Colton (2002): the sum of squares is kept on average, and one wrong feature moves one sum.
    Signs and buckets come from a fixed integer hash, so every machine folds alike. Arrays that fit stay as they are.
    """
    n = values.shape[-1]
    if n <= width:
        return values.astype(np.float32)
    hashed = _splitmix64(np.arange(n, dtype=np.uint64))
    buckets = (hashed % np.uint64(width)).astype(np.int64)
    signs = np.where(hashed >> np.uint64(63), 1.0, -1.0)
    flat = values.astype(np.float64).reshape(-1, n) * signs
    out = np.stack([np.bincount(buckets, row, width) for row in flat])
    return out.reshape(*values.shape[:-1], width).astype(np.float32)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Steele, Lea and Flood (2014): a good 64-bit mix of uint64 values."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
