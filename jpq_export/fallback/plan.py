"""One width for all linears and one for tables and head: the widest that the budget holds."""

from __future__ import annotations

from itertools import product

from jpq_export.compress.cost import CostModel
from jpq_export.compress.plan import GROUP_SIZES
from jpq_export.format.plan import Budget, Choice, Plan, Predicted
from jpq_export.format.spec import ModelSpec
from jpq_export.format.target import Target
from jpq_export.numerics.scheme import Scheme, choose_group_size

UNIFORM = "one width for all: the fallback does not search"
VECTOR_BYTES = 4  # norms, biases and all else stay fp32


def uniform_plan(
    spec: ModelSpec, target: Target, budget: Budget, *, sha256: str, method: str, widths: tuple[float, ...]
) -> Plan:
    """As `compress.plan.uniform_plan`, with the matrices of a traced model; BudgetError says the smallest size."""
    assert budget.bytes is not None
    best: tuple | None = None
    least: int | None = None
    for linear, table, *groups in product(widths, widths, GROUP_SIZES, GROUP_SIZES):
        if table < linear:
            continue
        schemes = _schemes(spec, (linear, groups[0]), (table, groups[1]))
        size = stored_bytes(spec, schemes)
        least = size if least is None else min(least, size)
        rank = linear, size, table
        if size <= budget.bytes and (best is None or rank > best[0]):
            best = rank, schemes
    if best is None:
        raise budget.too_small(least or 0, f"{spec.name} takes the fallback, which needs at least")
    size, schemes = best[0][1], best[1]
    cost = CostModel(spec, target, 1)
    time = sum(cost.matrix(*shape, schemes[name])[1] for name, shape in spec.matrices().items())
    choices = tuple(
        Choice(name, s.bits, s.group_size, s.symmetric, *shape, s.weight_bytes(*shape), 0.0, UNIFORM)
        for (name, shape), s in zip(spec.matrices().items(), schemes.values(), strict=True)
    )
    predicted = Predicted(0.0, size, time / 1e3, 0.0)
    return Plan(spec.name, sha256, target.name, method, budget, (), choices, (), predicted, (), {})


def stored_bytes(spec: ModelSpec, schemes: dict[str, Scheme]) -> int:
    """Of the whole model."""
    assert spec.traced is not None
    packed = sum(schemes[name].weight_bytes(*shape) for name, shape in spec.matrices().items())
    return packed + VECTOR_BYTES * spec.traced.others


def _schemes(spec: ModelSpec, linear: tuple[float, int], table: tuple[float, int]) -> dict[str, Scheme]:
    """Two or three levels need the zero between them: a stored one would spend a level on one side."""
    assert spec.traced is not None
    out = {}
    for name, (_, columns) in spec.matrices().items():
        bits, group = table if name in spec.traced.tables else linear
        out[name] = Scheme(bits, choose_group_size(columns, group), symmetric=bits < 2)
    return out
