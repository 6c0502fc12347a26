"""The PyTorch side: transformers' model as a parity runner, and as a source of logits for `evaluate_text`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jpq_export.evaluate.text_quality import LogitSource
from jpq_export.fallback.load import TracedModel
from jpq_export.fallback.trace import WithCache, empty_past
from jpq_export.parity.runners import Outcome, position_ids

CHUNK = 256  # tokens of a text read at once: bounds the logits to 256 x vocabulary x 4 bytes


class TracedReference:
    """The model with the weights it has now; a parity runner as `parity.runners.TorchRunner`."""

    def __init__(self, loaded: TracedModel) -> None:
        """Let every module that has a matrix of its own hand over what it computes."""
        self.spec, self.version = loaded.spec, torch.__version__
        self._wrapped = WithCache(loaded.model).eval()
        self._values: dict[str, np.ndarray] | None = None
        self._hooks = [
            loaded.model.get_submodule(name).register_forward_hook(lambda _m, _x, y, name=name: self._keep(name, y))
            for name in loaded.spec.matrices()
        ]

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()

    def _keep(self, name: str, value: Tensor) -> None:
        if self._values is not None and name not in self._values:  # the graph's point is the first use too
            self._values[name] = value.numpy()

    def forward(
        self,
        ids: np.ndarray,
        *,
        mask: np.ndarray | None = None,
        cache: Any = None,
        values: bool = False,
        given: Mapping[str, np.ndarray] | None = None,
    ) -> Outcome:
        """One pass: `ids` int64 [batch, seq]; `mask` int64 [batch, past + seq]; `cache`: an earlier outcome's.

        `values` asks for the values of all points. `given` is for an int8 cache, which there is none of: ValueError.
        """
        if given:
            raise ValueError("given: a traced model keeps a float cache only")
        past = empty_past(self.spec, len(ids)) if cache is None else cache
        before = past[0].shape[2]
        mask = np.ones((len(ids), before + ids.shape[1]), np.int64) if mask is None else mask
        self._values = {} if values else None
        with torch.no_grad():
            positions = torch.from_numpy(position_ids(mask, before))
            logits, *past = self._wrapped(torch.from_numpy(ids), torch.from_numpy(mask), positions, past)
        kept, self._values = self._values, None
        found = {}
        if kept is not None:
            found = {name: value.reshape(*ids.shape, -1) for name, value in kept.items()} | {"logits": logits.numpy()}
        return Outcome(logits.numpy(), past, found)


def logit_source(loaded: TracedModel) -> LogitSource:
    """The model on one text, chunk by chunk through its cache."""
    runner = WithCache(loaded.model).eval()

    def logits(ids: np.ndarray, _size: int) -> Iterator[np.ndarray]:
        past = empty_past(loaded.spec, 1)
        row = torch.from_numpy(np.asarray(ids, np.int64))[None]
        for start in range(0, row.shape[1], CHUNK):
            part = row[:, start : start + CHUNK]
            end = start + part.shape[1]
            with torch.no_grad():
                out, *past = runner(part, torch.ones(1, end, dtype=torch.long), torch.arange(start, end)[None], past)
            yield out[0].numpy()

    return logits
