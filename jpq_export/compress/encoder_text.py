"""Calibration text for sentence encoders: sentences and short passages, each a row of its own, padded."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from jpq_export.compress.calibration_text import load_documents
from jpq_export.compress.effort import Effort
from jpq_export.errors import CalibrationError
from jpq_export.format.encoder_spec import EncoderSpec

PER_SEQUENCE = 32  # texts in the place of one of a decoder's sequences: a text is short and its model small
LONGEST = 64  # tokens; longer texts are cut: what a sentence encoder is asked for is mostly shorter
SENTENCES = (1, 1, 2, 3)  # in a text, in turn
FEWEST_LETTERS = 12
MINIMUM = 64  # texts; fewer give a Fisher of nothing but luck


def for_texts(effort: Effort) -> Effort:
    """The same effort counted in texts."""
    return replace(
        effort,
        sequences=effort.sequences * PER_SEQUENCE,
        heldout=effort.heldout * PER_SEQUENCE,
        tune_sequences=effort.tune_sequences * PER_SEQUENCE,
        length=LONGEST,
        finalists=max(2, effort.finalists),  # at 2.5 bits the first plan prunes; rounded, the whole one is better
        finalists_within=1.15,  # rounding takes seconds
    )


def texts_and_heldout(
    source: Path | None, tokenizer: Tokenizer, spec: EncoderSpec, *, calibration: int, heldout: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Texts int64 [n, length] for calibration and [heldout, length] from other documents, filled up with `pad_id`.

    A short source gives fewer calibration texts, and at most a quarter of all is held out. CalibrationError when it is
    unreadable or too short.
    """
    documents = load_documents(source)
    random.Random(seed).shuffle(documents)
    per_document = [list(dict.fromkeys(passages(document))) for document in documents]
    kept_out, at = [], 0
    room = sum(map(len, per_document)) // 4
    while len(kept_out) < min(heldout, room):
        kept_out += per_document[at]
        at += 1
    rest = list(dict.fromkeys(text for texts in per_document[at:] for text in texts if text not in set(kept_out)))
    random.Random(seed).shuffle(rest)
    if min(len(kept_out), len(rest)) < MINIMUM:
        where = "shipped calibration text" if source is None else f"--calibration {source}"
        raise CalibrationError(
            f"{where}: {len(rest)} texts to calibrate and {len(kept_out)} held out, needed at least {MINIMUM} of each; "
            "give more text"
        )
    return rows(rest[:calibration], tokenizer, spec), rows(kept_out[:heldout], tokenizer, spec)


def passages(document: str) -> Iterator[str]:
    """One to three sentences at a time."""
    sentences = [s.strip() for s in re.split(r"(?<=[.!?])\s+|\n\s*\n", document)]
    sentences = [" ".join(s.split()) for s in sentences if sum(c.isalpha() for c in s) >= FEWEST_LETTERS]
    turn = 0
    while sentences:
        count = SENTENCES[turn % len(SENTENCES)]
        yield " ".join(sentences[:count])
        sentences, turn = sentences[count:], turn + 1


def rows(texts: list[str], tokenizer: Tokenizer, spec: EncoderSpec) -> np.ndarray:
    """Token ids with special tokens, [texts, LONGEST or fewer], filled up with `pad_id` on the right."""
    width = min(LONGEST, spec.max_positions)
    out = np.full((len(texts), width), spec.pad_id, np.int64)
    for row, encoding in zip(out, tokenizer.encode_batch(texts), strict=True):
        ids = encoding.ids if len(encoding.ids) <= width else [*encoding.ids[: width - 1], encoding.ids[-1]]
        row[: len(ids)] = ids
    return out
