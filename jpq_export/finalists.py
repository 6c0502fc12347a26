"""From plans to one rounded model: every finalist is rounded, and the best on fresh text goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from jpq_export.compress.parallel import once
from jpq_export.format.compressed import CompressedModel
from jpq_export.format.plan import Plan, load_plan
from jpq_export.request import prepared_for
from jpq_export.workspace import Workspace, write_atomic

if TYPE_CHECKING:
    from jpq_export.compress.load import LoadedModel
    from jpq_export.pipeline import Export
    from jpq_export.request import Texts

Progress = Callable[[int, int], None]


def round_finalists(export: Export, loaded: LoadedModel, texts: Texts, plan: Plan) -> Plan:
    """Leaves rounded.safetensors in the work folder; the plan that it is of. `plan`: where there is but one."""
    work = export.work
    plans = once(_finalists, work) or [plan]
    with export.stages.stage("compress", "pruning and rounding, layer by layer") as report:
        for i, each in enumerate(plans):
            if not once(work.has, _name(i)):
                _round(export, loaded, texts, each, _name(i), _share(report, i, len(plans)))
        winner = 0 if len(plans) == 1 else _final(export, loaded, texts, plans)
    once(_crown, work, plans[winner], winner)
    return plans[winner]


def _name(index: int) -> str:
    return f"rounded-{index}.safetensors"


def _finalists(work: Workspace) -> list[Plan]:
    return [load_plan(path) for path in sorted(work.folder.glob("finalist-*.json"))]


def _crown(work: Workspace, plan: Plan, winner: int) -> None:
    """The plan first, the file that says "done" last: a run killed in between chooses again, and the same."""
    write_atomic(work.path("plan.json"), plan.to_json())
    for end in (".json", ""):
        os.replace(work.path(f"{_name(winner)}{end}"), work.path(f"rounded.safetensors{end}"))


def _round(export: Export, loaded: LoadedModel, texts: Texts, plan: Plan, name: str, progress: Progress) -> None:
    from jpq_export.compress.stages import round_model

    effort = export.effort
    rounded, kl = round_model(
        loaded.model,
        plan,
        # Baselines round with every token that recovery would see: equal data for all methods.
        texts.calibration[: effort.sequences if plan.method == "jpq" else None],
        texts.heldout,
        seed=export.request.seed,
        passes=effort.passes,
        prepared=prepared_for(export.request, loaded, texts),
        progress=progress,
    )
    once(export.save, rounded, name, kl)


def _final(export: Export, loaded: LoadedModel, texts: Texts, plans: list[Plan]) -> int:
    """Index of the finalist that goes on, by text that neither the search nor the rounding has seen.

    Fills in `search["finals"]` of all plans.
    """
    from jpq_export.compress.finals import champion, measure

    start = export.effort.sequences
    fresh = texts.calibration[start : start + export.final_sequences]
    models = (once(CompressedModel.load, export.work.path(_name(i))) for i in range(len(plans)))
    errors = [measure(loaded.model, model, fresh) for model in models]
    winner = once(champion, errors, [bool(plan.removed) for plan in plans])
    finals = [
        {"assembled_kl": plan.search["measured_kl_before_recovery"], "rounded_kl": float(kl.mean())}
        | {"removed": len(plan.removed), "bytes": plan.predicted.bytes, "chosen": i == winner}
        for i, (plan, kl) in enumerate(zip(plans, errors, strict=True))
    ]
    plans[:] = [replace(plan, search=plan.search | {"finals": finals}) for plan in plans]
    return winner


def _share(report: Progress, index: int, parts: int) -> Progress:
    """Progress of one of several equal parts."""
    return lambda done, total: report(index * total + done, parts * total)
