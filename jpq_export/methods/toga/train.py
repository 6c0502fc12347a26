"""Training of the hypernetwork: language-model loss through the frozen supernet plus the penalty on its size."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol

import torch
from torch import Tensor

from jpq_export.compress.statistics import Progress
from jpq_export.methods.toga.hypernetwork import Hypernetwork, Masks, sample, straight_through

PUBLISHED_STEPS = {"bits": 2_000, "joint": 10_000}
PUBLISHED_RATE = 1e-3
KEPT_EVERY = 50  # steps: some minutes on a CPU, and 0.3 GB written for 135M parameters

logger = logging.getLogger(__name__)


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
    network: Hypernetwork,
    supernet: Supernet,
    training: Training,
    *,
    seed: int,
    unfinished: Path | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Losses (cross entropy + penalty * |log(size / target)|) of all steps; `network` is trained in place.

    unfinished: file of a training that was stopped: it goes on from there, and ends as if it had not been.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=training.rate, weight_decay=training.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    low, high = training.fractions
    losses = _restore(unfinished, network, optimizer, generator) if unfinished else []
    for step in range(len(losses), training.steps):
        target = low + (high - low) * float(torch.rand((), generator=generator))
        masks = sample(network(target), generator)
        size = supernet.size(straight_through(masks))
        loss = supernet.loss(masks, step) + training.penalty * (size / target).log().abs()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if unfinished and len(losses) % KEPT_EVERY == 0:
            _keep(unfinished, network, optimizer, generator, losses)
        if progress:
            progress(step + 1, training.steps)
    return losses


def _keep(
    path: Path, network: Hypernetwork, optimizer: torch.optim.Optimizer, generator: torch.Generator, losses: list[float]
) -> None:
    """The file gets its name when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    torch.save(state | {"generator": generator.get_state(), "losses": losses}, temporary)
    os.replace(temporary, path)


def _restore(
    path: Path, network: Hypernetwork, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> list[float]:
    """Losses of the steps that were made; none when there is no such file or it is damaged."""
    if not path.exists():
        return []
    try:
        state = torch.load(path, map_location=network.inputs.device, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, EOFError, KeyError, ValueError, UnpicklingError) as error:
        logger.warning("%s: cannot be read (%s); training starts again", path, error)
        return []
    generator.set_state(state["generator"].cpu())
    return state["losses"]
