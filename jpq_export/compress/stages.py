"""The two stages that change weights, each with the held-out KL that decides whether it stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from jpq_export.compress import parallel
from jpq_export.compress.apply import Compressor, LayerChoice, Recipe
from jpq_export.compress.model import Model
from jpq_export.compress.prepared import load_statistics
from jpq_export.compress.statistics import Progress, Statistics
from jpq_export.compress.student import to_compressed, to_student
from jpq_export.compress.teaching import shared_errors, teaching_of
from jpq_export.compress.training import Checkpoint, Guard, TuneSettings
from jpq_export.format.compressed import CompressedModel
from jpq_export.format.plan import Plan
from jpq_export.numerics.row_blocks import layout_of

ROUNDING = {
    "toga": "gptq",
    "qpruner": "gptq",
    "llm-pruner": "gptq",
}  # rounded by another method's rounding


def round_model(
    teacher: Model,
    plan: Plan,
    calibration: np.ndarray,
    heldout: np.ndarray,
    *,
    seed: int,
    passes: int,
    prepared: Path,
    progress: Progress | None = None,
) -> tuple[CompressedModel, float]:
    """Prune and quantize by the plan; with the held-out KL (nats per token)."""
    stats = _statistics(teacher, plan, calibration, seed, prepared)
    schemes = {choice.name: choice.layout or choice.scheme for choice in plan.choices}
    layers = tuple(LayerChoice(layer.kv_heads, layer.kept_channels) for layer in plan.layers)
    recipe = Recipe(layers, schemes, ROUNDING.get(plan.method, plan.method), passes)
    student = Compressor(teacher, recipe, stats, calibration).run(progress)
    compressed = to_compressed(student, schemes)
    device = str(teacher.embed.weight.device)
    return compressed, _heldout_error(teacher, to_student(compressed, device=device), heldout)


def _statistics(teacher: Model, plan: Plan, calibration: np.ndarray, seed: int, prepared: Path) -> Statistics:
    """Plain ones for the baselines; ours know what embedding and head are asked, from the cache when it is there."""
    if plan.method != "jpq":
        return teaching_of(teacher).plain_statistics(teacher, calibration)
    found = load_statistics(prepared, device=str(teacher.embed.weight.device))
    if all(parallel.gathered(found is not None)) and found is not None:
        return found
    return teaching_of(teacher).collect(teacher, calibration, seed=seed)


def _heldout_error(teacher: Model, student: Model, sequences: np.ndarray) -> float:
    """Mean over tokens (KL, nats) or texts (1 - cosine), in fp32; the number every gate looks at."""
    return float(shared_errors(teacher, student, sequences).mean())


def recover(
    teacher: Model,
    compressed: CompressedModel,
    sequences: np.ndarray,
    heldout: np.ndarray,
    *,
    steps: int,
    seed: int,
    measured_every: int = 0,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> tuple[CompressedModel, float]:
    """End-to-end tuning of scales and norms; with the held-out KL after it, of the numbers as stored.

    `measured_every`, `checkpoint`: see `training`.
    """
    device = str(teacher.embed.weight.device)
    student = to_student(compressed, device=device)
    torch.manual_seed(seed)
    settings = TuneSettings(steps=steps, measured_every=measured_every)
    guard = Guard(checkpoint, lambda: _heldout_error(teacher, student, heldout))
    teaching_of(teacher).tune(teacher, student, sequences, settings, seed=seed, guard=guard, progress=progress)
    schemes = {name: layout_of(weight) for name, weight in compressed.quantized.items()}
    tuned = to_compressed(student, schemes)
    return tuned, _heldout_error(teacher, to_student(tuned, device=device), heldout)
