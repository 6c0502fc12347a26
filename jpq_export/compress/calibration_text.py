"""Calibration text to token sequences, with documents held out for the gates: the shipped text, a file or a folder."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from jpq_export.errors import CalibrationError
from jpq_export.format.documents import read_documents

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).resolve().parents[1] / "data"
SUFFIXES = (".txt", ".jsonl", ".raw", ".md")
PIECE_CHARACTERS = 4000  # a plain file is cut at paragraphs into documents of about this size, some 1,000 tokens
READ_LIMIT_BYTES = 64_000_000  # 50 times what the largest effort uses
MINIMUM_SEQUENCES = 8  # fewer give a Fisher of nothing but luck

Encode = Callable[[str], Iterable[int]]


def calibration_and_heldout(
    source: Path | None,
    encode: Encode,
    *,
    bos_id: int | None,
    calibration: int,
    heldout: int,
    length: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences int64 [n, length] for calibration and [heldout, length] from other documents.

    Args:
        source: a file, a folder of files, or None for the shipped text.
        encode: text to token ids, without special tokens.
        bos_id: put at the start of every sequence when the model wants one.
        calibration: how many sequences at most; a short text gives fewer, at least `MINIMUM_SEQUENCES`.
        heldout: how many sequences to hold out.
        length: tokens a sequence.
        seed: order of the documents.

    Raises:
        CalibrationError: unreadable, not UTF-8, empty or too short; one line with got and needed tokens.
    """
    documents = load_documents(source)
    random.Random(seed).shuffle(documents)
    stream = _Documents(documents, encode)
    least = min(calibration, MINIMUM_SEQUENCES)
    kept_out = stream.take(heldout, length, bos_id)
    chosen = stream.take(calibration, length, bos_id)
    if len(kept_out) < heldout or len(chosen) < least:
        usable, needed = (len(kept_out) + len(chosen)) * length, (heldout + least) * length
        raise CalibrationError(
            f"{_name(source)}: {len(documents)} different documents give {usable} usable tokens, needed at least "
            f"{needed} ({heldout} sequences of {length} held out, {least} to calibrate); give more text"
        )
    if len(chosen) < calibration:
        logger.info("calibration text gives %d of %d sequences; tuning repeats them", len(chosen), calibration)
    return chosen, kept_out


class _Documents:
    """Shuffled documents, tokenized one by one and never twice."""

    def __init__(self, documents: list[str], encode: Encode) -> None:
        self._rest, self._encode, self.tokens = iter(documents), encode, 0
        self._gap = list(encode("\n\n"))  # between documents; every tokenizer has it, unlike a separator token

    def take(self, count: int, length: int, bos_id: int | None) -> np.ndarray:
        """Up to `count` sequences [n, length]; what is left of the last document used is dropped."""
        payload = length - (bos_id is not None)
        ids: list[int] = []
        while len(ids) < count * payload and (document := next(self._rest, None)) is not None:
            fresh = list(self._encode(document))
            self.tokens += len(fresh)
            ids += [*(self._gap if ids else []), *fresh]
        rows = min(count, len(ids) // payload)
        sequences = np.array(ids[: rows * payload], np.int64).reshape(rows, payload)
        if bos_id is None:
            return sequences
        return np.concatenate([np.full((rows, 1), bos_id, np.int64), sequences], 1)


def load_documents(source: Path | None) -> list[str]:
    """Different documents of a file or folder, in file order."""
    documents: list[str] = []
    total = 0
    for path in _files(source):
        total += path.stat().st_size
        if total > READ_LIMIT_BYTES:
            raise CalibrationError(
                f"{_name(source)}: {total / 1e6:.0f} MB up to {path.name}, "
                f"at most {READ_LIMIT_BYTES / 1e6:.0f} MB is read; give a sample"
            )
        found = read_documents(path, what="--calibration", error=CalibrationError)
        documents += found if path.suffix == ".jsonl" else [piece for text in found for piece in _pieces(text)]
    documents = list(dict.fromkeys(documents))  # a copy of a calibration document would not be held out
    if not documents:
        raise CalibrationError(f"{_name(source)}: empty; give text of at least a few thousand words")
    return documents


def _files(source: Path | None) -> list[Path]:
    if source is not None and not source.exists():
        raise CalibrationError(f"--calibration {source}: no such file or folder")
    folder = SHIPPED if source is None else source
    if not folder.is_dir():
        return [folder]
    suffixes = (".jsonl",) if source is None else SUFFIXES  # the shipped folder also has its README
    found = sorted(path for path in folder.rglob("*") if path.suffix in suffixes and path.is_file())
    if not found:
        raise CalibrationError(f"{_name(source)}: no {', '.join(SUFFIXES)} file in the folder")
    return found


def _pieces(text: str) -> list[str]:
    """Paragraphs joined to documents of at most `PIECE_CHARACTERS`; a longer paragraph is cut."""
    parts = [
        paragraph[start : start + PIECE_CHARACTERS]
        for paragraph in text.split("\n\n")
        for start in range(0, len(paragraph), PIECE_CHARACTERS)
    ]
    pieces: list[list[str]] = [[]]
    size = 0
    for part in parts:
        if size + len(part) > PIECE_CHARACTERS:
            pieces.append([])
            size = 0
        pieces[-1].append(part)
        size += len(part)
    joined = ("\n\n".join(piece) for piece in pieces)
    return [piece for piece in joined if piece.strip()]


def _name(source: Path | None) -> str:
    return "shipped calibration text" if source is None else f"--calibration {source}"
