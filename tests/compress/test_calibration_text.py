"""Calibration text: deterministic sequences, held-out documents that stay apart, and one line for each wrong input."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

import jpq_export.compress.calibration_text as calibration_text
from jpq_export.compress.calibration_text import calibration_and_heldout, load_documents
from jpq_export.errors import CalibrationError


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def write_documents(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    return path


def alphabet(folder: Path) -> Path:
    """26 documents of 50 characters, each made of one letter, so that a token tells its document."""
    return write_documents(folder / "letters.jsonl", [chr(97 + i) * 50 for i in range(26)])


def take(source: Path | None, **changes: int | None) -> tuple[np.ndarray, np.ndarray]:
    sizes = {"bos_id": None, "calibration": 40, "heldout": 9, "length": 16, "seed": 0} | changes
    return calibration_and_heldout(source, encode, **sizes)  # pyright: ignore[reportArgumentType]


def letters(sequences: np.ndarray) -> set[int]:
    return set(sequences.flatten().tolist()) - {ord("\n")}


def test_sequences_and_held_out_documents_are_disjoint(tmp_path: Path) -> None:
    calibration, heldout = take(alphabet(tmp_path))
    assert (calibration.shape, heldout.shape) == ((40, 16), (9, 16))
    assert calibration.dtype == heldout.dtype == np.int64
    assert letters(calibration) & letters(heldout) == set()
    assert len(letters(heldout)) == 3  # 144 tokens are two documents and part of a third
    assert letters(calibration) & letters(calibration[:3]) != set()  # the check above can see an overlap


def test_a_repeated_document_cannot_be_on_both_sides(tmp_path: Path) -> None:
    documents = [chr(97 + i) * 50 for i in range(26)]
    path = write_documents(tmp_path / "twice.jsonl", documents + documents)
    calibration, heldout = take(path)
    assert letters(calibration) & letters(heldout) == set()


def test_the_seed_decides_and_nothing_else(tmp_path: Path) -> None:
    path = alphabet(tmp_path)
    first, again, other = take(path), take(path), take(path, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[1], other[1])


def test_documents_are_joined_by_a_blank_line_without_losing_tokens(tmp_path: Path) -> None:
    documents = ["abcde", "fghij", "klmno"]
    calibration, heldout = take(write_documents(tmp_path / "a.jsonl", documents), heldout=0, calibration=4, length=4)
    assert heldout.shape == (0, 4)
    text = "".join(map(chr, calibration.flatten().tolist()))
    assert text in {"\n\n".join(order)[:16] for order in permutations(documents)}


@pytest.mark.parametrize("bos_id", [None, 2])
def test_bos_starts_every_sequence(tmp_path: Path, bos_id: int | None) -> None:
    calibration, heldout = take(alphabet(tmp_path), bos_id=bos_id)
    assert (calibration.shape, heldout.shape) == ((40, 16), (9, 16))
    for sequences in (calibration, heldout):
        assert (sequences[:, 0] == 2).all() == (bos_id == 2)
        assert (sequences[:, 1:] != 2).all()


def test_a_plain_file_is_cut_at_paragraphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_text, "PIECE_CHARACTERS", 10)
    path = tmp_path / "book.txt"
    path.write_text("aaaa\n\nbbbb\n\ncccc\n\n0123456789ABCDEFGHIJabcde\n\nxx\n\n\n\n")
    assert load_documents(path) == ["aaaa\n\nbbbb", "cccc", "0123456789", "ABCDEFGHIJ", "abcde\n\nxx"]


def test_a_folder_is_read_in_name_order(tmp_path: Path) -> None:
    write_documents(tmp_path / "b.jsonl", ["second", "third"])
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.md").write_text("fourth")
    assert load_documents(tmp_path) == ["first", "second", "third", "fourth"]


def test_a_short_text_gives_fewer_sequences_down_to_the_least(tmp_path: Path) -> None:
    calibration, heldout = take(alphabet(tmp_path), calibration=1000)
    assert len(heldout) == 9
    assert 60 < len(calibration) < 80
    path = write_documents(tmp_path / "small.jsonl", ["abcdefgh" * 10 + str(i) for i in range(3)])
    with pytest.raises(
        CalibrationError, match=r"224 usable tokens, needed at least 272 \(9 sequences of 16 held out, 8 to"
    ):
        take(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b"\n \n", "empty"),
        ("a.txt", b"ab\xff", "not UTF-8 text (byte 2 is 0xff)"),
        ("a.txt", b"only a few words", "16 usable tokens, needed at least 272"),
        ("a.jsonl", b"{'text': 1}", "line 1: not JSON"),
        ("a.jsonl", b'{"content": "x"}', 'line 1: got keys content, expected an object with key "text"'),
    ],
)
def test_wrong_files_get_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        take(path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"--calibration {path}")
    assert "\n" not in str(caught.value)


def test_a_missing_source_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no such file or folder"):
        take(tmp_path / "gone")
    with pytest.raises(CalibrationError, match=r"no \.txt, \.jsonl.* file in the folder"):
        take(tmp_path)


def test_more_than_can_be_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_text, "READ_LIMIT_BYTES", 1000)
    with pytest.raises(CalibrationError, match=r"up to letters\.jsonl, at most 0 MB is read; give a sample"):
        take(alphabet(tmp_path))


def test_the_shipped_text_is_enough_for_the_standard_effort() -> None:
    calibration, heldout = take(None, calibration=300, heldout=4, length=4 * 512)  # a token is about four characters
    assert (len(calibration), len(heldout)) == (300, 4)


def test_the_shipped_text_is_clean() -> None:
    documents = load_documents(None)
    assert len(documents) > 300
    assert not any("\ufffd" in d or "<|" in d for d in documents)
