"""The loop of recovery, whatever the model: steps on scales and norms, which may be killed, resumed and stopped early.

What a step computes is the caller's (`tune`, `encoder_tune`). A checkpoint holds everything that later steps depend on,
so a run that was killed ends with the numbers of one that was not.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from jpq_export.compress import parallel
from jpq_export.compress.quant_linear import QuantLinear
from jpq_export.compress.statistics import Progress
from jpq_export.format.tensor_file import save_tensors

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60  # between two files of 12 bytes a scale, 16 once an error was measured


@dataclass(frozen=True, slots=True)
class TuneSettings:
    """`steps` of `batch` sequences; `scale_rate`: relative to the scale of two-bit codes, see `step_of`.

    `measured_every`: steps between two held-out errors, 0 for none; the step with the lowest is what stays, and after
    `patience` measurements without a lower one no further steps are made.
    """

    steps: int
    batch: int = 2
    scale_rate: float = 8e-3
    norm_rate: float = 1e-3
    warmup: int = 5
    measured_every: int = 0
    patience: int = 2


@dataclass(slots=True)
class Checkpoint:
    """The file of an unfinished recovery; under torchrun rank 0 alone touches it."""

    path: Path
    saved: float = field(default_factory=time.monotonic)

    def load(self) -> dict[str, Tensor]:
        """What the file holds; nothing when it is not there or, which is said, damaged."""
        try:
            return load_file(self.path) if self.path.is_file() else {}
        except (OSError, SafetensorError) as error:
            logger.warning("%s: damaged (%s); recovery starts again", self.path, error)
            return {}

    def save(self, tensors: dict[str, Tensor]) -> None:
        """Write, and rename only when all is written; StorageError when the system refuses."""
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        save_tensors(temporary, {name: tensor.cpu().numpy() for name, tensor in tensors.items()})
        os.replace(temporary, self.path)
        self.saved = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time for the next."""
        return time.monotonic() - self.saved > CHECKPOINT_SECONDS


@dataclass(slots=True)
class Guard:
    """What keeps a recovery: a file to go on from, and the held-out error that says when it is enough."""

    checkpoint: Checkpoint | None = None
    error: Callable[[], float] | None = None  # of the student as it is; asked every `measured_every` steps


