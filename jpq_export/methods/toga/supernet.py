"""The masked compressible supernet: the frozen decoder with w = m·Q_hi(w) + (1-m)·Q_lo(w) and pruning masks.

Masks by name: one value per output row of every linear ("layers.3.attn.q", 1 = high precision), one per key/value head
("layers.3.attn.heads") and one per MLP channel ("layers.3.mlp.channels"), 1 = kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from jpq_export.compress.activations import FLOAT_BITS, rounded_inputs, rounding_for
from jpq_export.compress.decoder import Decoder
from jpq_export.compress.rounding import quantize
from jpq_export.compress.statistics import add_moment
from jpq_export.format.encoder_spec import Spec
from jpq_export.format.target import Target
from jpq_export.methods.toga.hypernetwork import Masks
from jpq_export.numerics.row_blocks import RowLayout
from jpq_export.numerics.scheme import Scheme, choose_group_size

GROUP_SIZE = 64
# For GPTQ. Rounded to nearest, SmolLM2-135M with all rows at 2 bits has a loss of 14.8 nats, beyond chance (10.8): its
# masks would learn to survive an error that the export does not make.
MOMENT_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Widths:
    """The two precisions, in bits."""

    low: float
    high: float


def scheme_of(columns: int, bits: float, target: Target) -> Scheme:
    """Of a matrix with `columns` inputs, as the target stores it."""
    return target.fit(Scheme(bits, choose_group_size(columns, GROUP_SIZE)))


def structures(spec: Spec, *, prune: bool) -> list[dict[str, int]]:
    """How many masks of each name every layer has."""
    out = []
    for i, layer in enumerate(spec.layers):
        counts = {f"layers.{i}.{part}": rows for part, (rows, _) in spec.linear_shapes(i).items()}
        if prune and layer.kv_heads:
            counts[f"layers.{i}.attn.heads"] = layer.kv_heads
        if prune and layer.ffn:
            counts[f"layers.{i}.mlp.channels"] = layer.ffn
        out.append(counts)
    return out


class MaskedDecoder:
    """Teacher, its linears in both precisions, and the token batches it is trained on, `batch` sequences a step.

    `activation_bits`: what its linears read is rounded so; the weights' GPTQ sees unrounded inputs.
    """

    def __init__(
        self,
        model: Decoder,
        sequences: np.ndarray,
        widths: Widths,
        target: Target,
        *,
        batch: int = 2,
        activation_bits: float = FLOAT_BITS,
    ) -> None:
        self.model, self.batch = model, batch
        self.rounding = rounding_for(model, activation_bits, sequences)
        self.ids = torch.from_numpy(sequences).to(model.embed.weight.device)
        self.low: dict[str, Tensor] = {}
        self.difference: dict[str, Tensor] = {}  # high less low precision
        self.row_bytes: dict[str, tuple[int, int]] = {}  # in low and in high precision
        moments = input_moments(model, self.ids[: max(1, MOMENT_TOKENS // self.ids.shape[1])])
        for i in range(len(model.spec.layers)):
            for part, shape in model.spec.linear_shapes(i).items():
                if prod(shape):
                    name = f"layers.{i}.{part}"
                    self._add(name, moments.pop(name), widths, target)
        self.largest = sum(high * len(self.low[name]) for name, (_, high) in self.row_bytes.items())

    def _add(self, name: str, H: Tensor, widths: Widths, target: Target) -> None:
        """One linear in both precisions, by one GPTQ over its rows twice."""
        W = self.model.get_parameter(f"{name}.weight").detach()
        rows, columns = W.shape
        schemes = [scheme_of(columns, bits, target) for bits in (widths.low, widths.high)]
        layout = RowLayout(tuple((scheme, rows) for scheme in schemes))
        both = quantize(W.repeat(2, 1), H, layout, method="gptq").dequantize()
        self.low[name], self.difference[name] = both[:rows], both[rows:] - both[:rows]
        self.row_bytes[name] = (schemes[0].weight_bytes(1, columns), schemes[1].weight_bytes(1, columns))

    def loss(self, masks: Masks, step: int) -> Tensor:
        """Mean next-token cross entropy (nats) of the batch of this step."""
        picked = (torch.arange(self.batch) + step * self.batch) % len(self.ids)
        ids = self.ids[picked]
        with rounded_inputs(self.model, self.rounding):
            logits: Tensor = functional_call(self.model, self.weights(masks), (ids[:, :-1],))
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    def weights(self, masks: Masks) -> dict[str, Tensor]:
        """The mixed weight of every linear by parameter name, as `functional_call` takes them."""
        return {f"{name}.weight": self._weight(name, masks) for name in self.low}

    def _weight(self, name: str, masks: Masks) -> Tensor:
        """The mixed weight; a pruned head or channel is a zero column of the projection that reads it."""
        weight = self.low[name] + masks[name][:, None] * self.difference[name]
        columns = self._columns(name, masks)
        return weight if columns is None else weight * columns

    def size(self, masks: Masks) -> Tensor:
        """Bytes of all linears as stored, over those in high precision with nothing pruned."""
        total = torch.zeros(())
        for name, (low, high) in self.row_bytes.items():
            rows = low + masks[name] * (high - low)
            kept, columns = self._rows(name, masks), self._columns(name, masks)
            size = (rows if kept is None else rows * kept).sum()
            total = total + (size if columns is None else size * columns.mean())
        return total / self.largest

    def _rows(self, name: str, masks: Masks) -> Tensor | None:
        """1 for each output row that is kept."""
        layer, sub, part = name.rsplit(".", 2)
        if part in ("gate", "up"):
            return masks.get(f"{layer}.{sub}.channels")
        heads = masks.get(f"{layer}.attn.heads") if part in ("q", "k", "v") else None
        return None if heads is None else heads.repeat_interleave(len(masks[name]) // len(heads))

    def _columns(self, name: str, masks: Masks) -> Tensor | None:
        """1 for each input column that is kept."""
        layer, sub, part = name.rsplit(".", 2)
        if part == "down":
            return masks.get(f"{layer}.{sub}.channels")
        heads = masks.get(f"{layer}.attn.heads") if part == "o" else None
        return None if heads is None else heads.repeat_interleave(self.low[name].shape[1] // len(heads))


@torch.no_grad()
def input_moments(model: Decoder, ids: Tensor) -> dict[str, Tensor]:
    """The second moment of every linear's inputs, [K, K], summed over the tokens of `ids` [batch, seq]."""
    moments: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: add_moment(moments, name, inputs[0].flatten(0, -2).float())

    named = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in named if name != "head"]
    try:
        for part in ids.split(4):
            model.hidden(part, model.context(part))
    finally:
        for handle in handles:
            handle.remove()
    return moments
