"""A sentence encoder in onnxruntime on the CPU: token rows of different lengths -> one embedding each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jpq_export.errors import BundleError, CapacityError, UsageError
from jpq_export.runtime.session import SPEC_KEY

OUTPUT = "embedding"
INPUTS = {"input_ids", "attention_mask"}


def is_encoder(session: Any) -> bool:
    """Whether a graph gives embeddings instead of logits."""
    return OUTPUT in {value.name for value in session.get_outputs()}


class OrtEncoder:
    """`dimension`: length of an embedding; `max_positions`: most tokens of a text; `vocab`: None when not stated."""

    def __init__(self, path: Path, session: Any) -> None:
        """Take what `open_session` gave for `path`; BundleError when it is no encoder of ours."""
        self.session = session
        names = {value.name for value in self.session.get_inputs()}
        shape = next((list(value.shape) for value in self.session.get_outputs() if value.name == OUTPUT), [])
        if names != INPUTS or len(shape) != 2 or not isinstance(shape[1], int):
            raise BundleError(
                f"{path}: inputs {sorted(names)}, embedding {shape}: no sentence encoder; expected inputs "
                f"{sorted(INPUTS)} and an output {OUTPUT!r} [batch, dimension]; export it again"
            )
        self.dimension: int = shape[1]
        try:
            facts = json.loads(self.session.get_modelmeta().custom_metadata_map[SPEC_KEY])
            self.max_positions: int = int(facts["max_positions"])
            self.vocab: int | None = facts.get("vocab")
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{path}: not written by jpq-export (metadata: {error!r}); export it again") from error

    def embed(self, rows: Sequence[Sequence[int]], *, batch_size: int = 32) -> np.ndarray:
        """Embeddings float32 [len(rows), dimension] of token ids, special tokens included, in the order given.

        Raises:
            CapacityError: a row is longer than the model's positions.
            UsageError: an empty row, or a token the model does not know.
        """
        if batch_size < 1:
            raise UsageError(f"batch_size: got {batch_size}, expected 1 or more")
        self.check(rows, most=self.max_positions)
        out = np.full((len(rows), self.dimension), np.nan, np.float32)
        # Equal lengths stand together, so that little is computed for padding.
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        for batch in _batches(order, batch_size):
            out[batch] = self._pass([rows[index] for index in batch])
        return out

    def check(self, rows: Sequence[Sequence[int]], *, most: int) -> None:
        """Whether all rows can be embedded, none of them longer than `most` tokens; errors as in `embed`."""
        for index, row in enumerate(rows):
            self._check(index, row, most)

    def _check(self, index: int, row: Sequence[int], most: int) -> None:
        if not row:
            raise UsageError(f"text {index} has no tokens; give some text")
        if len(row) > most:
            raise CapacityError(f"text {index} has {len(row)} tokens, expected at most {most}; shorten or split it")
        if self.vocab is not None and not 0 <= min(row) <= max(row) < self.vocab:
            wrong = next(token for token in row if not 0 <= token < self.vocab)
            raise UsageError(f"text {index}: token {wrong} is not in the model's vocabulary of {self.vocab}")

    def _pass(self, rows: list[Sequence[int]]) -> np.ndarray:
        longest = max(map(len, rows))
        ids, mask = np.zeros((2, len(rows), longest), np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
        return self.session.run([OUTPUT], {"input_ids": ids, "attention_mask": mask})[0]


def _batches(order: list[int], size: int) -> Iterator[list[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of the angle between two vectors."""
    return float(a @ b / ((a @ a) * (b @ b)) ** 0.5)
