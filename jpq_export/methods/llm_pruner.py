"""`--method llm-pruner`: LLM-Pruner's structured pruning (Ma et al., 2023), then one width for all that stays, by GPTQ.

Dependency groups go in order of their first-order Taylor importance, no more of them than the budget asks for at the
narrowest width that needs any: the plain rival of every method that chooses pruning and bits together.
"""

from __future__ import annotations

import numpy as np
import torch

from jpq_export.compress.cost import CostModel
from jpq_export.compress.decoder import Decoder
from jpq_export.compress.load import LoadedModel
from jpq_export.errors import BudgetError, UsageError
from jpq_export.format.plan import Budget, Plan
from jpq_export.format.spec import ModelSpec
from jpq_export.methods.qpruner.choose import Frame, frame, uniform_plan_of
from jpq_export.methods.qpruner.importance import derivatives, keep
from jpq_export.methods.qpruner.search import SEQUENCES
from jpq_export.numerics.scheme import BIT_WIDTHS
from jpq_export.progress import Stages

ORDER = 1
RATES = tuple(i / 100 for i in range(91))  # of all heads and of all channels that go
REASON = "one width for all"


def llm_pruner_plan(
    loaded: LoadedModel,
    calibration: np.ndarray,
    cost: CostModel,
    budget: Budget,
    *,
    prune: bool,
    effort: str,
    widths: tuple[float, ...] | None,
    stages: Stages,
) -> Plan:
    """The least pruning that fits, of one width; without `prune`, the widest width that fits.

    Raises:
        UsageError: an encoder, or no byte budget.
        BudgetError: the narrowest width is too much at every rate.
    """
    check(loaded, budget)
    assert isinstance(loaded.model, Decoder)
    assert isinstance(loaded.spec, ModelSpec)
    sequences = calibration[: SEQUENCES[effort]]
    with stages.stage("importance", "Taylor importance of heads and channels") as report:
        importance = derivatives(loaded.model, sequences, progress=report).importance(ORDER)
    rates = RATES if prune else RATES[:1]
    found = least_pruning(loaded.spec, importance, cost, budget, widths or BIT_WIDTHS, rates)
    search = {"order": ORDER, "rate": found.rate, "width": found.widths[0]}
    return uniform_plan_of(found, budget, sha256=loaded.sha256, method="llm-pruner", reason=REASON, search=search)


def check(loaded: LoadedModel, budget: Budget) -> None:
    """What cannot be asked of this method, said before anything is computed."""
    if not isinstance(loaded.model, Decoder):
        raise UsageError("--method llm-pruner: an encoder has no next-token loss to prune by; use --method jpq")
    if budget.bytes is None:
        raise UsageError("--method llm-pruner: its cap is on bytes; give --size, --bits or --ratio")


def least_pruning(
    spec: ModelSpec,
    importance: dict[str, torch.Tensor],
    cost: CostModel,
    budget: Budget,
    widths: tuple[float, ...],
    rates: tuple[float, ...] = RATES,
) -> Frame:
    """The frame of the narrowest width that has to prune, or else of the widest; BudgetError where nothing fits."""
    choices = {rate: keep(spec, importance, rate) for rate in rates}
    fitting, error = [], None
    for width in sorted(widths):
        try:
            fitting.append(frame(cost, choices, (width,), budget, method="llm-pruner"))
        except BudgetError as too_much:
            error = error or too_much
    if not fitting:
        assert error is not None
        raise error
    return next((found for found in fitting if found.rate > 0), fitting[-1])
