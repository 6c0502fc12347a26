"""The PyTorch side: transformers' model as a parity runner, and as a source of logits for `evaluate_text`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jpq_export.evaluate.text_quality import LogitSource
from jpq_export.fallback.load import TracedModel
from jpq_export.fallback.trace import WithCache, empty_past
from jpq_export.parity.points import present_in
from jpq_export.parity.runners import Outcome, load_proto, position_ids

CHUNK = 256  # tokens of a text read at once: bounds the logits to 256 x vocabulary x 4 bytes


class TracedReference:
    """The model with the weights it has now; a parity runner as `parity.runners.TorchRunner`."""

    def __init__(self, loaded: TracedModel, graph: Path) -> None:
        """Let every module hand over what it computes that is a value of the ONNX file `graph` too."""
        self.spec, self.version = loaded.spec, torch.__version__
        self._wrapped = WithCache(loaded.model).eval()
        self._values: dict[str, np.ndarray] | None = None
        self._hooks = [
            loaded.model.get_submodule(name).register_forward_hook(lambda _m, _x, y, name=name: self._keep(name, y))
            for name in present_in(load_proto(graph).graph, loaded.spec)
            if name != "logits"
        ]

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()

    def _keep(self, name: str, value: Tensor) -> None:
        if self._values is not None and name not in self._values:  # the graph's point is the first use too
            self._values[name] = value.numpy().copy()  # Falcon adds to what a linear gave in place

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
    predictor = TracedPredictor(loaded)

    def logits(ids: np.ndarray, _size: int) -> Iterator[np.ndarray]:
        for part, _ in predictor.feed(np.asarray(ids, np.int64)[None], empty_past(loaded.spec, 1)):
            yield part[0]

    return logits


class TracedPredictor:
    """What multiple-choice scoring asks of a model; see `evaluate.predictors.Predictor`."""

    def __init__(self, loaded: TracedModel) -> None:
        """Read through the cache."""
        self._spec, self._wrapped = loaded.spec, WithCache(loaded.model).eval()

    def read(self, contexts: np.ndarray) -> tuple[np.ndarray, Any]:
        """Logits after the last token of contexts [batch, T], and their cache."""
        last, cache = np.empty(0), empty_past(self._spec, len(contexts))
        for logits, cache in self.feed(contexts, cache[:]):  # noqa: B007, B020 the last ones are what is wanted
            last = logits[:, -1].copy()
        return last, cache

    def go_on(self, cache: Any, rows: np.ndarray, ids: np.ndarray) -> Iterator[np.ndarray]:
        """Logits of `ids` [n, L] behind rows [n] of a cache, chunk by chunk."""
        taken = torch.from_numpy(rows)
        yield from (logits for logits, _ in self.feed(ids, [tensor[taken] for tensor in cache]))

    def feed(self, ids: np.ndarray, past: list[Tensor]) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
        """Logits [batch, l, vocab] of `ids` [batch, L] behind `past`, chunk by chunk, each with the cache after it."""
        for start in range(0, ids.shape[1], CHUNK):
            part = torch.from_numpy(ids[:, start : start + CHUNK])
            before = past[0].shape[2]
            after = before + part.shape[1]
            mask = torch.ones(len(ids), after, dtype=torch.long)
            with torch.no_grad():
                out, *past = self._wrapped(part, mask, torch.arange(before, after).repeat(len(ids), 1), past)
            yield out.numpy(), past
