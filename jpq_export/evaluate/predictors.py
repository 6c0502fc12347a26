"""A model as what multiple-choice scoring asks of it: read contexts once, then go on from them with every answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

CHUNK_VALUES = 2**24  # logits that exist at once, as in text_quality


class Predictor(Protocol):
    """Both runtimes have one."""

    def read(self, contexts: np.ndarray) -> tuple[np.ndarray, Any]:
        """Contexts int64 [batch, T] -> (logits after the last token, float32 [batch, vocab], their cache)."""
        ...

    def go_on(self, cache: Any, rows: np.ndarray, ids: np.ndarray) -> Iterator[np.ndarray]:
        """Continue rows `rows` [n] of a cache with `ids` int64 [n, L]: logits [n, l, vocab], chunk by chunk in order.

        A cache may be gone on from several times. Rows shorter than L are filled up on the right: attention is causal,
        so what is filled up changes no logits before it.
        """
        ...


class TorchPredictor:
    """A Decoder; `fast` runs its layers in the fast type of the machine, as comparisons do (see `Remembered`)."""

    def __init__(self, model: Any, *, fast: bool = False) -> None:
        self._model, self._fast = model, fast
        self._device = next(model.parameters()).device

    def read(self, contexts: np.ndarray) -> tuple[np.ndarray, Any]:
        """See `Predictor`."""
        import torch

        from jpq_export.compress.decoder import KVCache

        cache = KVCache()
        with torch.no_grad():
            last = self._hidden(contexts, cache)[:, -1]
            return self._model.logits(last).float().cpu().numpy(), cache

    def go_on(self, cache: Any, rows: np.ndarray, ids: np.ndarray) -> Iterator[np.ndarray]:
        """See `Predictor`."""
        import torch

        from jpq_export.compress.decoder import KVCache

        mine, taken = KVCache(), torch.from_numpy(rows).to(self._device)
        mine.layers = {i: (key[taken], value[taken]) for i, (key, value) in cache.layers.items()}
        with torch.no_grad():
            hidden = self._hidden(ids, mine)
        for part in hidden.split(_columns(len(ids), self._model.spec.vocab), 1):
            with torch.no_grad():  # left before each yield, so that it never outlives this generator
                values = self._model.logits(part).float().cpu().numpy()
            yield values

    def _hidden(self, ids: np.ndarray, cache: Any) -> Any:
        import torch

        from jpq_export.compress.precision import autocast

        batch = torch.from_numpy(ids).to(self._device)
        if not self._fast:
            return self._model.hidden(batch, self._model.context(batch, cache=cache))
        with autocast(self._device):
            return self._model.hidden(batch, self._model.context(batch, cache=cache)).float()


class OrtPredictor:
    """A bundle's `OrtModel`. Its graph gives logits of every position, so long inputs are fed a piece at a time."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def read(self, contexts: np.ndarray) -> tuple[np.ndarray, Any]:
        """See `Predictor`."""
        last, past = None, None
        for logits, past in self._feed(contexts, None):  # noqa: B007 the last ones are what is wanted
            last = logits[:, -1].copy()  # a view would keep every position
        assert last is not None
        return last, past

    def go_on(self, cache: Any, rows: np.ndarray, ids: np.ndarray) -> Iterator[np.ndarray]:
        """See `Predictor`."""
        layout = self._model.cache
        mine = {name: np.ascontiguousarray(layout.rows(layout.rows(value)[rows])) for name, value in cache.items()}
        for logits, _ in self._feed(ids, mine):
            yield logits

    def _feed(self, ids: np.ndarray, past: Any) -> Iterator[tuple[np.ndarray, Any]]:
        size = _columns(len(ids), self._model.spec.vocab)
        for start in range(0, ids.shape[1], size):
            out = self._model.forward(ids[:, start : start + size], past=past)
            past = out.past
            yield out.logits, past


def _columns(rows: int, vocab: int) -> int:
    """Positions whose logits may exist at once."""
    return max(1, CHUNK_VALUES // (rows * vocab))
