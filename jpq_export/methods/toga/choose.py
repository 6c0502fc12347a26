"""From trained logits to a plan of at most the budget's bytes: what stays, which rows are precise, how rows are stored.

All logits are shifted together until the exact bytes fit, so every budget is met by the same order of importance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from jpq_export.compress.cost import CostModel
from jpq_export.format.encoder_spec import Spec, is_table
from jpq_export.format.plan import Budget, Choice, LayerPlan, Plan, Predicted, Removal, RowBlock
from jpq_export.format.target import Target
from jpq_export.methods.toga.hypernetwork import BASE, Hypernetwork
from jpq_export.methods.toga.supernet import GROUP_SIZE, Widths, scheme_of
from jpq_export.numerics.scheme import Scheme, choose_group_size, levels

PAIRS = (Widths(1, 4), Widths(2, 4), Widths(4, 8))
TABLE_BITS = (4, 3, 2)  # of embedding and head, which have no mask
SHIFTS = 60  # halvings: logits are told apart to the last bit of a float32


@dataclass(frozen=True, slots=True)
class Frame:
    """What a budget fixes before any mask: the two precisions, the tables' width, and the range of linears' bytes."""

    widths: Widths
    table_bits: float
    low_bytes: int
    high_bytes: int
    rest_bytes: int

    def fraction(self, budget_bytes: int) -> float:
        """Size of the linears that the budget leaves room for, of the largest."""
        return min(1.0, max(0.05, (budget_bytes - self.rest_bytes) / self.high_bytes))


def frame(spec: Spec, target: Target, budget_bytes: int, given: tuple[float, ...] | None) -> Frame:
    """The first pair of widths (or the one that was `given`) and the widest tables whose range holds the budget.

    A budget below every range gets the last frame tried, and its answer, or refusal, comes from pruning.
    """
    pairs = PAIRS[1:] + PAIRS[:1] if given is None else (Widths(*given),)
    tried = [_frame(spec, target, pair, bits) for pair in pairs for bits in TABLE_BITS]
    for each in tried:
        if each.low_bytes + each.rest_bytes <= budget_bytes <= each.high_bytes + each.rest_bytes:
            return each
    fitting = [each for each in tried if each.high_bytes + each.rest_bytes <= budget_bytes]
    smallest = min(tried, key=lambda each: each.low_bytes + each.rest_bytes)
    return max(fitting, key=lambda each: each.high_bytes) if fitting else smallest


def _frame(spec: Spec, target: Target, widths: Widths, table_bits: float) -> Frame:
    matrices = spec.matrices()
    low, high = (
        sum(
            scheme_of(shape[1], bits, target).weight_bytes(*shape)
            for name, shape in matrices.items()
            if not is_table(name)
        )
        for bits in (widths.low, widths.high)
    )
    tables = sum(
        scheme_of(shape[1], table_bits, target).weight_bytes(*shape)
        for name, shape in matrices.items()
        if is_table(name)
    )
    return Frame(widths, table_bits, low, high, tables + 4 * sum(spec.vectors().values()))


@torch.no_grad()
def plan_for(
    network: Hypernetwork, cost: CostModel, budget: Budget, found: Frame, *, sha256: str, search: dict
) -> Plan:
    """The plan the network answers this budget with; BudgetError when not even its least one fits."""
    assert budget.bytes is not None
    logits = {name: (value + BASE).cpu() for name, value in network(found.fraction(budget.bytes)).items()}
    extent = 1 + max(float(value.abs().max()) for value in logits.values())
    low, high, best = -extent, extent, None
    for _ in range(SHIFTS):
        middle = (low + high) / 2
        plan = _plan(logits, middle, cost, budget, found, sha256, search)
        if plan.predicted.bytes <= budget.bytes:
            low, best = middle, plan
        else:
            high = middle
    if best is None:
        least = _plan(logits, -extent, cost, budget, found, sha256, search).predicted.bytes
        widths = f"{found.widths.low:g} and {found.widths.high:g} bits"
        raise budget.too_small(least, f"--method toga with {widths} needs at least")
    return best


def masks_of(plan: Plan, spec: Spec, widths: Widths) -> dict[str, Tensor]:
    """The masks that say what `plan` says, as the supernet takes them: float32, 1 = high precision, or kept."""
    masks: dict[str, Tensor] = {}
    for layer, whole in zip(plan.layers, spec.layers, strict=True):
        at = f"layers.{layer.index}"
        for name, kept, of in (
            (f"{at}.attn.heads", layer.kv_heads, whole.kv_heads),
            (f"{at}.mlp.channels", layer.kept_channels, whole.ffn),
        ):
            masks[name] = torch.zeros(of)
            masks[name][torch.tensor(kept, dtype=torch.long)] = 1
        for part, (rows, _) in spec.linear_shapes(layer.index).items():
            masks[f"{at}.{part}"] = torch.zeros(rows)
    for choice in plan.choices:
        if not is_table(choice.name):
            wide = torch.full((choice.rows,), float(choice.bits == widths.high))
            if choice.layout is not None:  # rows in the order of the kept ones, not of the blocks
                wide = torch.from_numpy(choice.layout.max_codes() == levels(widths.high) - 1).float()
            layer = plan.layers[int(choice.name.split(".")[1])]
            masks[choice.name][_kept(spec, layer, choice.name)] = wide
    return masks


def _plan(
    logits: Mapping[str, Tensor], shift: float, cost: CostModel, budget: Budget, found: Frame, sha256: str, search: dict
) -> Plan:
    spec, target = cost.spec, cost.target
    masks = {name: value + shift > 0 for name, value in logits.items()}
    layers = tuple(_layer(spec, i, logits, masks) for i in range(len(spec.layers)))
    narrow = spec.with_layers(
        tuple(
            type(old)(len(new.kv_heads), new.ffn, old.window, old.rope)
            for old, new in zip(spec.layers, layers, strict=True)
        )
    )
    choices = []
    for name, shape in narrow.matrices().items():
        if is_table(name):
            choices.append(_table(name, shape, scheme_of(shape[1], found.table_bits, target)))
        else:
            layer = layers[int(name.split(".")[1])]
            choices.append(_linear(name, shape, masks[name][_kept(spec, layer, name)], found.widths, target))
    size = sum(choice.bytes for choice in choices) + 4 * sum(narrow.vectors().values())
    predicted = Predicted(0.0, size, _latency(narrow, choices, cost), 0.0)
    removed = tuple(_removals(spec, layers))
    return Plan(
        spec.name, sha256, target.name, "toga", budget, layers, tuple(choices), removed, predicted, (), dict(search)
    )


def _layer(spec: Spec, i: int, logits: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> LayerPlan:
    """What stays of a layer; channels in an order that makes gate rows of one width contiguous, and up rows nearly."""
    whole, at = spec.layers[i], f"layers.{i}"
    heads = masks.get(f"{at}.attn.heads", torch.ones(whole.kv_heads, dtype=torch.bool))
    kept = torch.arange(whole.ffn)
    if f"{at}.mlp.channels" in masks:
        unit = choose_group_size(whole.ffn, GROUP_SIZE)  # a down projection of whole groups
        count = int(masks[f"{at}.mlp.channels"].sum()) // unit * unit
        kept = logits[f"{at}.mlp.channels"].argsort(descending=True, stable=True)[:count].sort().values
    if len(kept):
        gate, up = masks[f"{at}.mlp.gate"][kept], masks[f"{at}.mlp.up"][kept]
        place = torch.where(gate, torch.where(up, 1, 0), torch.where(up, 2, 3))  # up alone changes twice
        kept = kept[place.argsort(stable=True)]
    numbers = tuple(kept.tolist())
    named = None if numbers in ((), tuple(range(whole.ffn))) else numbers
    return LayerPlan(i, tuple(heads.nonzero()[:, 0].tolist()), whole.kv_heads, len(numbers), whole.ffn, named)


def _kept(spec: Spec, layer: LayerPlan, name: str) -> Tensor:
    """Output rows of a linear that stay, in their stored order but for the precision's."""
    part = name.rsplit(".", 1)[-1]
    if part in ("gate", "up"):
        return torch.tensor(layer.kept_channels, dtype=torch.long)
    if part in ("q", "k", "v"):
        width = spec.head_dim * (spec.heads_per_group if part == "q" else 1)
        return (torch.tensor(layer.kv_heads)[:, None] * width + torch.arange(width)).flatten()
    return torch.arange(spec.hidden)


