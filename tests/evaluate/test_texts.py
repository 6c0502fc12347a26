"""Evaluation texts: what is read, which windows are cut, and what wrong files are told."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from jpq_export.errors import UsageError
from jpq_export.evaluate.texts import EvaluationText, read_text, token_windows


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def test_raw_text_is_kept_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "wiki.raw"
    path.write_bytes(" \n = Title = \n \n Körper \n".encode())
    text = read_text(path)
    assert text == EvaluationText("wiki.raw", sha256(path.read_bytes()).hexdigest(), " \n = Title = \n \n Körper \n")


def test_documents_of_jsonl_are_joined_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "c4.jsonl"
    documents = ["one", "  ", "two\u2028three"]
    path.write_text("\n".join(json.dumps({"text": d, "url": "x"}, ensure_ascii=False) for d in documents) + "\n\n")
    assert read_text(path).content == "one\n\ntwo\u2028three"


def test_windows_are_the_first_ones_and_do_not_overlap() -> None:
    text = EvaluationText("t", "", "abcdefghij")
    assert token_windows(text, encode, windows=3, context=3, bos_id=None).tolist() == [
        encode("abc"),
        encode("def"),
        encode("ghi"),
    ]


def test_bos_leads_every_window_and_counts_as_context() -> None:
    text = EvaluationText("t", "", "abcdefghij")
    rows = token_windows(text, encode, windows=3, context=3, bos_id=2)
    assert rows.tolist() == [[2, *encode("ab")], [2, *encode("cd")], [2, *encode("ef")]]
    assert rows.dtype == np.int64


@pytest.mark.parametrize(
    ("windows", "context", "said"),
    [
        (4, 3, "10 tokens, needed 12 for 4 windows of 3; give a longer text or --windows 3"),
        (1, 11, "smaller --context"),
    ],
)
def test_too_short(windows: int, context: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        token_windows(EvaluationText("t", "", "abcdefghij"), encode, windows=windows, context=context, bos_id=None)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n ", "empty"),
        ("a.txt", b"caf\xe9", "not UTF-8 text (byte 3 is 0xe9)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", b'{"body": "x"}', 'line 1: got keys body, expected an object with key "text"'),
        ("a.jsonl", b'{"text": 3}', "line 1: got keys text, expected"),
        ("a.jsonl", b"[1]", "line 1: got list"),
        ("a.jsonl", b'{"text": ""}', "empty"),
    ],
)
def test_wrong_files_get_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_text(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_text(tmp_path / "gone.txt")
    with pytest.raises(UsageError, match="Is a directory"):
        read_text(tmp_path)
