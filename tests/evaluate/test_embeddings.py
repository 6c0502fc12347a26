"""Pairs files, rank correlation and retrieval, each against numbers found by hand or another way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from jpq_export.errors import UsageError
from jpq_export.evaluate.embeddings import Pairs, closeness, evaluate_embeddings, rank_correlation, read_pairs


def by_length(texts: Sequence[str]) -> np.ndarray:
    """An "encoder": the angle is the text's length."""
    angles = np.array([len(text) for text in texts]) / 20
    return np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'sentence1,sentence2,score\n"a, b",c,1.5\nd,ee,5\n'),
        ("a.csv", '"a, b",c,1.5\nd,ee,5\n'),
        ("a.tsv", "a, b\tc\t1.5\nd\tee\t5\n"),
        (
            "a.jsonl",
            '{"sentence1":"a, b","sentence2":"c","score":1.5}\n\n{"sentence1": "d", "sentence2": "ee", "score": 5.0}',
        ),
    ],
)
def test_every_format_reads_alike(name: str, text: str, tmp_path: Path) -> None:
    pairs = read_pairs(write(tmp_path, name, text))
    assert (pairs.first, pairs.second) == (("a, b", "d"), ("c", "ee"))
    assert pairs.scores is not None
    assert pairs.scores.tolist() == [1.5, 5]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "a,b,1\nc,d,high\n", "line 2: score .high."),
        ("a.csv", "", "0 pairs"),
        ("a.csv", "a,b,1\nc,d\n", "only some pairs have a score"),
        ("a.jsonl", '{"sentence1": "a"}\n', "line 1: .*sentence2"),
    ],
)
def test_bad_files_are_named(name: str, text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        read_pairs(write(tmp_path, name, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none.csv: not readable"):
        read_pairs(tmp_path / "none.csv")


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([10.0, 20, 30])) == pytest.approx(1)
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    # ranks 0 1 2 3 against 0.5 0.5 2 3: 4.5 / sqrt(5 * 4.5)
    assert rank_correlation(np.array([1.0, 2, 3, 4]), np.array([7.0, 7, 8, 9])) == pytest.approx(4.5 / (5 * 4.5) ** 0.5)
    with pytest.raises(UsageError, match="all scores are equal"):
        rank_correlation(np.array([1.0, 2]), np.array([5.0, 5]))


def test_retrieval_and_correlation(tmp_path: Path) -> None:
    pairs = read_pairs(write(tmp_path, "a.csv", "a,b,5\nccc,dddd,4\neeee,f,1\nhhhhh,iiiiiiiii,3\n"))
    found = evaluate_embeddings(by_length, pairs)
    # Cosines fall with the difference of lengths: 0, 1, 3, 4 against the scores 5, 4, 1, 3.
    assert found.spearman == pytest.approx(0.8)
    # "a" is nearest to "b" (and "f", of equal length), "ccc" to "dddd".
    assert (found.pairs, found.queries, found.corpus) == (4, 2, 4)
    assert (found.recall_at_1, found.recall_at_10) == (1, 1)
    wrong = evaluate_embeddings(lambda texts: by_length(texts)[::-1], pairs)
    assert wrong.spearman != pytest.approx(0.8)


def scattered(scale: float, seed: int):
    """An "encoder" of pairs whose angle is their score, plus `scale` of noise."""

    def embed(texts: Sequence[str]) -> np.ndarray:
        rng = np.random.default_rng(seed)
        angles = np.array([float(text[1:]) if text[0] == "b" else 0.0 for text in texts]) / 4
        angles += scale * rng.normal(size=len(angles))
        return np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)

    return embed


def numbered(count: int) -> Pairs:
    scores = np.linspace(0, 5, count)
    return Pairs("p", "", tuple(f"a{i}" for i in range(count)), tuple(f"b{5 - s}" for s in scores), scores)


def test_an_interval_tells_what_pairs_can_tell_apart() -> None:
    pairs, exact = numbered(300), scattered(0.0, 0)
    worse = closeness(scattered(0.3, 1), exact, pairs)
    better = closeness(exact, scattered(0.3, 1), pairs)
    like = closeness(scattered(0.3, 1), scattered(0.3, 2), pairs)
    assert worse.spearman_difference is not None
    assert worse.spearman_difference_95 is not None
    assert worse.spearman_difference_95[0] < worse.spearman_difference < worse.spearman_difference_95[1] < 0
    assert better.spearman_difference_95 is not None
    assert better.spearman_difference_95[0] > 0
    assert better.spearman_difference == pytest.approx(-worse.spearman_difference)
    assert like.spearman_difference_95 is not None
    assert like.spearman_difference_95[0] < 0 < like.spearman_difference_95[1]
    assert worse.cosine_distance == pytest.approx(1 - np.exp(-(0.3**2) / 2), rel=0.2)  # the mean cosine of the noise
    assert 0.5 < worse.rank_agreement < 0.999


def test_an_encoder_is_close_to_itself() -> None:
    found = closeness(by_length, by_length, Pairs("p", "", ("a", "bb", "ccc"), ("d" * 9, "e" * 7, "f" * 4), None))
    assert found.cosine_distance == pytest.approx(0, abs=1e-7)
    assert found.rank_agreement == pytest.approx(1)
    assert found.spearman_difference is None
    assert found.spearman_difference_95 is None
