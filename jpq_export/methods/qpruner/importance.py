"""Taylor importance of dependency groups, and which of them go (QPruner; before it LLM-Pruner, Ma et al., 2023).

A group is what falls together when one unit goes: a key/value head with its query heads and their columns of the output
projection, or an MLP channel with its gate and up rows and its down column. With its output scaled by a factor α the
language-model loss is L(α), and removing it changes the loss by

    L(0) - L(1) = -L'(1) + L''(1) / 2 - ...,   L'(1) = d = Σ over tokens of a · dL/da

with a what the output projection reads of the unit, and the Hessian L'' estimated by the empirical Fisher, d² summed
over sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jpq_export.compress.apply import LayerChoice
from jpq_export.compress.decoder import Decoder
from jpq_export.compress.statistics import Progress, hidden_from
from jpq_export.format.spec import ModelSpec
from jpq_export.numerics.scheme import choose_group_size

GROUP_SIZE = 64
PIECE = 128  # tokens of a sequence here: more, shorter ones give the Fisher more samples for the same time
BATCH = 4
ORDERS = (1, 2)


@dataclass(frozen=True, slots=True, eq=False)
class Derivatives:
    """Sums over sequences, by "layers.{i}.attn" [kv_heads] and "layers.{i}.mlp" [ffn]; `tokens` were predicted.

    first: of dL/dα; second: of its square. L in nats, summed over the tokens of a sequence.
    """

    first: dict[str, Tensor]
    second: dict[str, Tensor]
    tokens: int

    def change(self, order: int) -> dict[str, Tensor]:
        """Loss change, nats a token, that the series up to `order` predicts of removing each unit."""
        out = {name: -d / self.tokens for name, d in self.first.items()}
        if order == 2:
            out = {name: value + self.second[name] / (2 * self.tokens) for name, value in out.items()}
        return out

    def importance(self, order: int) -> dict[str, Tensor]:
        """Size of the change: what the published methods rank by."""
        return {name: value.abs() for name, value in self.change(order).items()}


def derivatives(model: Decoder, sequences: np.ndarray, *, progress: Progress | None = None) -> Derivatives:
    """One backward pass over all of `sequences`: int64 [n, length], cut into pieces."""
    length = min(PIECE, sequences.shape[1])
    pieces = sequences[:, : sequences.shape[1] // length * length].reshape(-1, length)
    found = Derivatives({}, {}, len(pieces) * (length - 1))
    handles = []
    for i, layer in enumerate(model.layers):
        for sub, last, units in (
            (layer.attn, "o", model.spec.layers[i].kv_heads),
            (layer.mlp, "down", model.spec.layers[i].ffn),
        ):
            if sub is not None:
                name = f"layers.{i}.{'attn' if last == 'o' else 'mlp'}"
                handles.append(getattr(sub, last).register_forward_pre_hook(_watch(found, name, units)))
    try:
        for start in range(0, len(pieces), BATCH):
            _backward(model, torch.from_numpy(pieces[start : start + BATCH]).to(model.embed.weight.device))
            if progress:
                progress(min(start + BATCH, len(pieces)), len(pieces))
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.enable_grad()
def _backward(model: Decoder, ids: Tensor) -> None:
    """Of the summed next-token loss; only activations have gradients."""
    start = model.embed_tokens(ids).detach().requires_grad_(True)
    logits = model.logits(hidden_from(model, start, ids)[:, :-1])
    F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").backward()


def _watch(found: Derivatives, name: str, units: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        value = inputs[0]
        kept = value.detach()

        def on_gradient(gradient: Tensor) -> None:
            product = (kept.float() * gradient.float()).sum(1)  # [batch, features]
            slope = product.view(len(product), units, -1).sum(-1).double().cpu()  # [batch, units]
            for sums, values in ((found.first, slope), (found.second, slope.square())):
                sums[name] = sums.get(name, torch.zeros(units, dtype=torch.float64)) + values.sum(0)

        value.register_hook(on_gradient)

    return hook


def keep(spec: ModelSpec, importance: dict[str, Tensor], rate: float) -> tuple[LayerChoice, ...]:
    """What stays when `rate` of all key/value heads and of all channels go, the least important of the whole model.

    Channels go in whole groups of the down projection. Every sub-layer keeps one unit.
    """
    attn, mlp = ([f"layers.{i}.{sub}" for i in range(len(spec.layers))] for sub in ("attn", "mlp"))
    heads = _kept_units(importance, attn, lambda _: 1, rate)
    channels = _kept_units(importance, mlp, lambda units: choose_group_size(units, GROUP_SIZE), rate)
    return tuple(LayerChoice(h, c) for h, c in zip(heads, channels, strict=True))


def _kept_units(
    importance: dict[str, Tensor], names: list[str], step: Callable[[int], int], rate: float
) -> list[tuple[int, ...]]:
    """Units that stay, by layer; blocks of `step` units go in order of rising importance a unit."""
    blocks: list[tuple[float, int, int]] = []  # importance of a unit, layer, units
    orders: list[list[int]] = []
    for i, name in enumerate(names):
        values = importance.get(name, torch.zeros(0, dtype=torch.float64))
        order = values.argsort(stable=True)
        size = step(len(order)) if len(order) else 1
        orders.append(order.tolist())
        for start in range(0, len(order) - size, size):  # without the last block, which stays
            blocks.append((float(values[order[start : start + size]].mean()), i, size))
    gone, left = [0] * len(names), rate * sum(map(len, orders))
    for _, i, size in sorted(blocks):
        if size <= left + size / 2:
            gone[i] += size
            left -= size
    return [tuple(sorted(order[count:])) for order, count in zip(orders, gone, strict=True)]
