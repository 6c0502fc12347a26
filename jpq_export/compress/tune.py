"""End-to-end recovery: scales and norms of the compressed model learn to reproduce the teacher's output distribution.

Codes stay frozen, so the packed bytes do not change (as in EfficientQAT's second phase, Chen et al., 2024). The loss is
the full KL(teacher ‖ student) over the vocabulary; the teacher's final hidden states are kept in bf16 (2 * hidden bytes
a token) and its logits are rebuilt chunk by chunk, which costs less than storing them. Under torchrun every process
takes its share of each step's sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jpq_export.compress import parallel
from jpq_export.compress.decoder import Decoder, Norm
from jpq_export.compress.precision import autocast, fast_bf16, head_table
from jpq_export.compress.quant_linear import QuantLinear
from jpq_export.compress.statistics import Progress
from jpq_export.compress.vocabulary import TOKENS, tokens_in_cache


@dataclass(frozen=True, slots=True)
class TuneSettings:
    """`steps` of `batch` sequences; `scale_rate`: relative to the scale of two-bit codes, see `step_of`."""

    steps: int
    batch: int = 2
    scale_rate: float = 8e-3
    norm_rate: float = 1e-3
    warmup: int = 5


@torch.no_grad()
def teacher_hidden(teacher: Decoder, sequences: np.ndarray, *, batch: int = 4) -> Tensor:
    """Final hidden states, bf16 [n, length, hidden]; every rank computes a share and gets all."""
    mine, device = sequences[parallel.share(len(sequences))], teacher.embed.weight.device
    out = [torch.empty(0, sequences.shape[1], teacher.spec.hidden, dtype=torch.bfloat16, device=device)]
    for start in range(0, len(mine), batch):
        ids = torch.from_numpy(mine[start : start + batch]).to(device)
        with autocast(ids.device):
            out.append(teacher.hidden(ids, teacher.context(ids)).bfloat16())
    return parallel.joined(torch.cat(out))


def heldout_kl(teacher: Decoder, student: Decoder, sequences: np.ndarray) -> float:
    """Mean KL(teacher ‖ student) in fp32, nats per token; the number every gate looks at."""
    return float(token_kl(teacher, student, sequences).mean())


@torch.no_grad()
def token_kl(teacher: Decoder, student: Decoder, sequences: np.ndarray) -> Tensor:
    """KL(teacher ‖ student) of every token in fp32, nats: float64 [tokens]."""
    parts = []
    for row in sequences:
        ids = torch.from_numpy(row[None]).to(teacher.embed.weight.device)
        theirs, mine = (m.hidden(ids, m.context(ids))[0] for m in (teacher, student))
        for a, b in zip(theirs.split(TOKENS // 2), mine.split(TOKENS // 2), strict=True):
            p, q = F.log_softmax(teacher.logits(a), -1), F.log_softmax(student.logits(b), -1)
            parts.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1, dtype=torch.float64))
    return torch.cat(parts)


def trainable(student: Decoder) -> tuple[list[QuantLinear], list[nn.Parameter]]:
    """(layers with scales, norm weights) of the student."""
    layers = [m for m in student.modules() if isinstance(m, QuantLinear)]
    norms = [m.weight for m in student.modules() if isinstance(m, Norm)]
    return layers, norms


def tune(
    teacher: Decoder,
    student: Decoder,
    sequences: np.ndarray,
    settings: TuneSettings,
    *,
    seed: int,
    progress: Progress | None = None,
) -> list[float]:
    """Train in place; returns the training KL of every step (nats per token)."""
    start_training(student)
    layers, norms = trainable(student)
    optimizer, parameters = RelativeAdam(layers, norms, settings), [*(layer.scales for layer in layers), *norms]
    turns = list(schedule(len(sequences), settings, seed))
    used = np.unique(np.concatenate(turns)) if turns else np.empty(0, np.int64)  # few steps do not see all
    hidden, table = teacher_hidden(teacher, sequences[used]), head_table(teacher)
    losses = []
    for step, index in enumerate(turns):
        mine, loss = index[parallel.share(len(index))], 0.0
        if len(mine):
            ids = torch.from_numpy(sequences[mine]).to(hidden.device)
            target = hidden[torch.from_numpy(np.searchsorted(used, mine))]
            loss = distil_step(table, student, ids, target, tokens=sequences[index].size)
        losses.append(sum_gradients(parameters, loss))
        optimizer.step(step)
        if progress:
            progress(step + 1, settings.steps)
    stop_training(student)
    return losses


def sum_gradients(parameters: list[nn.Parameter], loss: float) -> float:
    """Gradients of the whole batch on every rank, from those of the ranks' shares; returns the sum of the losses."""
    if parallel.world() == 1:
        return loss
    told = torch.tensor([loss], device=parameters[0].device)
    flat = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    sums = parallel.add_up(torch.cat([*flat, told])).split([*(p.numel() for p in parameters), 1])
    for parameter, total in zip(parameters, sums, strict=False):  # the loss is behind them
        parameter.grad = total.view_as(parameter).clone()
    return float(sums[-1])


def start_training(student: Decoder) -> None:
    """Scales and norms want gradients."""
    dtype = torch.bfloat16 if fast_bf16(student.norm.weight.device.type) else torch.float32
    for module in student.modules():
        if isinstance(module, QuantLinear):
            module.start_training(dtype)
        elif isinstance(module, Norm):
            module.weight.requires_grad_(True)


