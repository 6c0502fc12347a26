"""Whether a plan.json given by --plan is for this model, this target and the other options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jpq_export.errors import PlanError, UsageError
from jpq_export.format.plan import Plan
from jpq_export.request import Request

if TYPE_CHECKING:
    from jpq_export.compress.load import LoadedModel


WIDEST_OF_ENGINES = 128  # weights that share a scale


def check_given(given: Plan, request: Request, loaded: LoadedModel) -> None:
    """PlanError: of another model, or not for this target; UsageError: an option asks for what the plan is not."""
    if given.model_sha256 != loaded.sha256:
        raise PlanError(
            f"{request.plan}: made for a model with sha256 {given.model_sha256[:12]}…, this one has "
            f"{loaded.sha256[:12]}…; make the plan again with `jpq-export plan`"
        )
    given.check(loaded.spec)
    _check_options(given, request)
    _check_schemes(given, request)


def _check_options(given: Plan, request: Request) -> None:
    """A plan has its own method and structure; UsageError when an option asks for another."""
    if given.method == "srcr":
        raise UsageError(f"--plan {request.plan}: of a study's cell; make its bundle with `jpq-export study --export`")
    if request.method not in ("jpq", given.method):
        raise UsageError(
            f"--method {request.method}: {request.plan} was made for {given.method}; leave --method out or make a "
            "new plan"
        )
    if request.widths:
        raise UsageError(f"--widths: {request.plan} has its widths already; keep one of --plan and --widths")
    if request.group_size:
        raise UsageError(f"--group-size: {request.plan} has its groups already; keep one of --plan and --group-size")
    if request.adapters not in (0, given.adapter_rank):
        raise UsageError(
            f"--adapters {request.adapters}: {request.plan} has rank {given.adapter_rank}; leave the option out or "
            "make a new plan"
        )
    if not request.prune and given.removed:
        raise UsageError(
            f"--no-prune: {request.plan} removes {given.removed[0].name}; leave --no-prune out or make a new plan"
        )


def _check_schemes(given: Plan, request: Request) -> None:
    """The target's engine must be able to store every weight; PlanError names the first it cannot."""
    target = request.target
    for choice in given.choices:
        if not target.holds(choice.schemes[0]) or (choice.blocks and target.engine):
            zero = f"zero {choice.schemes[0].centre:g}" if choice.symmetric else "stored zero points"
            what = "rows of several widths" if choice.blocks else f"{choice.bits}-bit codes with {zero}"
            raise PlanError(
                f"{request.plan}: {choice.name}: {what} do not fit the signed "
                f"{max(target.stored_bits)}-bit ones of {target.name}; make a plan with --target {target.name}"
            )
        if target.engine and choice.group_size > WIDEST_OF_ENGINES:
            raise PlanError(
                f"{request.plan}: {choice.name}: groups of {choice.group_size} are wider than the {WIDEST_OF_ENGINES} "
                f"that the engine of {target.name} was seen to take; make a plan with --target {target.name}"
            )
