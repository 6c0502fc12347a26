"""The caches of several sequences as one batch, left-padded to the longest: one pass gives a token to each of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from jpq_export.runtime.cache import Cache
from jpq_export.runtime.session import Decoding, OrtModel


class Slots:
    """`lengths`: tokens in each row's cache. Rows join after their prompt was read, and leave when they are done."""

    def __init__(self, model: OrtModel) -> None:
        """Start without rows."""
        self.lengths = np.zeros(0, np.int64)
        self._model = model
        self._cache: Cache | None = None

    def join(self, decoding: Decoding) -> None:
        """Add a sequence as the last row."""
        lengths = np.append(self.lengths, decoding.length)
        if self._cache is None:
            self._cache = decoding.cache
        else:
            old, new, total = self._cache, decoding.cache, int(lengths.max())
            names = self._model.cache.parts
            self._cache = self._model.new_cache({name: _stack(old.rows(name), new.rows(name), total) for name in names})
        self.lengths = lengths

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Append one token to every row; logits float32 [rows, vocab]."""
        assert self._cache is not None
        lengths = self.lengths + 1
        total = int(lengths.max())
        mask = (np.arange(total) >= total - lengths[:, None]).astype(np.int64)
        logits = self._model.step(np.asarray(tokens, np.int64)[:, None], self._cache, mask=mask)
        self.lengths = lengths
        return logits

    def leave(self, rows: Collection[int]) -> None:
        """Remove rows; the others move up, and padding that none of them needs is cut off."""
        keep = [row for row in range(len(self.lengths)) if row not in rows]
        lengths = self.lengths[keep]
        total = int(lengths.max(initial=0))
        if self._cache is not None:
            old, names = self._cache, self._model.cache.parts if keep else ()
            kept = {name: old.rows(name)[keep, old.length - total :] for name in names}
            self._cache = self._model.new_cache(kept) if keep else None
        self.lengths = lengths


def _stack(old: np.ndarray, new: np.ndarray, total: int) -> np.ndarray:
    """[n, a, heads, width] and [1, b, heads, width] as one [n + 1, total, heads, width], aligned at the end."""
    both = np.zeros((len(old) + 1, total, *old.shape[2:]), old.dtype)
    both[:-1, total - old.shape[1] :] = old
    both[-1:, total - new.shape[1] :] = new
    return both
