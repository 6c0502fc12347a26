"""What a budget leaves to choose, the bits to start from, and the plan of a chosen combination."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

from jpq_export.compress.apply import LayerChoice
from jpq_export.compress.cost import CostModel
from jpq_export.format.encoder_spec import Spec, is_table
from jpq_export.format.plan import Budget, Choice, FrontPoint, LayerPlan, Plan, Predicted, Removal
from jpq_export.methods.qpruner.adapters import adapter_bytes
from jpq_export.methods.qpruner.bayes import Levels, Space, Trial, best, pareto
from jpq_export.methods.qpruner.importance import GROUP_SIZE
from jpq_export.numerics.scheme import Scheme, choose_group_size


@dataclass(frozen=True, slots=True)
class Frame:
    """The model as pruned, the widths a layer may have (rising), the tables' width, and how much was pruned.

    `rank`: of the low-rank branch beside every linear, 0 without.
    """

    spec: Spec
    kept: tuple[LayerChoice, ...]
    widths: tuple[float, ...]
    table_bits: float
    rate: float
    cost: CostModel
    rank: int = 0

    def scheme(self, columns: int, bits: float) -> Scheme:
        """Of a matrix with `columns` inputs, as the target stores it."""
        return self.cost.target.fit(Scheme(bits, choose_group_size(columns, GROUP_SIZE)))

    def stored_bytes(self, shape: tuple[int, int], bits: float) -> int:
        """Of a matrix [rows, columns]."""
        return self.cost.target.stored_bytes(self.scheme(shape[1], bits), *shape)

    def space(self, cap: int, order: Sequence[int]) -> Space:
        """All combinations of widths; `order`: layers, the one that is lowered first in front."""
        rows = []
        for i in range(len(self.spec.layers)):
            shapes = self.spec.linear_shapes(i).values()
            rows.append(tuple(sum(self.stored_bytes(shape, bits) for shape in shapes) for bits in self.widths))
        tables = sum(self.stored_bytes(s, self.table_bits) for n, s in self.spec.matrices().items() if is_table(n))
        fixed = tables + 4 * sum(self.spec.vectors().values()) + adapter_bytes(self.spec, self.rank)
        return Space(tuple(rows), fixed, cap, tuple(order))


def narrowed(spec: Spec, kept: tuple[LayerChoice, ...]) -> Spec:
    """The spec of the pruned model."""
    return spec.with_layers(
        tuple(
            type(old)(len(new.kv_heads), len(new.channels), old.window, old.rope)
            for old, new in zip(spec.layers, kept, strict=True)
        )
    )


def frame(
    cost: CostModel,
    kept: dict[float, tuple[LayerChoice, ...]],
    widths: tuple[float, ...],
    budget: Budget,
    *,
    rank: int = 0,
    method: str = "qpruner",
) -> Frame:
    """The least pruning, of `kept` by rate, and then the widest tables, that leave layers room below the budget.

    Tables take a width when all layers fit at the next lower one, so that neither starves the other.

    Raises:
        BudgetError: the lowest width everywhere is too much at every rate.
    """
    assert budget.bytes is not None
    least = 0
    for rate, each in sorted(kept.items()):
        spec = narrowed(cost.spec, each)
        for level in range(len(widths) - 1, -1, -1):
            found = Frame(spec, each, widths, widths[level], rate, cost, rank)
            least = found.space(budget.bytes, ()).bytes((max(level - 1, 0),) * len(spec.layers))
            if least <= budget.bytes:
                return found
    why = f"--method {method} with {widths[0]:g} bits everywhere and {max(kept):.0%} removed needs at least"
    raise budget.too_small(least, why)


def by_information(space: Space, widths: tuple[float, ...], information: Sequence[float]) -> Levels:
    """Bits by rank: the more mutual information a layer has with the prediction, the wider it is.

    Of all such allocations that fit, the one with the least Σ information · 4^-bits, the error of a uniform quantizer.
    """
    ranked = sorted(range(len(information)), key=lambda i: (-information[i], i))
    fitting: list[tuple[float, Levels]] = []
    for ends in combinations_with_replacement(range(len(ranked) + 1), len(widths) - 1):
        levels = [sum(place < end for end in ends) for place in range(len(ranked))]  # wide first
        by_layer = dict(zip(ranked, levels, strict=True))
        combination = tuple(by_layer[i] for i in range(len(ranked)))
        if space.bytes(combination) <= space.cap:
            error = sum(information[i] * 4.0 ** -widths[level] for i, level in enumerate(combination))
            fitting.append((error, combination))
    return min(fitting)[1]


def plan_of(
    found: Frame, space: Space, trials: Sequence[Trial], budget: Budget, *, sha256: str, search: dict[str, Any]
) -> Plan:
    """The plan of the best trial; all of them go along in `search`."""
    chosen, teacher = best(trials), found.cost.spec
    bits = [found.widths[level] for level in chosen.levels]
    front = tuple(
        FrontPoint(t.bytes, t.bytes * 8 / teacher.parameters(), _latency(found, t.levels), t.loss)
        for t in pareto(trials)
    )
    listed = [{"bits": [found.widths[level] for level in t.levels], "bytes": t.bytes, "kl": t.loss} for t in trials]
    search = search | {"trials": listed, "measured_kl_before_recovery": chosen.loss, "rate": found.rate}
    predicted = Predicted(chosen.loss, space.bytes(chosen.levels), _latency(found, chosen.levels), 0.0)
    return Plan(
        teacher.name,
        sha256,
        found.cost.target.name,
        "qpruner",
        budget,
        tuple(_layers(teacher, found.kept)),
        tuple(_choices(found, bits, _reasons(search["information"]))),
        tuple(_removals(teacher, found.kept)),
        predicted,
        front,
        search,
        found.rank,
    )


def uniform_plan_of(
    found: Frame, budget: Budget, *, sha256: str, method: str, reason: str, search: dict[str, Any]
) -> Plan:
    """The plan of the pruned model at the one width of the frame."""
    teacher, count = found.cost.spec, len(found.spec.layers)
    bits, size = [found.widths[0]] * count, found.space(budget.bytes or 0, ()).bytes((0,) * count)
    return Plan(
        teacher.name,
        sha256,
        found.cost.target.name,
        method,
        budget,
        tuple(_layers(teacher, found.kept)),
        tuple(_choices(found, bits, [reason] * count)),
        tuple(_removals(teacher, found.kept)),
        Predicted(0.0, size, _latency(found, (0,) * count), 0.0),
        (),
        search,
    )


def _reasons(information: Sequence[float]) -> list[str]:
    return [f"of its layer, by the search; {nats:.2g} nats of information on the prediction" for nats in information]


def _layers(teacher: Spec, kept: tuple[LayerChoice, ...]) -> list[LayerPlan]:
    out = []
    for i, (old, new) in enumerate(zip(teacher.layers, kept, strict=True)):
        named = None if len(new.channels) in (0, old.ffn) else new.channels
        out.append(LayerPlan(i, new.kv_heads, old.kv_heads, len(new.channels), old.ffn, named))
    return out


def _choices(found: Frame, bits: Sequence[float], reasons: Sequence[str]) -> list[Choice]:
    """`bits`, `reasons`: by layer."""
    out = []
    for name, shape in found.spec.matrices().items():
        if is_table(name):
            width, reason = found.table_bits, "tables are not part of the search"
        else:
            i = int(name.split(".")[1])
            width, reason = bits[i], reasons[i]
        s = found.scheme(shape[1], width)
        kind = s.bits, s.group_size, s.symmetric, *shape, s.weight_bytes(*shape), 0.0
        out.append(Choice(name, *kind, reason, s.integer_zero))
    return out


def _removals(teacher: Spec, kept: tuple[LayerChoice, ...]) -> list[Removal]:
    out = []
    for i, (old, new) in enumerate(zip(teacher.layers, kept, strict=True)):
        for part, count, of, what in (
            ("attn", len(new.kv_heads), old.kv_heads, "key/value heads"),
            ("mlp", len(new.channels), old.ffn, "channels"),
        ):
            if count < of:
                text = f"{of - count} of {of} {what}, the least important by their Taylor series"
                out.append(Removal(f"layers.{i}.{part}", 0.0, text))
    return out


def _latency(found: Frame, levels: Levels) -> float:
    """Milliseconds of a token, from the target's data sheet."""
    cost, spec = found.cost, found.spec
    time = cost.fixed()[1]
    for i, layer in enumerate(spec.layers):
        time += cost.attention_rest(i, layer.kv_heads)[1] + cost.mlp_rest(i, layer.ffn)[1]
        for shape in spec.linear_shapes(i).values():
            time += cost.matrix(*shape, found.scheme(shape[1], found.widths[levels[i]]))[1]
    for name, (_, columns) in spec.matrices().items():
        if is_table(name):
            time += cost.table(name, found.scheme(columns, found.table_bits))[1]
    return time / 1e3
