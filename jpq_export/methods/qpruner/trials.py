"""Trials of the Bayesian search: the pruned model with every layer at some width, quickly rounded and measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jpq_export.compress.decoder import Decoder
from jpq_export.compress.heldout import Heldout
from jpq_export.compress.rounding import Rounded, quantize_rows
from jpq_export.compress.statistics import Progress
from jpq_export.methods.qpruner.bayes import Levels
from jpq_export.methods.qpruner.importance import GROUP_SIZE
from jpq_export.methods.toga.supernet import input_moments
from jpq_export.numerics.scheme import choose_group_size, levels

MOMENT_TOKENS = 4096


class TrialModel:
    """The pruned model, its layers' linears rounded once at every width; a trial only puts them in place.

    By GPTQ on the unrounded model's inputs, with the tables as they are: rounded to nearest, a layer of SmolLM2-135M at
    2 bits costs so much that nothing else is seen. The chosen plan is rounded anew, on the compressed prefix.
    """

    def __init__(
        self, model: Decoder, ids: Tensor, widths: tuple[float, ...], heldout: Heldout, progress: Progress | None = None
    ) -> None:
        """`model` is changed; `ids` [n, length]: text whose second moments round the weights."""
        self.model, self.widths, self.heldout = model, widths, heldout
        self.rounded: list[dict[str, list[Rounded]]] = []
        moments = input_moments(model, ids[: max(1, MOMENT_TOKENS // ids.shape[1])])
        count = len(model.spec.layers)
        for i in range(count):
            names = [f"layers.{i}.{part}" for part in model.spec.linear_shapes(i)]
            self.rounded.append({name: self._round(name, moments.pop(name)) for name in names})
            if progress:
                progress(i + 1, count)
        self.now: list[int | None] = [None] * count

    def _round(self, name: str, H: Tensor) -> list[Rounded]:
        """One GPTQ over the rows once for each width."""
        W = self._linear(name).weight
        rows = len(W)
        top = torch.tensor([levels(bits) - 1.0 for bits in self.widths], device=W.device).repeat_interleave(rows)
        stack, size = W.repeat(len(self.widths), 1), choose_group_size(W.shape[1], GROUP_SIZE)
        both = quantize_rows(stack, H, top, size, symmetric=True, method="gptq", candidates=11)
        return [both.rows(slice(k * rows, (k + 1) * rows)) for k in range(len(self.widths))]

    def _linear(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def loss(self, combination: Levels) -> float:
        """KL to the teacher on held-out text, nats a token."""
        for i, level in enumerate(combination):
            if self.now[i] != level:
                for name, rounded in self.rounded[i].items():
                    self._linear(name).weight.data = rounded[level].dequantize()
                self.now[i] = level
        return self.heldout.kl_of(self.model)