@dataclass(slots=True)
class Course:
    """How far a recovery is: the training error of every step and [step, held-out error] of every measurement."""

    losses: list[float] = field(default_factory=list)
    measured: list[tuple[int, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)  # parameters at the lowest held-out error

    def add(self, error: float, parameters: Callable[[], dict[str, Tensor]]) -> None:
        """A measurement after the steps so far; an error that is no number counts as the highest."""
        error = error if math.isfinite(error) else math.inf
        if error < min((other for _, other in self.measured), default=math.inf):
            self.best = parameters()
        self.measured.append((len(self.losses), error))

    def enough(self, patience: int) -> bool:
        """True after `patience` measurements in a row that were not the lowest."""
        errors = [error for _, error in self.measured]
        return len(errors) > patience and min(errors[-patience:]) >= min(errors[:-patience])


def run_steps(
    optimizer: RelativeAdam,
    turns: list[np.ndarray],
    one_step: Callable[[np.ndarray], float],
    *,
    guard: Guard | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """All steps, or up to where the held-out error stops falling; returns the training error of every step.

    `one_step` takes a turn's sequence indices, leaves gradients of this rank's share of them, and returns its error.
    """
    settings, guard = optimizer.settings, guard or Guard()
    saved = parallel.once(guard.checkpoint.load) if guard.checkpoint else {}
    course = optimizer.restore(saved) if saved else Course()
    for step in range(len(course.losses), len(turns)):
        course.losses.append(sum_gradients(optimizer.trained, one_step(turns[step])))
        optimizer.step(step)
        if guard.error and _measured_after(step, settings):
            course.add(parallel.once(float, guard.error()), optimizer.parameters)  # rank 0's, to the last bit
            if course.enough(settings.patience):
                break
        if guard.checkpoint and parallel.lead() and guard.checkpoint.due:
            guard.checkpoint.save(optimizer.state(course))
        if progress:
            progress(step + 1, settings.steps)
    if course.best:
        optimizer.set_parameters(course.best)
    return course.losses


def _measured_after(step: int, settings: TuneSettings) -> bool:
    """Every so many steps, and after the last."""
    every = settings.measured_every
    return bool(every) and ((step + 1) % every == 0 or step + 1 == settings.steps)


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


def schedule(count: int, settings: TuneSettings, seed: int) -> Iterator[np.ndarray]:
    """Sequence indices of every step: shuffled epochs."""
    generator, pool = np.random.default_rng(seed), np.empty(0, np.int64)
    for _ in range(settings.steps):
        while len(pool) < settings.batch:
            pool = np.concatenate([pool, generator.permutation(count)])
        yield pool[: settings.batch]
        pool = pool[settings.batch :]


SORTED_AT_ONCE = 4096  # rows: what sorting them takes beside their codes


def step_of(codes: Tensor) -> Tensor:
    """How far a row's scales go a step, relative to those of two bits: float32 [N, 1] of codes (or levels) [N, K].

    A change by 1% moves the outermost weight by 1% of half the levels in use: by the same part of a quantization step
    at every width when the rate falls with the levels. SmolLM2-135M, 30 steps, held-out KL at 2.58, 3.15 and 4.16 bits:
    0.833, 0.545, 0.181; with 3e-3 for all widths 0.840, 0.546, 0.182; with 8e-3 for all 0.839, -, 0.200.
    """
    parts = [part.sort(1).values.diff(dim=1).ne(0).sum(1, keepdim=True) + 1 for part in codes.split(SORTED_AT_ONCE)]
    return (4 / torch.cat(parts)).clamp(max=1)


class RelativeAdam:
    """Adam on log(scale) for scales (a step is relative to the scale) and plain Adam for norms; cosine to a tenth."""

    def __init__(self, layers: list[QuantLinear], norms: list[nn.Parameter], settings: TuneSettings) -> None:
        self.settings, self.scales, self.norms = settings, [layer.scales for layer in layers], norms
        self.trained = [*self.scales, *norms]
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
        self._set_scales()
        for norm in self.norms:
            norm.grad = None

    def _set_scales(self) -> None:
        for move, scale, start, far in zip(self.moves, self.scales, self.starts, self.steps, strict=True):
            scale.copy_((start + far * move).exp())

    def parameters(self) -> dict[str, Tensor]:
        """A copy of what is trained, by place."""
        return {str(i): part.detach().clone() for i, part in enumerate((*self.moves, *self.norms))}

    @torch.no_grad()
    def set_parameters(self, found: dict[str, Tensor]) -> None:
        """Back to such a copy."""
        for i, part in enumerate((*self.moves, *self.norms)):
            part.copy_(found[str(i)])
        self._set_scales()

    def state(self, course: Course) -> dict[str, Tensor]:
        """All that later steps depend on, by name."""
        out = {f"now/{name}": part for name, part in self.parameters().items()}
        out |= {f"best/{name}": part for name, part in course.best.items()}
        for i, moments in self.adam.state_dict()["state"].items():
            out |= {f"adam/{i}/{name}": value for name, value in moments.items()}
        for name in ("losses", "measured"):
            if values := getattr(course, name):
                out[name] = torch.tensor(values, dtype=torch.float64)
        return out

    def restore(self, found: dict[str, Tensor]) -> Course:
        """Undo `state`."""
        parts: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "adam": {}}
        for name, tensor in found.items():
            kind, _, key = name.partition("/")
            if kind in parts:
                parts[kind][key] = tensor
        self.set_parameters(parts["now"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["adam"].items():
            i, _, key = name.partition("/")
            moments.setdefault(int(i), {})[key] = (
                tensor.reshape(()) if key == "step" else tensor
            )  # files have no scalars
        self.adam.load_state_dict({"state": moments, "param_groups": self.adam.state_dict()["param_groups"]})
        measured = found.get("measured", torch.empty(0, 2)).tolist()
        return Course(found["losses"].tolist(), [(int(step), error) for step, error in measured], parts["best"])
