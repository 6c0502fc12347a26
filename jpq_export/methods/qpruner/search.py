"""`--method qpruner`: importance, pruning, information, then the search over every layer's bits below the budget.

What was computed is kept in the cache step by step, so a stopped run goes on after its last finished trial.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jpq_export.compress.apply import prune
from jpq_export.compress.cost import CostModel
from jpq_export.compress.decoder import Decoder
from jpq_export.compress.heldout import Heldout
from jpq_export.compress.load import LoadedModel
from jpq_export.compress.prepared import check_cache, prepared_folder
from jpq_export.errors import UsageError
from jpq_export.format.plan import Budget, Plan
from jpq_export.format.spec import ModelSpec
from jpq_export.methods.qpruner.bayes import Levels, Space, Trial, finished, search
from jpq_export.methods.qpruner.choose import Frame, by_information, frame, plan_of
from jpq_export.methods.qpruner.importance import derivatives, keep
from jpq_export.methods.qpruner.information import layer_information
from jpq_export.methods.qpruner.trials import TrialModel
from jpq_export.progress import Stages
from jpq_export.revision import revision

WIDTHS = (2, 4, 8)  # as published
RATES = (0.2, 0.3, 0.5)  # of all units that go; the least that the budget allows
ORDER = 2  # of the Taylor series; 1 ranks by slope alone
ESTIMATE = "neighbours"
TRIALS = {"quick": 16, "standard": 40, "max": 100}
SEQUENCES = {"quick": 8, "standard": 24, "max": 96}  # of the calibration text, for the gradients
EXTRA = ("botorch", "sklearn")

logger = logging.getLogger(__name__)


def qpruner_plan(
    loaded: LoadedModel,
    calibration: np.ndarray,
    heldout: np.ndarray,
    cost: CostModel,
    budget: Budget,
    *,
    effort: str,
    prune: bool,
    widths: tuple[float, ...] | None,
    seed: int,
    rank: int,
    stages: Stages,
) -> Plan:
    """Structure and bits of the best trial; room is left for low-rank branches of `rank`.

    Raises:
        UsageError: an encoder, no byte budget, fewer than two widths, or the extra is not installed.
        BudgetError: the lowest width everywhere is too much.
    """
    allowed = check(loaded, budget, widths, rank)
    teacher, spec, sequences = loaded.model, loaded.spec, calibration[: SEQUENCES[effort]]
    assert isinstance(teacher, Decoder)
    assert isinstance(spec, ModelSpec)
    inputs: dict[str, Any] = {
        "method": "qpruner",
        "model": loaded.sha256,
        "texts": sha256(calibration.tobytes() + heldout.tobytes()).hexdigest(),
        "revision": revision(("methods/qpruner", "methods/toga", "compress", "numerics")),
    }
    folder = prepared_folder(**inputs, sequences=len(sequences))
    check_cache(folder)
    kept = importance(teacher, sequences, folder, stages)
    choices = {rate: keep(spec, kept, rate) for rate in (RATES if prune else (0.0,))}
    found = frame(cost, choices, allowed, budget, rank=rank)
    inputs |= {
        "budget": budget.bytes,
        "trials": TRIALS[effort],
        "widths": allowed,
        "rate": found.rate,
        "seed": seed,
        "rank": rank,
    }
    inputs |= {"target": cost.target.stored_bits, "sequences": len(sequences)}
    trials, space, information = _search(teacher, sequences, heldout, found, budget, inputs, stages)
    told = {"order": ORDER, "estimate": ESTIMATE, "information": information[ESTIMATE], "estimates": information}
    return plan_of(found, space, trials, budget, sha256=loaded.sha256, search=told)


def check(loaded: LoadedModel, budget: Budget, widths: tuple[float, ...] | None, rank: int) -> tuple[float, ...]:
    """What cannot be asked of this method, said before anything is computed; the widths, rising."""
    if not isinstance(loaded.model, Decoder):
        raise UsageError("--method qpruner: an encoder has no next-token loss to prune by; use --method jpq")
    if budget.bytes is None:
        raise UsageError("--method qpruner: its cap is on bytes; give --size, --bits or --ratio")
    allowed: tuple[float, ...] = tuple(sorted(set(widths or WIDTHS)))
    if len(allowed) < 2:
        raise UsageError(f"--widths: --method qpruner chooses between widths, got {len(allowed)}; give two or more")
    missing = [name for name in (*EXTRA, *(("peft",) if rank else ())) if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--method qpruner: {missing[0]} is not installed; pip install 'jpq-export[qpruner]'")
    return allowed


def importance(model: Decoder, sequences: np.ndarray, folder: Path, stages: Stages) -> dict[str, torch.Tensor]:
    """Of every unit, from the cache or by one backward pass."""

    def made() -> dict[str, list[float]]:
        with stages.stage("importance", "Taylor importance of heads and channels") as report:
            found = derivatives(model, sequences, progress=report).importance(ORDER)
        return {name: values.tolist() for name, values in found.items()}

    raw = _cached(folder / "importance.json", made, lambda: stages.resumed("importance", "Taylor importance"))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in raw.items()}


def _search(
    teacher: Decoder,
    sequences: np.ndarray,
    heldout: np.ndarray,
    found: Frame,
    budget: Budget,
    inputs: dict[str, Any],
    stages: Stages,
) -> tuple[list[Trial], Space, dict[str, list[float]]]:
    """All trials, the space they are from, and every layer's mutual information by estimate."""
    assert budget.bytes is not None
    folder = prepared_folder(**inputs)
    pruned = prune(teacher, found.kept)

    def made() -> dict[str, list[float]]:
        with stages.stage("information", "mutual information of layers and prediction") as report:
            return layer_information(pruned, sequences, progress=report)

    path = folder / "information.json"
    information = _cached(path, made, lambda: stages.resumed("information", "mutual information"))
    ranked = information[ESTIMATE]
    space = found.space(budget.bytes, sorted(range(len(ranked)), key=lambda i: ranked[i]))
    journal, count = folder / "trials.jsonl", inputs["trials"]
    trials = finished(space, journal)
    if len(trials) >= count:
        stages.resumed("plan", f"searching the bits of every layer, {count} trials")
        return trials[:count], space, information
    told = ", ".join(f"{bits:g}" for bits in found.widths)
    with stages.stage("round", f"rounding every layer at {told} bits") as report:
        ids = torch.from_numpy(sequences).to(teacher.embed.weight.device)
        model = TrialModel(pruned, ids, found.widths, Heldout(teacher, heldout), report)
    start = starts(space, found.widths, ranked)
    with stages.stage("plan", f"searching the bits of every layer, {count} trials") as report:
        kind = {"trials": count, "seed": inputs["seed"], "journal": journal}
        trials = search(space, start, model.loss, **kind, progress=report)
    return trials, space, information


def starts(space: Space, widths: tuple[float, ...], information: list[float]) -> list[Levels]:
    """What is measured first: by information below the cap and below two smaller ones, and one width for all."""
    room = space.cap - space.least
    caps = [space.cap, space.least + room // 2, space.least + room // 4]
    spaces = [Space(space.sizes, space.fixed, cap, space.order) for cap in caps]
    alike = [(level,) * len(space.sizes) for level in range(len(widths))]
    return [
        by_information(spaces[0], widths, information),
        *(each for each in alike if space.bytes(each) <= space.cap),
        *(by_information(each, widths, information) for each in spaces[1:]),
    ]


def _cached(path: Path, make: Callable[[], Any], found: Callable[[], None]) -> Any:
    """The JSON value of the file, or one made now; a damaged file is made again."""
    if path.exists():
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            found()
            return value
        except ValueError as error:
            logger.warning("%s: cannot be read (%s); making it again", path, error)
    value = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)
    return value
