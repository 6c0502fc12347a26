"""Plans of the published systems: what each of them is given of a run; see `methods`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jpq_export.format.plan import Plan
from jpq_export.progress import Stages
from jpq_export.request import Request, Texts

if TYPE_CHECKING:
    from jpq_export.compress.cost import CostModel
    from jpq_export.compress.load import LoadedModel


def toga(request: Request, loaded: LoadedModel, texts: Texts, cost: CostModel, stages: Stages) -> Plan:
    """The masks of a trained hypernetwork."""
    from jpq_export.methods.toga.search import toga_plan

    kind = _common(request, stages) | {"prune": request.prune, "seed": request.seed}
    kind |= {"activation_bits": request.activation_bits}
    return toga_plan(loaded, texts.calibration, cost, request.budget.resolve(loaded.spec), **kind)


def qpruner(request: Request, loaded: LoadedModel, texts: Texts, cost: CostModel, stages: Stages) -> Plan:
    """Taylor pruning, then the best trial of the search over bits."""
    from jpq_export.methods.qpruner.search import qpruner_plan

    kind = _common(request, stages) | {"prune": request.prune, "seed": request.seed, "rank": request.adapters}
    return qpruner_plan(loaded, texts.calibration, texts.heldout, cost, request.budget.resolve(loaded.spec), **kind)


def llm_pruner(request: Request, loaded: LoadedModel, texts: Texts, cost: CostModel, stages: Stages) -> Plan:
    """Taylor pruning to the budget at one width."""
    from jpq_export.methods.llm_pruner import llm_pruner_plan

    budget = request.budget.resolve(loaded.spec)
    return llm_pruner_plan(loaded, texts.calibration, cost, budget, prune=request.prune, **_common(request, stages))


def _common(request: Request, stages: Stages) -> dict[str, Any]:
    return {"effort": request.effort, "widths": request.widths, "stages": stages}


PUBLISHED = {"toga": toga, "qpruner": qpruner, "llm-pruner": llm_pruner}
