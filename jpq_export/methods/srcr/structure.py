"""The structural pattern: which key/value heads and channels go, so that a given share of the layers' weights does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from jpq_export.compress.apply import LayerChoice
from jpq_export.format.spec import ModelSpec
from jpq_export.numerics.scheme import choose_group_size


@dataclass(frozen=True, slots=True)
class Unit:
    """What is removed as a whole: one key/value head with its query heads, or channels as many as a group is wide."""

    price: float  # nats a token, by the Fisher; see `Statistics.gates`
    weights: int
    layer: int
    sublayer: str
    members: tuple[int, ...]


def choose_structure(
    spec: ModelSpec, gates: Mapping[str, Tensor], share: float, *, group_size: int
) -> tuple[LayerChoice, ...]:
    """Remove the cheapest units for their size until `share` of the layers' weights is gone, as near as units allow.

    Every sub-layer keeps at least one unit: prices of single units say nothing about the last one.
    """
    units = sorted(_units(spec, gates, group_size), key=lambda u: (u.price / u.weights, u.layer, u.sublayer, u.members))
    gone: dict[tuple[int, str], set[int]] = {}
    left = {(u.layer, u.sublayer): 0 for u in units}
    for unit in units:
        left[unit.layer, unit.sublayer] += 1
    missing = share * layer_weights(spec)
    for unit in units:
        place = unit.layer, unit.sublayer
        if left[place] > 1 and abs(missing - unit.weights) < abs(missing):
            left[place] -= 1
            missing -= unit.weights
            gone.setdefault(place, set()).update(unit.members)
    return tuple(
        LayerChoice(_rest(layer.kv_heads, gone.get((i, "attn"))), _rest(layer.ffn, gone.get((i, "mlp"))))
        for i, layer in enumerate(spec.layers)
    )


def layer_weights(spec: ModelSpec) -> int:
    """Weights of all linears in the layers: what sparsity is a share of."""
    shapes = (shape for i in range(len(spec.layers)) for shape in spec.linear_shapes(i).values())
    return sum(rows * columns for rows, columns in shapes)


def _rest(count: int, gone: set[int] | None) -> tuple[int, ...]:
    return tuple(i for i in range(count) if i not in (gone or ()))


def _units(spec: ModelSpec, gates: Mapping[str, Tensor], group_size: int) -> list[Unit]:
    units = []
    for i, layer in enumerate(spec.layers):
        head = 2 * spec.hidden * spec.head_dim * (spec.heads_per_group + 1)  # its rows of q, k, v and columns of o
        for j in range(layer.kv_heads):
            units.append(Unit(float(gates[f"layers.{i}.attn"][1 + j]), head, i, "attn", (j,)))
        if layer.ffn:
            prices = gates[f"layers.{i}.mlp"][1:].tolist()
            order = sorted(range(layer.ffn), key=lambda c: (prices[c], c))
            step = choose_group_size(layer.ffn, group_size)
            for start in range(0, layer.ffn, step):
                members = tuple(order[start : start + step])
                price = sum(prices[c] for c in members)
                units.append(Unit(price, 3 * spec.hidden * len(members), i, "mlp", members))
    return units
