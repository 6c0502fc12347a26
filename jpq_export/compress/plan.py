"""From the price list to a plan: budgets, the search at its best knobs, uniform baselines, and the reasons in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from jpq_export.compress.cost import CostModel
from jpq_export.compress.prices import PriceList, StructurePrice, ffn_step
from jpq_export.compress.refine import bits_of, layer_choices
from jpq_export.compress.search import Class, Knobs, Solution, build_classes, front, solve, start_knobs
from jpq_export.errors import BudgetError
from jpq_export.format.encoder_spec import Spec, is_table
from jpq_export.format.plan import Budget, Choice, FrontPoint, LayerPlan, Plan, Predicted, Removal
from jpq_export.format.target import Target
from jpq_export.format.wording import wording
from jpq_export.numerics.scheme import ALL_WIDTHS, BIT_WIDTHS, Scheme, choose_group_size

GROUP_SIZES = (32, 64, 128)
UNIFORM = "uniform width, no search"


@dataclass(frozen=True, slots=True)
class BudgetRequest:
    """What the user asked for; `value` in bytes, bits per weight, fraction of fp16, or milliseconds."""

    kind: Literal["size", "bits", "ratio", "latency"]
    value: float

    def resolve(self, spec: Spec) -> Budget:
        """Bytes or milliseconds for this model."""
        if self.kind == "latency":
            return Budget("latency", self.value, None, self.value)
        per_unit = {"size": 1.0, "bits": spec.parameters() / 8, "ratio": spec.parameters() * 2.0}
        return Budget(self.kind, self.value, int(self.value * per_unit[self.kind]))


@dataclass(frozen=True, slots=True)
class Problem:
    """One budgeted search: prices, the target's costs, which widths and whether pruning may be used."""

    prices: PriceList
    cost: CostModel
    budget: Budget
    bits: tuple[float, ...] = BIT_WIDTHS

    @property
    def by(self) -> str:
        """The budgeted cost."""
        return "microseconds" if self.budget.bytes is None else "bytes"

    def solve(self, knobs: Knobs) -> Solution:
        """Exact solution at these knobs."""
        size, time = self.cost.fixed()
        classes = self.classes(knobs)
        return solve(classes, self.budget, fixed=time if self.budget.bytes is None else size)

    def classes(self, knobs: Knobs) -> list[Class]:
        """All classes at these knobs."""
        return build_classes(self.prices, self.cost, by=self.by, knobs=knobs, bits=self.bits)


def make_plan(problem: Problem, solution: Solution, knobs: Knobs, *, sha256: str, method: str, measured: dict) -> Plan:
    """The plan record of a solution, with the front it lies on."""
    prices, cost = problem.prices, problem.cost
    spec, classes = prices.spec, problem.classes(knobs)
    choices = layer_choices(prices, solution)
    layers = tuple(
        LayerPlan(
            i,
            choice.kv_heads,
            layer.kv_heads,
            len(choice.channels),
            layer.ffn,
            None if len(choice.channels) in (0, layer.ffn) else choice.channels,
        )
        for i, (layer, choice) in enumerate(zip(spec.layers, choices, strict=True))
    )
    fixed_bytes, fixed_time = cost.fixed()
    points = front(classes, by=problem.by, fixed_bytes=fixed_bytes, fixed_microseconds=fixed_time)
    parameters = spec.parameters()
    return Plan(
        model_name=spec.name,
        model_sha256=sha256,
        target=cost.target.name,
        method=method,
        budget=problem.budget,
        layers=layers,
        choices=_choices(problem, solution, layers),
        removed=_removals(problem, solution),
        predicted=Predicted(
            solution.price,
            solution.bytes + fixed_bytes,
            (solution.microseconds + fixed_time) / 1e3,
            solution.gap,
        ),
        front=tuple(FrontPoint(p.bytes, p.bytes * 8 / parameters, p.microseconds / 1e3, p.price) for p in points),
        search=measured,
    )


def unpriced(spec: Spec, group_size: int) -> PriceList:
    """Everything is free: a problem with these prices says whether a budget can be met before anything is measured."""
    structures = {}
    for i, layer in enumerate(spec.layers):
        for sub, units, step in (("attn", layer.kv_heads, 1), ("mlp", layer.ffn, ffn_step(layer.ffn, group_size))):
            if units:
                structures[f"layers.{i}.{sub}"] = StructurePrice(tuple(range(units)), (0.0,) * (units + 1), step)
    matrices: dict[str, dict[float, float]] = {name: dict.fromkeys(ALL_WIDTHS, 0.0) for name in spec.matrices()}
    return PriceList(spec, group_size, matrices, structures)


