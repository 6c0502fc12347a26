"""The caches of several sequences as one batch, left-padded to the longest: one pass gives a token to each of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from jpq_export.runtime.session import Decoding, OrtModel


class Slots:
    """`lengths`: tokens in each row's cache. Rows join after their prompt was read, and leave when they are done."""

    def __init__(self, model: OrtModel) -> None:
        """Start without rows."""
        self.lengths = np.zeros(0, np.int64)
        self._model = model
        self._past: dict[str, Any] = {}

    def join(self, decoding: Decoding) -> None:
        """Add a sequence as the last row."""
        lengths = np.append(self.lengths, decoding.length)
        if len(lengths) == 1:
            self._past = decoding.past
        else:
            total = int(lengths.max())
            self._past = {name: _stack(value, decoding.past[name], total) for name, value in self._past.items()}
        self.lengths = lengths

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Append one token to every row; logits float32 [rows, vocab]."""
        lengths = self.lengths + 1
        total = int(lengths.max())
        mask = (np.arange(total) >= total - lengths[:, None]).astype(np.int64)
        logits, self._past = self._model.step(np.asarray(tokens, np.int64)[:, None], self._past, mask=mask)
        self.lengths = lengths
        return logits[:, -1]

    def leave(self, rows: Collection[int]) -> None:
        """Remove rows; the others move up, and padding that none of them needs is cut off."""
        keep = [row for row in range(len(self.lengths)) if row not in rows]
        lengths = self.lengths[keep]
        total = int(lengths.max(initial=0))
        self._past = {name: _select(value, keep, total) for name, value in self._past.items()} if keep else {}
        self.lengths = lengths


def _stack(rows: Any, row: Any, total: int) -> Any:
    """OrtValues [n, heads, a, dim] and [1, heads, b, dim] as one [n + 1, heads, total, dim], aligned at the end."""
    from onnxruntime import OrtValue

    old, new = rows.numpy(), row.numpy()
    both = np.zeros((len(old) + 1, old.shape[1], total, old.shape[3]), old.dtype)
    both[:-1, :, total - old.shape[2] :] = old
    both[-1:, :, total - new.shape[2] :] = new
    return OrtValue.ortvalue_from_numpy(both)


def _select(rows: Any, keep: list[int], total: int) -> Any:
    """The last `total` positions of some rows."""
    from onnxruntime import OrtValue

    old = rows.numpy()
    return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(old[keep, :, old.shape[2] - total :]))
