"""End-to-end recovery of a sentence encoder: scales, norms and biases learn to reproduce the teacher's embeddings.

Codes stay frozen, as in `tune`. The loss is 1 - cosine of the embedding plus a share of the same for every token state:
one embedding a text says little, its tokens say more.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jpq_export.compress.encoder import Encoder
from jpq_export.compress.encoder_statistics import direction
from jpq_export.compress.precision import autocast, fast_bf16
from jpq_export.compress.quant_linear import QuantLinear
from jpq_export.compress.statistics import Progress
from jpq_export.compress.tune import RelativeAdam, TuneSettings, schedule

TOKEN_SHARE = 0.5
TEXTS = 32  # a step


def tune(
    teacher: Encoder,
    student: Encoder,
    sequences: np.ndarray,
    settings: TuneSettings,
    *,
    seed: int,
    progress: Progress | None = None,
) -> list[float]:
    """Train in place; returns the training error of every step (1 - cosine)."""
    settings = TuneSettings(settings.steps, min(TEXTS, len(sequences)), settings.scale_rate, settings.norm_rate)
    optimizer = RelativeAdam(*start_training(student), settings)
    losses = []
    for step, index in enumerate(schedule(len(sequences), settings, seed)):
        ids = torch.from_numpy(sequences[index]).to(teacher.embed.weight.device)
        losses.append(distil_step(teacher, student, ids[:, : longest(ids, teacher.spec.pad_id)]))
        optimizer.step(step)
        if progress:
            progress(step + 1, settings.steps)
    stop_training(student)
    return losses


def longest(ids: Tensor, pad_id: int) -> int:
    """Tokens of the longest text of a batch [texts, seq]."""
    return int((ids != pad_id).sum(-1).max())


def start_training(student: Encoder) -> tuple[list[QuantLinear], list[nn.Parameter]]:
    """(layers with scales; norms and biases), wanting gradients."""
    dtype = torch.bfloat16 if fast_bf16(student.embed_norm.weight.device.type) else torch.float32
    modules = [module for module in student.modules() if isinstance(module, QuantLinear)]
    for module in modules:
        module.start_training(dtype)
    mine = {id(module.scales) for module in modules}
    others = [parameter for parameter in student.parameters() if id(parameter) not in mine]
    for parameter in others:
        parameter.requires_grad_(True)
    return modules, others


def stop_training(student: Encoder) -> None:
    """Back to inference."""
    for module in student.modules():
        if isinstance(module, QuantLinear):
            module.stop_training()
    student.requires_grad_(False)


def distil_step(teacher: Encoder, student: Encoder, ids: Tensor) -> float:
    """Accumulate gradients for texts ids [texts, seq]; returns the mean 1 - cosine of the embeddings."""
    context = teacher.context(ids)
    with torch.no_grad(), autocast(ids.device):
        goal = teacher.hidden(ids, context).float()
    with autocast(ids.device), torch.enable_grad():
        mine = student.hidden(ids, context).float()
        error = (1 - F.cosine_similarity(direction(teacher, goal, context), direction(teacher, mine, context))).mean()
        tokens = (1 - F.cosine_similarity(goal, mine, dim=-1))[context.mask].mean()
        (error + TOKEN_SHARE * tokens).backward()
    return float(error.detach())
