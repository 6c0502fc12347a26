"""Bits of every layer by Bayesian optimisation: a Gaussian process and expected improvement, by BoTorch.

The memory cap is known exactly, so only combinations below it are ever proposed: random ones and changes of the best so
far. (Optuna's GPSampler has to learn a cap from trials: with proposals lowered to fit it missed the optimum of 56
combinations in 25 trials for 7 of 10 seeds.) The process is fitted to the logarithm of the loss, which spans decades.
A proposal is a function of the finished trials and the seed alone, so a stopped search goes on from its journal and
ends as if it had not been stopped.
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jpq_export.compress.statistics import Progress

RANDOM = 512  # random combinations among which a proposal is chosen
ELITE = 3  # best trials whose changes by one or two layers are among them too
PAIRS = 400  # changes by two layers, of each of those
LEAST_LOSS = 1e-9  # nats: below what float32 can tell from nothing
Levels = tuple[int, ...]  # index of a layer's width

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Space:
    """`sizes[layer][level]`: bytes of a layer at each width, rising; `fixed`: of what has no choice; `cap`: of all.

    `order`: layers in the order in which a combination that is too large is lowered.
    """

    sizes: tuple[tuple[int, ...], ...]
    fixed: int
    cap: int
    order: tuple[int, ...]

    def bytes(self, levels: Levels) -> int:
        """Of the whole model."""
        return self.fixed + sum(row[level] for row, level in zip(self.sizes, levels, strict=True))

    @property
    def least(self) -> int:
        """Bytes with every layer at its lowest width."""
        return self.bytes((0,) * len(self.sizes))

    def fitted(self, levels: Levels, generator: np.random.Generator | None = None) -> Levels:
        """`levels`, lowered step by step until they fit: in `order`, widest first, or at random.

        They must fit at their lowest.
        """
        now = list(levels)
        while self.bytes(tuple(now)) > self.cap:
            highest = max(now)
            if generator is not None:
                layer = int(generator.choice([i for i, level in enumerate(now) if level]))
            else:
                layer = next(i for i in self.order if now[i] == highest)
            now[layer] -= 1
        return tuple(now)


@dataclass(frozen=True, slots=True)
class Trial:
    """One measured combination; `loss`: lower is better."""

    levels: Levels
    bytes: int
    loss: float


def search(
    space: Space,
    start: Sequence[Levels],
    measure: Callable[[Levels], float],
    *,
    trials: int,
    seed: int,
    journal: Path | None = None,
    progress: Progress | None = None,
) -> list[Trial]:
    """All trials in order: those of `start` first (lowered to fit, once each), then proposals.

    `journal`: file of the resumable study; trials it holds already are not measured again. Ends early when the space
    has no combination left.
    """
    begin = tuple(dict.fromkeys(space.fitted(levels) for levels in start))[:trials]
    done = finished(space, journal)[:trials]
    while len(done) < trials:
        if progress and done:
            progress(len(done), trials)
        levels = begin[len(done)] if len(done) < len(begin) else _proposal(space, done, seed)
        if levels is None:
            break
        done.append(Trial(levels, space.bytes(levels), measure(levels)))
        if journal is not None:
            _append(journal, done[-1])
    if progress:
        progress(len(done), max(1, len(done)))
    return done


def best(trials: Sequence[Trial]) -> Trial:
    """Lowest loss; of equals the smallest, then the first."""
    return min(trials, key=lambda trial: (trial.loss, trial.bytes))


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that no other beats in bytes and loss, by rising bytes."""
    out: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (t.bytes, t.loss)):
        if not out or trial.loss < out[-1].loss:
            out.append(trial)
    return out


def _proposal(space: Space, done: Sequence[Trial], seed: int) -> Levels | None:
    """The combination with the largest expected improvement that was not measured; None when all were."""
    generator = np.random.default_rng([seed, len(done)])
    seen = {trial.levels for trial in done}
    candidates = [levels for levels in _candidates(space, done, generator) if levels not in seen]
    return candidates[_most_promising(space, done, candidates)] if candidates else None


def _candidates(space: Space, done: Sequence[Trial], generator: np.random.Generator) -> list[Levels]:
    """Combinations below the cap, each once, in an order of their own."""
    levels = [len(row) for row in space.sizes]
    out = [space.fitted(tuple(generator.integers(levels).tolist()), generator) for _ in range(RANDOM)]
    for trial in sorted(done, key=lambda t: t.loss)[:ELITE]:
        single = [_with(trial.levels, i, level) for i, count in enumerate(levels) for level in range(count)]
        out += [each for each in single if space.bytes(each) <= space.cap]
        for _ in range(PAIRS):
            first, second = generator.integers(len(levels), size=2)
            both = _with(trial.levels, first, generator.integers(levels[first]))
            both = _with(both, second, generator.integers(levels[second]))
            out += [both] if space.bytes(both) <= space.cap else []
    return list(dict.fromkeys(out))


def _with(levels: Levels, layer: int, level: int) -> Levels:
    return (*levels[:layer], int(level), *levels[layer + 1 :])


def _most_promising(space: Space, done: Sequence[Trial], candidates: Sequence[Levels]) -> int:
    """Index of the candidate with the largest expected improvement under a Gaussian process fitted to `done`."""
    import torch
    from botorch.acquisition.analytic import LogExpectedImprovement
    from botorch.exceptions.warnings import BotorchWarning, InputDataWarning
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from gpytorch.mlls import ExactMarginalLogLikelihood

    top = torch.tensor([len(row) - 1.0 for row in space.sizes], dtype=torch.float64).clamp(min=1)
    X = torch.tensor([trial.levels for trial in done], dtype=torch.float64) / top  # [trials, layers]
    y = -torch.tensor([[math.log(max(trial.loss, LEAST_LOSS))] for trial in done], dtype=torch.float64)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore", BotorchWarning)
        warnings.simplefilter("ignore", InputDataWarning)
        model = SingleTaskGP(X, y)  # standardises y
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        gain = LogExpectedImprovement(model, best_f=y.max())
        points = torch.tensor(candidates, dtype=torch.float64) / top
        with torch.no_grad():
            return int(gain(points[:, None]).argmax())


def finished(space: Space, journal: Path | None) -> list[Trial]:
    """Trials of the journal in order; a last line that was cut off is dropped."""
    if journal is None or not journal.exists():
        return []
    lines = journal.read_text(encoding="utf-8").splitlines()
    trials = []
    for line in lines:
        try:
            raw = json.loads(line)
            levels = tuple(raw["levels"])
            trials.append(Trial(levels, space.bytes(levels), float(raw["loss"])))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            logger.warning("%s: trial %d cannot be read (%r); going on from there", journal, len(trials), error)
            break
    if len(trials) < len(lines):
        journal.write_text("".join(_line(trial) for trial in trials), encoding="utf-8")
    return trials


def _append(journal: Path, trial: Trial) -> None:
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a", encoding="utf-8") as file:
        file.write(_line(trial))
        file.flush()
        os.fsync(file.fileno())


def _line(trial: Trial) -> str:
    return json.dumps(asdict(trial)) + "\n"