def contrast(problem: Problem, solution: Solution, knobs: Knobs) -> list[dict[str, Any]]:
    """This plan beside the one that the other kind of budget would have bought: as many bytes, or as much time."""
    size, time = problem.cost.fixed()
    here = {"bytes": solution.bytes + size, "latency_ms": (solution.microseconds + time) / 1e3}
    if problem.by == "bytes":
        budget = Budget("latency", here["latency_ms"], None, here["latency_ms"] * (1 + 1e-9))
    else:
        budget = Budget("size", here["bytes"], int(here["bytes"]))
    if not math.isfinite(knobs.removal):
        knobs = replace(knobs, removal=1.0)
    other = replace(problem, budget=budget)
    pairs = ((problem, solution), (other, other.solve(knobs)))
    return [{"chosen_by": each.by} | _shape(each, picked) for each, picked in pairs]


def _shape(problem: Problem, solution: Solution) -> dict[str, Any]:
    size, time = problem.cost.fixed()
    structures = problem.prices.structures

    def removed(sub: str) -> int:
        return sum(solution.picks[name].kept == 0 for name in structures if name.endswith(sub))

    kept = {
        sub: sum(solution.picks[name].kept for name in structures if name.endswith(sub))
        / max(1, sum(len(s.order) for name, s in structures.items() if name.endswith(sub)))
        for sub in ("attn", "mlp")
    }
    shapes = problem.prices.spec.matrices()
    sizes = {name: shapes[name][0] * shapes[name][1] for name in bits_of(solution)}  # before narrowing
    return {
        "bytes": solution.bytes + size,
        "latency_ms": (solution.microseconds + time) / 1e3,
        "predicted_kl": solution.price,
        "attention_removed": removed("attn"),
        "mlp_removed": removed("mlp"),
        "heads_kept": kept["attn"],
        "channels_kept": kept["mlp"],
        "mean_bits": sum(bits * sizes[name] for name, bits in bits_of(solution).items()) / sum(sizes.values()),
    }


def _choices(problem: Problem, solution: Solution, layers: tuple[LayerPlan, ...]) -> tuple[Choice, ...]:
    prices = problem.prices
    fresh = prices.spec.with_layers(
        tuple(
            type(old)(len(new.kv_heads), new.ffn, old.window, old.rope)
            for old, new in zip(prices.spec.layers, layers, strict=True)
        )
    )
    chosen = bits_of(solution)
    full = prices.spec.matrices()
    out = []
    for name, (rows, columns) in fresh.matrices().items():
        scheme = problem.cost.target.fit(prices.scheme(columns, chosen[name]))
        share = rows * columns / (full[name][0] * full[name][1])
        price = prices.matrices[name][scheme.bits] * share
        reason = _reason(problem, solution, name, scheme, rows, columns, share)
        size = scheme.weight_bytes(rows, columns)
        kind = scheme.symmetric, rows, columns, size, price, reason, scheme.integer_zero
        out.append(Choice(name, scheme.bits, scheme.group_size, *kind, normal=scheme.normal))
    return tuple(out)


def _reason(
    problem: Problem, solution: Solution, name: str, scheme: Scheme, rows: int, columns: int, share: float
) -> str:
    """What one step up would save and one step down would cost, against the going rate of the budget."""
    prices, cost = problem.prices.matrices[name], problem.cost
    unit, amount = "MB" if problem.by == "bytes" else "ms", wording(problem.prices.spec).amount
    scale = 1e6 if problem.by == "bytes" else 1e3
    at = 0 if problem.by == "bytes" else 1
    here = cost.matrix(rows, columns, scheme)[at]
    steps = []
    widths = sorted(prices)
    position = widths.index(scheme.bits)
    for other, word in ((position + 1, "saves"), (position - 1, "adds")):
        if 0 <= other < len(widths):
            bits = widths[other]
            extra = abs(cost.matrix(rows, columns, problem.prices.scheme(columns, bits))[at] - here)
            change = abs(prices[bits] - prices[scheme.bits]) * share
            if extra > 0:
                steps.append(f"{bits} bits {word} {change:.2g} {amount} ({change / extra * scale:.3g}/{unit})")
    rate = f"budget trades at {solution.multiplier * scale:.3g} {amount}/{unit}"
    return "; ".join([*steps, rate])


