"""Log-likelihood of answers after their contexts: each context is read once, whatever the number of its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from jpq_export.errors import ModelError
from jpq_export.evaluate.predictors import Predictor

TOKENS = 2048  # of all answers of a batch with their contexts: bounds the cache, 94 MB for SmolLM2-135M

Ids = tuple[int, ...]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Score:
    """Sum of the answer's log-probabilities in nats; `greedy`: every token was the most probable one."""

    log_likelihood: float
    greedy: bool


@dataclass(slots=True, eq=False)
class _Question:
    """A context and the places of its answers in the caller's list."""

    context: Ids
    places: list[int] = field(default_factory=list)


def score_answers(
    predictor: Predictor, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, progress: Progress | None = None
) -> list[Score]:
    """Scores of (context, answer) token pairs, in their order; neither may be empty.

    Contexts of equal length are read together, so that none is padded.

    Raises:
        ModelError: logits are not finite.
    """
    questions: dict[Ids, _Question] = {}
    for place, (context, answer) in enumerate(pairs):
        if not len(context) or not len(answer):
            raise ValueError(f"pair {place}: {len(context)} context and {len(answer)} answer tokens, expected some")
        key = tuple(context)
        questions.setdefault(key, _Question(key)).places.append(place)
    answers = [tuple(answer) for _, answer in pairs]
    scores: list[Score | None] = [None] * len(pairs)
    done = 0
    for batch in _batches(list(questions.values()), answers):
        for place, score in _score_batch(predictor, batch, answers):
            scores[place] = score
            done += 1
        if progress:
            progress(done, len(pairs))
    assert None not in scores
    return [score for score in scores if score is not None]


def _batches(questions: list[_Question], answers: list[Ids]) -> Iterator[list[_Question]]:
    """Longest contexts first: what does not fit into memory is found at once."""
    questions.sort(key=lambda q: (-len(q.context), -max(len(answers[p]) for p in q.places), q.context))
    for length, same in groupby(questions, key=lambda q: len(q.context)):
        batch: list[_Question] = []
        for question in same:
            if batch and _width([*batch, question], answers, length) > TOKENS:
                yield batch
                batch = []
            batch.append(question)
        yield batch


def _width(batch: list[_Question], answers: list[Ids], length: int) -> int:
    """Tokens in memory at once: contexts, or every answer with the copy of its context."""
    places = [place for question in batch for place in question.places]
    return len(places) * (length + max(len(answers[place]) for place in places))


def _score_batch(predictor: Predictor, batch: list[_Question], answers: list[Ids]) -> Iterator[tuple[int, Score]]:
    contexts = np.array([question.context for question in batch], np.int64)
    rows = np.array([row for row, question in enumerate(batch) for _ in question.places])
    places = [place for question in batch for place in question.places]
    lengths = np.array([len(answers[place]) for place in places])
    ids = np.zeros((len(places), int(lengths.max())), np.int64)
    for row, place in enumerate(places):
        ids[row, : lengths[row]] = answers[place]
    log_p, best = _predictions(predictor, contexts, rows, ids, lengths)
    for row, place in enumerate(places):
        total = float(log_p[row].sum())
        if not np.isfinite(total):
            raise ModelError("log-likelihood of an answer is not finite; the model is damaged")
        yield place, Score(total, bool(best[row].all()))


def _predictions(
    predictor: Predictor, contexts: np.ndarray, rows: np.ndarray, ids: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of every token of `ids` [n, L], 0 where filled up, and whether it was the most probable one."""
    log_p, best = np.zeros(ids.shape), np.ones(ids.shape, bool)
    first, cache = predictor.read(contexts)
    shifted, log_sum = _shift(first)  # the first token of every answer is predicted by its context alone
    log_p[:, 0], best[:, 0] = _picked(shifted[rows], log_sum[rows], ids[:, 0])
    longer, column = np.flatnonzero(lengths > 1), 1
    if not len(longer):
        return log_p, best
    for logits in predictor.go_on(cache, rows[longer], ids[longer, :-1]):
        for i in range(logits.shape[1]):
            inside = lengths[longer] > column
            at = longer[inside]
            log_p[at, column], best[at, column] = _picked(*_shift(logits[inside, i]), ids[at, column])
            column += 1
    return log_p, best


def _shift(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(logits minus their maximum [n, vocab], log of the sum of their exponentials as float64 [n])."""
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is found and named
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted, np.log(np.exp(shifted).sum(-1, dtype=np.float64))


def _picked(shifted: np.ndarray, log_sum: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of `tokens` [n], and whether each is the most probable."""
    own = shifted[np.arange(len(tokens)), tokens]
    return own - log_sum, shifted.argmax(-1) == tokens
