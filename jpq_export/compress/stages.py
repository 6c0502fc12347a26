"""The two stages that change weights, each with the held-out KL that decides whether it stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from jpq_export.compress.apply import Compressor, LayerChoice, Recipe
from jpq_export.compress.decoder import Decoder
from jpq_export.compress.prepared import load_statistics
from jpq_export.compress.statistics import Progress, Statistics, collect, plain_statistics
from jpq_export.compress.student import to_compressed, to_student
from jpq_export.compress.tune import TuneSettings, heldout_kl, tune
from jpq_export.format.compressed import CompressedModel
from jpq_export.format.plan import Plan


def round_model(
    teacher: Decoder,
    plan: Plan,
    calibration: np.ndarray,
    heldout: np.ndarray,
    *,
    seed: int,
    passes: int,
    prepared: Path,
    outputs: bool = False,
    progress: Progress | None = None,
) -> tuple[CompressedModel, float]:
    """Prune and quantize by the plan, two-sidedly if `outputs`; with the held-out KL (nats per token)."""
    stats = _statistics(teacher, plan, calibration, seed, prepared, outputs=outputs)
    schemes = {choice.name: choice.scheme for choice in plan.choices}
    layers = tuple(LayerChoice(layer.kv_heads, layer.kept_channels) for layer in plan.layers)
    recipe = Recipe(layers, schemes, plan.method, passes)
    student = Compressor(teacher, recipe, stats, calibration).run(progress)
    compressed = to_compressed(student, schemes)
    device = str(teacher.embed.weight.device)
    return compressed, heldout_kl(teacher, to_student(compressed, device=device), heldout)


def _statistics(
    teacher: Decoder, plan: Plan, calibration: np.ndarray, seed: int, prepared: Path, *, outputs: bool
) -> Statistics:
    """The baselines weigh all tokens alike, as published; ours uses the Fisher's, from the cache when it is there."""
    if plan.method != "jpq":
        return plain_statistics(teacher, calibration)
    found = load_statistics(prepared, device=str(teacher.embed.weight.device))
    return collect(teacher, calibration, seed=seed, outputs=outputs) if found is None else found


def recover(
    teacher: Decoder,
    compressed: CompressedModel,
    sequences: np.ndarray,
    heldout: np.ndarray,
    *,
    steps: int,
    seed: int,
    progress: Progress | None = None,
) -> tuple[CompressedModel, float]:
    """End-to-end tuning of scales and norms; with the held-out KL after it, of the numbers as stored."""
    device = str(teacher.embed.weight.device)
    student = to_student(compressed, device=device)
    torch.manual_seed(seed)
    tune(teacher, student, sequences, TuneSettings(steps=steps), seed=seed, progress=progress)
    schemes = {name: weight.scheme for name, weight in compressed.quantized.items()}
    tuned = to_compressed(student, schemes)
    return tuned, heldout_kl(teacher, to_student(tuned, device=device), heldout)
