"""What the teacher is asked: the one place where compressing a decoder and compressing an encoder differ.

A decoder's signal is its next-token distribution, errors are KL in nats a token; an encoder's is its embedding, errors
are 1 - cosine a text. Both Fishers are the Hessian of that error, so prices and plans mean the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jpq_export.compress import encoder_statistics, encoder_tune, parallel, statistics, tune
from jpq_export.compress.encoder import Encoder
from jpq_export.compress.encoder_heldout import EncoderHeldout, text_errors
from jpq_export.compress.heldout import Heldout
from jpq_export.compress.model import Model
from jpq_export.compress.statistics import Statistics


@dataclass(frozen=True, slots=True)
class Teaching:
    """`collect`, `plain_statistics`: see `statistics`; `heldout`: see `Heldout`; `errors`: of every token or text.

    `priced`: the half of the held-out tokens or texts that prices are measured on.
    """

    collect: Callable[..., Statistics]
    plain_statistics: Callable[..., Statistics]
    heldout: Callable[..., Any]
    errors: Callable[..., Tensor]
    tune: Callable[..., list[float]]
    priced: Callable[[np.ndarray], np.ndarray]


def _beginnings(sequences: np.ndarray) -> np.ndarray:
    """Of every sequence [n, length], the first half: one unusual text weighs less than among half of the sequences.

    SmolLM2-135M, prices from 512 tokens against those from 4,096 others, standard deviation of their logarithms (2
    bits, whole sub-layers, half of them), twice: one sequence 0.29, 0.29, 0.40 and 0.14, 0.16, 0.17; two halves 0.17,
    0.23, 0.32 and 0.15, 0.15, 0.15.
    """
    return np.ascontiguousarray(sequences[:, : max(1, sequences.shape[1] // 2)])


def _half_of_the_texts(texts: np.ndarray) -> np.ndarray:
    """Half of the texts, whole: a text has one embedding."""
    return texts[: max(1, len(texts) // 2)]


DECODER = Teaching(statistics.collect, statistics.plain_statistics, Heldout, tune.token_kl, tune.tune, _beginnings)
ENCODER = Teaching(
    encoder_statistics.collect,
    encoder_statistics.plain_statistics,
    EncoderHeldout,
    text_errors,
    encoder_tune.tune,
    _half_of_the_texts,
)


def teaching_of(model: Model) -> Teaching:
    """How this kind of model is taught from."""
    return ENCODER if isinstance(model, Encoder) else DECODER


def shared_errors(teacher: Model, student: Model, sequences: np.ndarray) -> Tensor:
    """`errors` of all sequences [n, length], each rank having measured its share: float64, in order."""
    mine = sequences[parallel.share(len(sequences))]
    device = teacher.embed.weight.device
    part = torch.empty(0, dtype=torch.float64, device=device)
    if len(mine):
        part = teaching_of(teacher).errors(teacher, student, mine)
    return parallel.joined(part)


class SharedHeldout:
    """What `heldout` of a teaching measures, every rank keeping and measuring its share of the sequences only."""

    def __init__(self, teacher: Model, sequences: np.ndarray) -> None:
        mine = sequences[parallel.share(len(sequences))]
        self.part = len(mine) / len(sequences)
        self.device = teacher.embed.weight.device
        self.heldout = teaching_of(teacher).heldout(teacher, mine) if len(mine) else None

    def kl_of(self, model: Model) -> float:
        """Mean error over all sequences, which are equally long; the same number on every rank."""
        own = self.heldout.kl_of(model) if self.heldout is not None else 0.0
        return float(parallel.add_up(torch.tensor(own * self.part, dtype=torch.float64, device=self.device)))
