"""Quality of sentence embeddings on a local file of pairs: rank correlation with people's scores, and retrieval."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from jpq_export.errors import UsageError

Embed = Callable[[Sequence[str]], np.ndarray]  # texts -> float32 [texts, dimension]
RELEVANT = 0.8  # of the highest score: in STS-B 4 of 5, "mostly equivalent"
KEYS = ("sentence1", "sentence2", "score")
RESAMPLES = 2000  # of the bootstrap


@dataclass(frozen=True, slots=True)
class Pairs:
    """`first[i]` and `second[i]` belong together; `scores` says how much, None when every pair simply matches."""

    name: str
    sha256: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    scores: np.ndarray | None


@dataclass(frozen=True, slots=True)
class EmbeddingQuality:
    """`spearman`: of cosines with the scores; recall: share of queries whose partner is the nearest, or among ten.

    Retrieval: `queries` are the first texts of pairs that match (score of at least RELEVANT of the highest), the corpus
    are all different second texts.
    """

    pairs: int
    spearman: float | None
    queries: int
    corpus: int
    recall_at_1: float
    recall_at_10: float


@dataclass(frozen=True, slots=True)
class Closeness:
    """How near embeddings are to a teacher's, and whether people's scores tell the two apart.

    `cosine_distance`: mean of 1 - cosine of the two embeddings of a text. `rank_agreement`: Spearman's correlation
    of both models' cosines of the pairs. `spearman_difference`: of the correlations with the scores, None without
    those; `spearman_difference_95`: its interval by a bootstrap over pairs (Efron, 1979; both models see the same):
    one that holds 0 says that these pairs cannot tell them apart.
    """

    cosine_distance: float
    rank_agreement: float
    spearman_difference: float | None
    spearman_difference_95: tuple[float, float] | None


def read_pairs(path: Path) -> Pairs:
    """A .csv or .tsv of text, text, score (a header is skipped), or a .jsonl with sentence1, sentence2[, score].

    UsageError when it is unreadable, malformed or empty.
    """
    try:
        body = path.read_bytes()
        text = body.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--pairs {path}: not readable as UTF-8 ({error}); give a .csv, .tsv or .jsonl file"
        ) from error
    try:
        rows = _jsonl(text) if path.suffix == ".jsonl" else _table(text, "\t" if path.suffix == ".tsv" else ",")
    except csv.Error as error:
        raise UsageError(f"--pairs {path}: no table ({error}); expected text, text, score a line") from error
    except _MalformedLine as error:
        raise UsageError(f"--pairs {path}: {error}") from error
    if len(rows) < 2:
        raise UsageError(f"--pairs {path}: {len(rows)} pairs; give at least two")
    values = [row[2] for row in rows]
    if any(value is None for value in values) and any(value is not None for value in values):
        raise UsageError(f"--pairs {path}: only some pairs have a score; give all of them one, or none")
    scores = None if values[0] is None else np.array(values, np.float64)
    return Pairs(path.name, sha256(body).hexdigest(), tuple(r[0] for r in rows), tuple(r[1] for r in rows), scores)


class _MalformedLine(Exception):
    """Says which, what it has and what was expected."""


def _jsonl(text: str) -> list[tuple[str, str, float | None]]:
    expected = (
        f"expected an object with {', '.join(KEYS[:2])} as texts and, where there are scores, {KEYS[2]} as a number"
    )
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
            score = raw.get(KEYS[2])
            first, second = raw[KEYS[0]], raw[KEYS[1]]
            if not isinstance(first, str) or not isinstance(second, str):
                raise TypeError(KEYS)
            found.append((first, second, None if score is None else float(score)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _MalformedLine(f"line {number}: {line[:40]!r}; {expected}") from error
    return found


def _table(text: str, delimiter: str) -> list[tuple[str, str, float | None]]:
    reader = csv.reader(text.splitlines(), delimiter=delimiter)
    rows = [(reader.line_num, row) for row in reader if row]
    if rows and len(rows[0][1]) > 2 and not any(letter.isdigit() for letter in rows[0][1][2]):
        rows = rows[1:]  # a header
    for number, row in rows:
        if len(row) < 2 or (len(row) > 2 and not _is_number(row[2])):
            got = "1 column" if len(row) < 2 else f"score {row[2]!r}"
            raise _MalformedLine(f"line {number}: {got}; expected text, text and, where there are scores, a number")
    return [(row[0], row[1], float(row[2]) if len(row) > 2 else None) for _, row in rows]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def evaluate_embeddings(embed: Embed, pairs: Pairs) -> EmbeddingQuality:
    """All measures; every different text is embedded once."""
    vectors, first, second = _embedded(embed, pairs)
    cosines = np.einsum("ij,ij->i", vectors[first], vectors[second])
    spearman = None if pairs.scores is None else rank_correlation(cosines, pairs.scores)
    match = np.ones(len(first), bool) if pairs.scores is None else pairs.scores >= RELEVANT * pairs.scores.max()
    corpus = np.unique(second)
    ranks = partner_ranks(vectors[first[match]], vectors[corpus], np.searchsorted(corpus, second[match]))
    at_1, at_10 = (float((ranks < k).mean()) for k in (1, 10))
    return EmbeddingQuality(len(first), spearman, int(match.sum()), len(corpus), at_1, at_10)


def closeness(embed: Embed, teacher: Embed, pairs: Pairs, *, seed: int = 0) -> Closeness:
    """`embed` against `teacher` on the texts of the pairs."""
    vectors, first, second = _embedded(embed, pairs)
    theirs, _, _ = _embedded(teacher, pairs)
    mine, their = (np.einsum("ij,ij->i", v[first], v[second]) for v in (vectors, theirs))
    distance = 1 - float(np.einsum("ij,ij->i", vectors, theirs).mean())
    agreement = rank_correlation(mine, their)
    if pairs.scores is None:
        return Closeness(distance, agreement, None, None)
    rng, found = np.random.default_rng(seed), []
    while len(found) < RESAMPLES:
        drawn = rng.integers(0, len(mine), len(mine))
        if np.ptp(pairs.scores[drawn]):  # of few pairs a draw may hold one score only
            found.append(_difference(mine[drawn], their[drawn], pairs.scores[drawn]))
    low, high = (float(v) for v in np.quantile(found, (0.025, 0.975)))
    return Closeness(distance, agreement, _difference(mine, their, pairs.scores), (low, high))


def _difference(mine: np.ndarray, theirs: np.ndarray, scores: np.ndarray) -> float:
    return rank_correlation(mine, scores) - rank_correlation(theirs, scores)


def _embedded(embed: Embed, pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings of length 1 of every different text, and which of them the first and second texts have."""
    texts = list(dict.fromkeys((*pairs.first, *pairs.second)))
    place = {text: i for i, text in enumerate(texts)}
    vectors = embed(texts).astype(np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.finfo(np.float64).tiny)
    first, second = (np.array([place[text] for text in side]) for side in (pairs.first, pairs.second))
    return vectors, first, second


def partner_ranks(queries: np.ndarray, corpus: np.ndarray, partners: np.ndarray) -> np.ndarray:
    """How many texts of the corpus are nearer to each query than its partner: int [queries]."""
    ranks = np.empty(len(queries), np.int64)
    for i, (query, partner) in enumerate(zip(queries, partners, strict=True)):
        scores = corpus @ query
        ranks[i] = int((scores > scores[partner]).sum())
    return ranks


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: the correlation of ranks, ties sharing their mean rank; UsageError when one side is constant."""
    ranks = [mean_ranks(values) for values in (a, b)]
    x, y = (r - r.mean() for r in ranks)
    scale = float(np.sqrt((x @ x) * (y @ y)))
    if scale == 0:
        raise UsageError("--pairs: all scores are equal, which orders nothing; leave the scores out")
    return float(x @ y) / scale


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing the mean of theirs: float64 [n]."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[inverse]