def _removals(problem: Problem, solution: Solution) -> tuple[Removal, ...]:
    scale, unit = (1e6, "MB") if problem.by == "bytes" else (1e3, "ms")
    amount, out = wording(problem.prices.spec).amount, []
    for name, option in solution.picks.items():
        structure = problem.prices.structures.get(name)
        if structure is None or option.kept == len(structure.order):
            continue
        units = len(structure.order)
        what = "key/value heads" if name.endswith("attn") else "channels"
        price = structure.removal[units - option.kept]
        text = (
            "the whole sub-layer"
            if option.kept == 0
            else f"{units - option.kept} of {units} {what}, the least important"
        )
        rate = f"{solution.multiplier * scale:.3g} {amount}/{unit}"
        reason = f"{text}: costs {price:.2g} {amount}, less than the same room is worth at {rate}"
        out.append(Removal(name, price, reason))
    return tuple(out)


def check_reachable(
    spec: Spec, cost: CostModel, budget: Budget, widths: tuple[float, ...], *, group_size: int, prune: bool
) -> None:
    """BudgetError when no plan fits, before any price is known."""
    Problem(unpriced(spec, group_size), cost, budget, widths).solve(start_knobs(prune=prune))


def uniform_plan(
    spec: Spec,
    cost: CostModel,
    budget: Budget,
    *,
    sha256: str,
    method: str,
    widths: tuple[float, ...] = BIT_WIDTHS,
) -> Plan:
    """The plain baseline: one of `widths` for every linear, the widest that fits, and one for embedding and head.

    Tables and group sizes (of linears, of tables) take what room is left.
    """
    if budget.bytes is None:
        raise BudgetError(
            f"--method {method} has one width for all and takes a byte budget; give --size, --bits or --ratio"
        )
    best: tuple | None = None
    for linear, table, *groups in product(widths, widths, GROUP_SIZES, GROUP_SIZES):
        schemes = _uniform_schemes(spec, cost.target, (linear, groups[0]), (table, groups[1]))
        size = uniform_bytes(spec, schemes, target=cost.target)
        rank = linear, size, table  # equal bytes: a target may store several widths alike
        if size <= budget.bytes and table >= linear and (best is None or rank > best[0]):
            best = rank, schemes
    if best is None:
        least = (min(widths), 128)
        smallest = uniform_bytes(spec, _uniform_schemes(spec, cost.target, least, least), target=cost.target)
        raise budget.too_small(smallest, f"--method {method} needs at least")
    schemes = best[1]
    layers = tuple(
        LayerPlan(i, tuple(range(layer.kv_heads)), layer.kv_heads, layer.ffn, layer.ffn)
        for i, layer in enumerate(spec.layers)
    )
    choices = tuple(
        Choice(name, s.bits, s.group_size, s.symmetric, *shape, s.weight_bytes(*shape), 0.0, UNIFORM, s.integer_zero)
        for (name, shape), s in zip(spec.matrices().items(), schemes.values(), strict=True)
    )
    size = uniform_bytes(spec, schemes, target=cost.target)
    time = cost.fixed()[1] + sum(cost.table(n, schemes[n])[1] for n in filter(is_table, schemes))
    for i, layer in enumerate(spec.layers):
        time += cost.attention_rest(i, layer.kv_heads)[1] + cost.mlp_rest(i, layer.ffn)[1]
        time += sum(cost.matrix(*shape, schemes[f"layers.{i}.{n}"])[1] for n, shape in spec.linear_shapes(i).items())
    predicted = Predicted(0.0, size, time / 1e3, 0.0)
    return Plan(spec.name, sha256, cost.target.name, method, budget, layers, choices, (), predicted, (), {})


def _uniform_schemes(
    spec: Spec, target: Target, linear: tuple[float, int], table: tuple[float, int]
) -> dict[str, Scheme]:
    """`linear` and `table`: bits and group size of the linears and of embedding and head.

    Two or three levels need the zero between them: a stored one would spend a level on one side.
    """
    out = {}
    for name, (_, columns) in spec.matrices().items():
        bits, group = table if is_table(name) else linear
        out[name] = target.fit(Scheme(bits, choose_group_size(columns, group), symmetric=bits < 2))
    return out


def uniform_bytes(spec: Spec, schemes: dict[str, Scheme], *, target: Target) -> int:
    """Whole-model bytes as the target stores them."""
    matrices = sum(target.stored_bytes(schemes[name], *shape) for name, shape in spec.matrices().items())
    return matrices + 4 * sum(spec.vectors().values())
