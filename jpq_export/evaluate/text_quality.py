"""Perplexity of a model on a text, and how far its predictions are from a teacher's: KL and top-1 agreement.

Everything streams in chunks of positions: no array is larger than `CHUNK_VALUES`, whatever the window or vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jpq_export.errors import ModelError

CHUNK_VALUES = 2**24  # logits that exist at once, 64 MB in fp32: 341 positions of 49152 tokens, 64 of 262144

# (ids int64 [T], n) -> logits float32 [about n positions, vocab], chunk by chunk in order, until all T positions came.
LogitSource = Callable[[np.ndarray, int], Iterator[np.ndarray]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class TextQuality:
    """Over all windows: `tokens` predictions, context - 1 in each.

    perplexity: exp of the mean negative log-likelihood. kl_mean, kl_p99: KL(teacher ‖ model), nats a token.
    top1_agreement: share of predictions whose most probable token is the teacher's. None without a teacher.
    """

    perplexity: float
    tokens: int
    windows: int
    context: int
    teacher_perplexity: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None


def evaluate_text(
    student: Any, teacher: Any | None, sequences: np.ndarray, *, progress: Progress | None = None
) -> TextQuality:
    """Quality of `student`, against `teacher` if there is one, on `sequences` int64 [windows, context].

    Both are Decoders or any `LogitSource`.

    Raises:
        ModelError: vocabularies differ, or logits are not finite.
    """
    count, context = sequences.shape
    if context < 2 or count < 1:
        raise ValueError(f"sequences {sequences.shape}: expected at least one window of two tokens")
    mine = as_source(student)
    theirs = None if teacher is None else as_source(teacher)
    vocab = next(mine(sequences[0, :1], 1)).shape[-1]
    size, rows = max(1, CHUNK_VALUES // vocab), []
    for done, window in enumerate(sequences, 1):
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is found and named
            rows.append(_window(mine, theirs, window, size, f"window {done}"))
        if progress:
            progress(done, count)
    nll, teacher_nll, kl, agree = np.concatenate(rows, 1)
    base = TextQuality(_perplexity(nll), count * (context - 1), count, context)
    if theirs is None:
        return base
    return TextQuality(
        base.perplexity,
        base.tokens,
        count,
        context,
        teacher_perplexity=_perplexity(teacher_nll),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1_agreement=float(agree.mean()),
    )


def _perplexity(nll: np.ndarray) -> float:
    mean = float(nll.mean())
    return math.exp(mean) if mean < 700 else math.inf


def _window(student: LogitSource, teacher: LogitSource | None, ids: np.ndarray, size: int, where: str) -> np.ndarray:
    """Per prediction of one window: (nll, teacher nll, KL, agreement), float64 [4, T - 1]."""
    columns, start = [], 0
    alone = ((chunk, None) for chunk in student(ids, size))
    pairs = alone if teacher is None else _side_by_side(student, teacher, ids, size)
    for chunk, goal in pairs:
        targets = ids[start + 1 : start + 1 + len(chunk)]
        start += len(chunk)
        columns.append(_chunk(chunk[: len(targets)], goal, targets))
        if not np.isfinite(columns[-1]).all():
            raise ModelError(f"{where}: logits are not finite before position {start}; the model is damaged")
    if start != len(ids):
        raise ValueError(f"{where}: logits of {start} positions, expected {len(ids)}")
    return np.concatenate(columns, 1)


def _side_by_side(
    student: LogitSource, teacher: LogitSource, ids: np.ndarray, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of both, cut to the same positions: two runtimes need not agree on how many they give at once."""
    mine, theirs = student(ids, size), teacher(ids, size)
    a = b = None
    while True:
        a = a if a is not None and len(a) else next(mine, None)
        b = b if b is not None and len(b) else next(theirs, None)
        if a is None or b is None:
            return
        if a.shape[-1] != b.shape[-1]:
            raise ModelError(
                f"vocabulary: the model has {a.shape[-1]} tokens, the teacher {b.shape[-1]}; "
                "compare models with the same tokenizer"
            )
        n = min(len(a), len(b))
        yield a[:n], b[:n]
        a, b = a[n:], b[n:]


def _chunk(logits: np.ndarray, goal: np.ndarray | None, targets: np.ndarray) -> np.ndarray:
    """As `_window`, for logits and goal [n, vocab]; `targets` may be one shorter than goal at the end of a window."""
    rows = np.arange(len(targets))
    shifted, log_sum = _shift(logits)
    nll = log_sum - shifted[rows, targets]
    out = np.zeros((4, len(targets)))
    out[0] = nll
    if goal is None:
        return out
    goal_shifted, goal_log_sum = _shift(goal[: len(targets)])
    out[1] = goal_log_sum - goal_shifted[rows, targets]
    out[3] = shifted.argmax(-1) == goal_shifted.argmax(-1)
    # KL = Σ p (a - b) - (log Σ e^a - log Σ e^b); numpy sums pairwise, so fp32 keeps about six digits of each row.
    difference = goal_shifted - shifted
    np.exp(goal_shifted, out=goal_shifted)
    difference *= goal_shifted
    expected = difference.sum(-1, dtype=np.float32) / goal_shifted.sum(-1)
    out[2] = np.maximum(expected.astype(np.float64) - (goal_log_sum - log_sum), 0.0)
    return out


def _shift(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(logits - their maximum as float32 [n, vocab], log of the sum of their exponentials as float64 [n])."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted, np.log(np.exp(shifted).sum(-1).astype(np.float64))


def as_source(model: Any) -> LogitSource:
    """A Decoder as a `LogitSource`; a function stays what it is."""
    if not hasattr(model, "hidden"):
        return model

    def logits(ids: np.ndarray, size: int) -> Iterator[np.ndarray]:
        import torch

        device = next(model.parameters()).device
        with torch.no_grad():
            batch = torch.from_numpy(ids)[None].to(device)
            hidden = model.hidden(batch, model.context(batch))[0]
        for part in hidden.split(size):
            # Left before each yield: two such generators side by side would leave gradients off for the whole process.
            with torch.no_grad():
                values = model.logits(part).float().cpu().numpy()
            yield values

    return logits
