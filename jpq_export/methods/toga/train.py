"""Training of the hypernetwork: language-model loss through the frozen supernet plus the penalty on its size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from jpq_export.compress.statistics import Progress
from jpq_export.methods.toga.hypernetwork import Hypernetwork, Masks, sample, straight_through

PUBLISHED_STEPS = {"bits": 2_000, "joint": 10_000}
PUBLISHED_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class Training:
    """Settings as published, but for `steps` and `rate`; `fractions`: range of sizes, of the largest, to train for."""

    steps: int
    rate: float = PUBLISHED_RATE
    fractions: tuple[float, float] = (0.5, 0.5)
    weight_decay: float = 0.05
    penalty: float = 16.0


class Supernet(Protocol):
    """What is trained through."""

    def loss(self, masks: Masks, step: int) -> Tensor:
        """Cross entropy (nats) of the batch of this step."""
        ...

    def size(self, masks: Masks) -> Tensor:
        """Size as a fraction of the largest; differentiable."""
        ...


def rate_for(steps: int, *, published: int) -> float:
    """The published rate, raised where there are fewer steps: Adam moves a logit by about rate times steps.

    At the published rate 30 steps leave every mask at its start. Capped where training a toy began to diverge.
    """
    return min(1e-2, PUBLISHED_RATE * max(1.0, published / steps))


@torch.enable_grad()
def train(
    network: Hypernetwork, supernet: Supernet, training: Training, *, seed: int, progress: Progress | None = None
) -> list[float]:
    """Losses (cross entropy + penalty * |log(size / target)|) of all steps; `network` is trained in place."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=training.rate, weight_decay=training.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    low, high = training.fractions
    losses = []
    for step in range(training.steps):
        target = low + (high - low) * float(torch.rand((), generator=generator))
        masks = sample(network(target), generator)
        size = supernet.size(straight_through(masks))
        loss = supernet.loss(masks, step) + training.penalty * (size / target).log().abs()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if progress:
            progress(step + 1, training.steps)
    return losses