def stop_training(student: Decoder) -> None:
    """Back to inference."""
    for module in student.modules():
        if isinstance(module, QuantLinear):
            module.stop_training()
        elif isinstance(module, Norm):
            module.weight.requires_grad_(False)


def schedule(count: int, settings: TuneSettings, seed: int) -> Iterator[np.ndarray]:
    """Sequence indices of every step: shuffled epochs."""
    generator, pool = np.random.default_rng(seed), np.empty(0, np.int64)
    for _ in range(settings.steps):
        while len(pool) < settings.batch:
            pool = np.concatenate([pool, generator.permutation(count)])
        yield pool[: settings.batch]
        pool = pool[settings.batch :]


def distil_step(
    teacher_table: Tensor, student: Decoder, ids: Tensor, target: Tensor, *, tokens: int | None = None
) -> float:
    """Accumulate gradients of KL(teacher ‖ student) for one batch; returns their sum over `tokens`.

    teacher_table: the teacher's head [vocab, hidden] in the fast type; ids [batch, seq]; target: the teacher's final
    hidden states [batch, seq, hidden]; tokens: of the batch that these are a share of, by default ids' own.
    """
    tokens = tokens or ids.numel()
    with autocast(ids.device), torch.enable_grad():
        hidden = student.hidden(ids, student.context(ids))
    flat, goal = hidden.detach().flatten(0, 1), target.flatten(0, 1)
    head = student.embed if student.head is None else student.head
    assert isinstance(head, QuantLinear)
    table = head.expanded()  # built once: it is a fifth of a small model
    gradient, table_gradient, total = torch.empty_like(flat), torch.zeros_like(table), 0.0
    with torch.no_grad():
        for begin in range(0, len(flat), TOKENS):
            rows = slice(begin, begin + TOKENS)
            piece = flat[rows].to(table.dtype)
            theirs, mine = goal[rows].to(teacher_table.dtype) @ teacher_table.T, piece @ table.T
            few = tokens_in_cache(mine.shape[1])
            for a, b in zip(theirs.split(few), mine.split(few), strict=True):
                loss, slope = kl_and_slope(a, b)
                b.copy_(slope.div_(tokens))
                total += loss
            gradient[rows] = (mine @ table).to(flat.dtype)
            table_gradient.addmm_(mine.T, piece)
    head.add_scale_gradient(table_gradient)
    hidden.backward(gradient.view_as(hidden))
    return total / tokens


def kl_and_slope(theirs: Tensor, mine: Tensor) -> tuple[float, Tensor]:
    """Sum over rows of KL(softmax(theirs) ‖ softmax(mine)), and its gradient by `mine`, q - p: fp32 [rows, vocab].

    Written out: autograd would pass a dozen times over the largest tensors of a step. The logarithm of a softmax's sum
    is its largest logit less the logarithm of its largest probability, which saves computing every exponential again.
    """
    theirs, mine = theirs.float(), mine.float()
    p, q = theirs.softmax(-1), mine.softmax(-1)
    their_sum, my_sum = (z.amax(-1) - r.amax(-1).log() for z, r in ((theirs, p), (mine, q)))
    loss = torch.linalg.vecdot(p, theirs - mine) + my_sum - their_sum
    return float(loss.sum()), q.sub_(p)


def step_of(codes: Tensor) -> Tensor:
    """How far a row's scales go a step, relative to those of two bits: float32 [N, 1] of codes [N, K].

    A change by 1% moves the outermost weight by 1% of half the levels in use: by the same part of a quantization step
    at every width when the rate falls with the levels. SmolLM2-135M, 30 steps, held-out KL at 2.58, 3.15 and 4.16 bits:
    0.833, 0.545, 0.181; with 3e-3 for all widths 0.840, 0.546, 0.182; with 8e-3 for all 0.839, -, 0.200.
    """
    levels = codes.amax(1, keepdim=True).float() - codes.amin(1, keepdim=True).float() + 1
    return (4 / levels).clamp(max=1)


class RelativeAdam:
    """Adam on log(scale) for scales (a step is relative to the scale) and plain Adam for norms; cosine to a tenth."""

    def __init__(self, layers: list[QuantLinear], norms: list[nn.Parameter], settings: TuneSettings) -> None:
        self.settings, self.scales, self.norms = settings, [layer.scales for layer in layers], norms
        self.starts = [scale.detach().log() for scale in self.scales]
        self.steps = [step_of(layer.codes) for layer in layers]
        self.moves = [nn.Parameter(torch.zeros_like(start)) for start in self.starts]  # log scale = start + step * move
        self.adam = torch.optim.Adam(
            [{"params": self.moves, "lr": settings.scale_rate}, {"params": norms, "lr": settings.norm_rate}],
            betas=(0.9, 0.99),
        )
        self.base = [settings.scale_rate, settings.norm_rate]

    @torch.no_grad()
    def step(self, step: int) -> None:
        """One update from the accumulated gradients, which are cleared."""
        progress = step / max(1, self.settings.steps)
        factor = min(1.0, (step + 1) / self.settings.warmup) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        for group, rate in zip(self.adam.param_groups, self.base, strict=True):
            group["lr"] = rate * factor
        for move, scale, far in zip(self.moves, self.scales, self.steps, strict=True):
            move.grad = None if scale.grad is None else scale.grad * scale * far  # d/d log s = s d/d s
            scale.grad = None
        self.adam.step()
        for move, scale, start, far in zip(self.moves, self.scales, self.starts, self.steps, strict=True):
            scale.copy_((start + far * move).exp())
        for norm in self.norms:
            norm.grad = None
