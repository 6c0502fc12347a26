"""Recovery by low-rank branches: they start where they undo most of the rounding (LoftQ) and learn by the LM loss.

y = x Q̂ᵀ + (x A) B with Q̂ the rounded weight, frozen, and A [K, rank], B [rank, N] by `peft`'s LoRA (Hu et al., 2022).
LoftQ (Li et al., 2024) starts them at the best approximation of that rank of W - Q̂, instead of at nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jpq_export.compress.apply import LayerChoice, prune
from jpq_export.compress.decoder import Decoder
from jpq_export.compress.model import Model
from jpq_export.compress.statistics import Progress
from jpq_export.compress.student import dequantized, to_student
from jpq_export.compress.teaching import teaching_of
from jpq_export.compress.training import TuneSettings, schedule
from jpq_export.format.compressed import Adapter, CompressedModel
from jpq_export.format.encoder_spec import Spec
from jpq_export.format.plan import Plan

LINEARS = ["q", "k", "v", "o", "gate", "up", "down"]
BYTES = 2  # float16
# SmolLM2-135M, 3 bits, rank 8; held-out KL 2.080 before, by the start 1.995, after 30 steps at 3e-4 1.533, 1e-3
# 1.368, 2e-3 1.289. Longer trainings were not measured, so not the highest.
RATE = 1e-3
CLIP = 1.0  # of the gradient's norm
WARMUP = 5  # steps


def adapter_bytes(spec: Spec, rank: int) -> int:
    """Of branches beside every linear of the layers."""
    shapes = [shape for i in range(len(spec.layers)) for shape in spec.linear_shapes(i).values()]
    return BYTES * rank * sum(n + k for n, k in shapes)


def loftq(residual: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [K, rank] and B [rank, N] whose product is nearest to `residual`ᵀ, W - Q̂ [N, K]; the singular values shared."""
    U, S, V = torch.linalg.svd(residual, full_matrices=False)
    root = S[:rank].sqrt()
    return V[:rank].T * root, (U[:, :rank] * root).T


def adapt(
    teacher: Model,
    compressed: CompressedModel,
    plan: Plan,
    sequences: np.ndarray,
    heldout: np.ndarray,
    *,
    steps: int,
    seed: int,
    progress: Progress | None = None,
) -> tuple[CompressedModel, float]:
    """The model with trained branches of the plan's rank, and its held-out KL (nats a token) as stored."""
    assert isinstance(teacher, Decoder)
    device = teacher.embed.weight.device
    student = with_branches(teacher, dequantized(compressed).to(device), plan, seed=seed)
    _train(student, sequences, steps, seed, progress)
    adapters = {}
    for name, linear in _branches(student):
        down, up = linear.lora_A["default"].weight, linear.lora_B["default"].weight
        adapters[name] = Adapter(*(part.detach().T.contiguous().half().cpu().numpy() for part in (down, up)))
    adapted = CompressedModel(compressed.spec, compressed.quantized, compressed.vectors, adapters)
    errors = teaching_of(teacher).errors(teacher, to_student(adapted, device=str(device)), heldout)
    return adapted, float(errors.mean())


def with_branches(teacher: Decoder, student: Decoder, plan: Plan, *, seed: int) -> Decoder:
    """`student`, rounded, with a branch beside every linear that starts by LoftQ; only branches can be trained."""
    from peft import LoraConfig, inject_adapter_in_model

    kept = tuple(LayerChoice(layer.kv_heads, layer.kept_channels) for layer in plan.layers)
    pruned = prune(teacher, kept)
    rank = plan.adapter_rank
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=LINEARS)  # a scaling of one
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, student)
    with torch.no_grad():
        for name, linear in _branches(student):
            A, B = loftq(pruned.get_submodule(name).weight - linear.base_layer.weight, rank)
            # A linear narrower than the rank has a branch of its own width: the rest adds nothing.
            for part, start in ((linear.lora_A["default"].weight, A.T), (linear.lora_B["default"].weight, B.T)):
                part.zero_()
                part[: start.shape[0], : start.shape[1]] = start
    return student


def _branches(student: Decoder) -> Iterator[tuple[str, Any]]:
    """Every linear that has a branch, by canonical name."""
    from peft.tuners.lora import Linear

    for name, module in student.named_modules():
        if isinstance(module, Linear):
            yield name, module


@torch.enable_grad()
def _train(student: Decoder, sequences: np.ndarray, steps: int, seed: int, progress: Progress | None) -> None:
    """AdamW on next-token cross entropy, the rate falling linearly after its warm-up."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    for step, index in enumerate(schedule(len(sequences), TuneSettings(steps), seed)):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
        ids = torch.from_numpy(sequences[index]).to(student.embed.weight.device)
        hidden = student.hidden(ids, student.context(ids))[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(student.logits(hidden).float(), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        if progress:
            progress(step + 1, steps)
