"""What can be met: a budget by a model on a target, and a plan by the board's memory. Told before the long part."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jpq_export.errors import BudgetError
from jpq_export.format.encoder_spec import EncoderSpec
from jpq_export.format.spec import ModelSpec
from jpq_export.request import Request

if TYPE_CHECKING:
    from jpq_export.format.encoder_spec import Spec
    from jpq_export.format.plan import Plan


def cached_spec(spec: Spec, request: Request) -> Spec:
    """The spec with the cache that was asked for: nothing up to the lowering depends on it but its cost."""
    return replace(spec, kv_cache=request.kv_cache) if isinstance(spec, ModelSpec) else spec


def asked_of(request: Request, spec: Spec) -> tuple[Any, Any, tuple[float, ...]]:
    """Costs on the target, the budget, and the widths to choose from."""
    from jpq_export.compress.cost import CostModel
    from jpq_export.numerics.scheme import BIT_WIDTHS

    cost = CostModel(cached_spec(spec, request), request.target, request.context)
    return cost, request.budget.resolve(spec), request.widths or BIT_WIDTHS


def check_budget(request: Request, spec: Spec) -> None:
    """BudgetError where no plan of the model, in the basis it has, is small enough."""
    from jpq_export.compress.plan import check_reachable
    from jpq_export.compress.prepare import group_size_for

    group_size = group_size_for(request.target, spec, request.group_size)
    check_reachable(spec, *asked_of(request, spec), group_size=group_size, prune=request.prune)


def check_either_basis(request: Request, spec: Spec) -> None:
    """BudgetError where neither the model nor the rotated one, whose groups are wider, can be small enough."""
    from jpq_export.compress.rotated import can_rotate

    try:
        check_budget(request, spec)
    except BudgetError:
        if not (request.rotate and isinstance(spec, ModelSpec) and can_rotate(spec)):
            raise
        check_budget(request, replace(spec, rotated=True))


def check_board(request: Request, plan: Plan, spec: Spec) -> None:
    """Weights and KV cache (fp16 or int8) must fit the board's memory."""
    target, context = request.target, min(request.context, spec.max_positions)
    heads, spec = sum(len(layer.kv_heads) for layer in plan.layers), cached_spec(spec, request)
    cache = 0 if isinstance(spec, EncoderSpec) else context * spec.cache_bytes(heads, float_bytes=2)
    if plan.predicted.bytes + cache > target.memory_bytes:
        raise BudgetError(
            f"{target.name}: weights of {plan.predicted.bytes / 1e6:.2f} MB and a KV cache of {cache / 1e6:.2f} MB "
            f"for {context} tokens do not fit its {target.memory_bytes / 1e6:.2f} MB; lower the budget or --context"
        )
