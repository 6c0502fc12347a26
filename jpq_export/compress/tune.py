"""End-to-end recovery: scales and norms of the compressed model learn to reproduce the teacher's output distribution.

Codes stay frozen, so the packed bytes do not change (as in EfficientQAT's second phase, Chen et al., 2024). The loss is
the full KL(teacher ‖ student) over the vocabulary; the teacher's final hidden states are kept in bf16 (2 * hidden bytes
a token) and its logits are rebuilt chunk by chunk, which costs less than storing them. Under torchrun every process
takes its share of each step's sequences.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jpq_export.compress import parallel
from jpq_export.compress.decoder import Decoder, Norm
from jpq_export.compress.precision import autocast, fast_bf16, head_table
from jpq_export.compress.quant_linear import QuantLinear
from jpq_export.compress.statistics import Progress
from jpq_export.compress.training import Guard, RelativeAdam, TuneSettings, run_steps, schedule
from jpq_export.compress.vocabulary import TOKENS, tokens_in_cache


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
    guard: Guard | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Train in place; returns the training KL of every step (nats per token)."""
    start_training(student)
    optimizer = RelativeAdam(*trainable(student), settings)
    turns = list(schedule(len(sequences), settings, seed))
    used = np.unique(np.concatenate(turns)) if turns else np.empty(0, np.int64)  # few steps do not see all
    hidden, table = teacher_hidden(teacher, sequences[used]), head_table(teacher)

    def one_step(index: np.ndarray) -> float:
        mine = index[parallel.share(len(index))]
        if not len(mine):
            return 0.0
        ids = torch.from_numpy(sequences[mine]).to(hidden.device)
        target = hidden[torch.from_numpy(np.searchsorted(used, mine))]
        return distil_step(table, student, ids, target, tokens=sequences[index].size)

    losses = run_steps(optimizer, turns, one_step, guard=guard, progress=progress)
    stop_training(student)
    return losses


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
    gradient, table_gradient = torch.empty_like(flat), torch.zeros_like(table)
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    with torch.no_grad():
        for begin in range(0, len(flat), TOKENS):
            rows = slice(begin, begin + TOKENS)
            piece = flat[rows].to(table.dtype)
            theirs, mine = goal[rows].to(teacher_table.dtype) @ teacher_table.T, piece @ table.T
            few = tokens_in_cache(mine.shape[1], mine.device)
            for a, b in zip(theirs.split(few), mine.split(few), strict=True):
                loss, slope = kl_and_slope(a, b)
                b.copy_(slope.div_(tokens))
                total += loss
            gradient[rows] = (mine @ table).to(flat.dtype)
            table_gradient.addmm_(mine.T, piece)
    head.add_scale_gradient(table_gradient)
    hidden.backward(gradient.view_as(hidden))
    return float(total) / tokens


def kl_and_slope(theirs: Tensor, mine: Tensor) -> tuple[Tensor, Tensor]:
    """KL(softmax(theirs) ‖ softmax(mine)) summed, float64 [], and its gradient by `mine`, q - p: fp32 [rows, vocab].

    Written out: autograd would pass a dozen times over the largest tensors of a step. The logarithm of a softmax's sum
    is its largest logit less the logarithm of its largest probability, which saves computing every exponential again.
    """
    theirs, mine = theirs.float(), mine.float()
    p, q = theirs.softmax(-1), mine.softmax(-1)
    their_sum, my_sum = (z.amax(-1) - r.amax(-1).log() for z, r in ((theirs, p), (mine, q)))
    loss = torch.linalg.vecdot(p, theirs - mine) + my_sum - their_sum
    return loss.sum(dtype=torch.float64), q.sub_(p)
