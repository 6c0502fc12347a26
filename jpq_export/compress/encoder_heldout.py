"""The true error of a sentence encoder on held-out texts: one minus the cosine to the teacher's embedding."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from jpq_export.compress.encoder import Encoder
from jpq_export.compress.encoder_statistics import direction
from jpq_export.compress.precision import autocast

BATCH = 32  # texts


class EncoderHeldout:
    """The teacher's embeddings of held-out texts, against which candidates are measured."""

    @torch.no_grad()
    def __init__(self, teacher: Encoder, sequences: np.ndarray) -> None:
        self.teacher = teacher
        self.ids = torch.from_numpy(sequences).to(teacher.embed.weight.device)
        self.context = teacher.context(self.ids)
        self.goal = embed(teacher, self.ids)

    @torch.no_grad()
    def kl_of(self, model: Encoder) -> float:
        """Mean 1 - cosine of a candidate; in the place of a decoder's KL."""
        return float(distance(self.goal, embed(model, self.ids)).mean())

    def stream_kl(self, stream: Tensor) -> float:
        """The same from token states [texts, seq, hidden]."""
        return float(distance(self.goal, direction(self.teacher, stream, self.context)).mean())


@torch.no_grad()
def embed(model: Encoder, ids: Tensor) -> Tensor:
    """Embeddings of length one, in the fast type: ids [texts, seq] -> fp32 [texts, hidden]."""
    out = []
    for part in ids.split(BATCH):
        context = model.context(part)
        with autocast(part.device):
            hidden = model.hidden(part, context)
        out.append(direction(model, hidden, context))
    return torch.cat(out)


def distance(goal: Tensor, value: Tensor) -> Tensor:
    """1 - cosine of vectors of length one, as half the squared distance: exact near zero, float64 [...]."""
    return (goal.double() - value.double()).square().sum(-1) / 2


@torch.no_grad()
def text_errors(teacher: Encoder, student: Encoder, sequences: np.ndarray) -> Tensor:
    """1 - cosine of every text's embedding in fp32: float64 [texts]."""
    parts = []
    for start in range(0, len(sequences), BATCH):
        ids = torch.from_numpy(sequences[start : start + BATCH]).to(teacher.embed.weight.device)
        context = teacher.context(ids)
        goal, mine = (direction(m, m.hidden(ids, context), context) for m in (teacher, student))
        parts.append(distance(goal, mine))
    return torch.cat(parts)
