"""End-to-end recovery of a sentence encoder: scales, norms and biases learn to reproduce the teacher's embeddings.

Codes stay frozen, as in `tune`. The loss is 1 - cosine of the embedding plus a share of the same for every token state:
one embedding a text says little, its tokens say more.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jpq_export.compress import parallel
from jpq_export.compress.encoder import Encoder
from jpq_export.compress.encoder_statistics import direction
from jpq_export.compress.precision import autocast, fast_bf16
from jpq_export.compress.quant_linear import QuantLinear
from jpq_export.compress.statistics import Progress
from jpq_export.compress.training import Guard, RelativeAdam, TuneSettings, run_steps, schedule

TOKEN_SHARE = 0.5
TEXTS = 32  # a step


def tune(
    teacher: Encoder,
    student: Encoder,
    sequences: np.ndarray,
    settings: TuneSettings,
    *,
    seed: int,
    guard: Guard | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Train in place; returns the training error of every step (1 - cosine)."""
    settings = replace(settings, batch=min(TEXTS, len(sequences)))
    optimizer = RelativeAdam(*start_training(student), settings)

    def one_step(index: np.ndarray) -> float:
        ids = torch.from_numpy(sequences[index]).to(teacher.embed.weight.device)
        mine = ids[parallel.share(len(ids))]
        if not len(mine):
            return 0.0
        counts = {"texts": len(ids), "tokens": int((ids != teacher.spec.pad_id).sum())}
        return distil_step(teacher, student, mine[:, : longest(mine, teacher.spec.pad_id)], **counts)

    turns = list(schedule(len(sequences), settings, seed))
    losses = run_steps(optimizer, turns, one_step, guard=guard, progress=progress)
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


def distil_step(teacher: Encoder, student: Encoder, ids: Tensor, *, texts: int, tokens: int) -> float:
    """Accumulate gradients for ids [n, seq], a share of a batch of `texts` that have `tokens` in all.

    Returns the sum of 1 - cosine of the embeddings over `texts`.
    """
    context = teacher.context(ids)
    with torch.no_grad(), autocast(ids.device):
        goal = teacher.hidden(ids, context).float()
    with autocast(ids.device), torch.enable_grad():
        mine = student.hidden(ids, context).float()
        similar = F.cosine_similarity(direction(teacher, goal, context), direction(teacher, mine, context))
        error = (1 - similar).sum() / texts
        states = (1 - F.cosine_similarity(goal, mine, dim=-1))[context.mask].sum() / tokens
        (error + TOKEN_SHARE * states).backward()
    return float(error.detach())