def _table(name: str, shape: tuple[int, int], scheme: Scheme) -> Choice:
    size, zero = scheme.weight_bytes(*shape), scheme.integer_zero
    reason = "tables have no mask"
    return Choice(name, scheme.bits, scheme.group_size, scheme.symmetric, *shape, size, 0.0, reason, zero)


def _linear(name: str, shape: tuple[int, int], precise: Tensor, widths: Widths, target: Target) -> Choice:
    """A linear whose `precise` rows (bool [rows]) have the high width: sorted where the rows change it too often."""
    reason = f"{float(precise.float().mean()):.0%} of its rows at {widths.high:g} bits, the others at {widths.low:g}"
    runs = torch.unique_consecutive(precise, return_counts=True)
    order = None
    if len(runs[0]) > 3:
        order = tuple((~precise).to(torch.uint8).argsort(stable=True).tolist())
        runs = torch.tensor([True, False]), torch.tensor([int(precise.sum()), int((~precise).sum())])
    kinds = zip(*(part.tolist() for part in runs), strict=True)
    blocks = tuple(RowBlock(widths.high if high else widths.low, rows) for high, rows in kinds)
    scheme = scheme_of(shape[1], blocks[0].bits, target)
    if len(blocks) == 1:
        size, zero = scheme.weight_bytes(*shape), scheme.integer_zero
        return Choice(name, scheme.bits, scheme.group_size, scheme.symmetric, *shape, size, 0.0, reason, zero)
    mean = round(sum(block.bits * block.rows for block in blocks) / shape[0], 3)
    kind = (scheme.group_size, scheme.symmetric)
    choice = Choice(name, mean, *kind, *shape, 0, 0.0, reason, scheme.integer_zero, blocks, order)
    assert choice.layout is not None
    size = choice.layout.weight_bytes(shape[1])
    return Choice(name, mean, *kind, *shape, size, 0.0, reason, scheme.integer_zero, blocks, order)


def _latency(spec: Spec, choices: list[Choice], cost: CostModel) -> float:
    """Milliseconds of a token, from the target's data sheet."""
    time = cost.fixed()[1]
    for i, layer in enumerate(spec.layers):
        time += cost.attention_rest(i, layer.kv_heads)[1] + cost.mlp_rest(i, layer.ffn)[1]
    for choice in choices:
        if is_table(choice.name):
            time += cost.table(choice.name, choice.scheme)[1]
        else:
            time += cost.microseconds(choice.bytes, len(choice.blocks), choice.rows * choice.columns)
    return time / 1e3


def _removals(spec: Spec, layers: tuple[LayerPlan, ...]) -> list[Removal]:
    out = []
    for old, new in zip(spec.layers, layers, strict=True):
        for part, kept, of, what in (
            ("attn", len(new.kv_heads), old.kv_heads, "key/value heads"),
            ("mlp", new.ffn, old.ffn, "channels"),
        ):
            if kept < of:
                text = f"{of - kept} of {of} {what}, by the hypernetwork's mask"
                out.append(Removal(f"layers.{new.index}.{part}", 0.0, text))
    return out
