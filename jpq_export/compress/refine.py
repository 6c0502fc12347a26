"""True KL corrects the additive price list: candidate plans are assembled from cached rounded weights and measured.

The sum of separate prices misses how errors add up (2-bit errors worst) and how pruning and rounding interact. A few
factors on groups of prices (`Knobs`) are tried one after the other, each candidate solved exactly and measured on
held-out text; what measures best stays. Candidate quality is before recovery, equally for all. The best of each kind
go on as finalists: they are rounded with all of the calibration text before one is chosen (see `stages`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jpq_export.compress.apply import COLUMNS_OF, ROWS_OF, LayerChoice, kept_rows, prune
from jpq_export.compress.decoder import named_weights
from jpq_export.compress.grid import grid_of
from jpq_export.compress.model import Model, build_model
from jpq_export.compress.prices import PriceList, RoundedCache
from jpq_export.compress.rounding import nearest, search_scales
from jpq_export.compress.search import Knobs, Solution
from jpq_export.errors import BudgetError
from jpq_export.format.encoder_spec import is_table

TRIALS: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("removal", (float("inf"), 2.0, 1.4, 0.6)),
    ("table", (0.6, 1.6)),
    ("two_bit", (float("inf"), 1.4, 0.75)),
    ("attention", (0.65, 1.5)),
)
# What rounding and recovery win back of a candidate's measured KL: of the part priced to bits 0.54 (2.58 bits) to 0.69
# (4.16) stays, of the part priced to removed units about 0.82. Without this the search prunes too much.
REMOVAL_LASTS = 1.35


@dataclass(frozen=True, slots=True)
class Trial:
    """One measured candidate."""

    knobs: Knobs
    solution: Solution
    kl: float

    @property
    def score(self) -> float:
        """What candidates are ordered by: the measured KL, with the share of removal weighed as lasting longer."""
        removal = sum(option.removal_price for option in self.solution.picks.values())
        if not removal:
            return self.kl
        removal /= self.knobs.removal
        bits = self.solution.price - removal * self.knobs.removal
        return self.kl * (bits + REMOVAL_LASTS * removal) / (bits + removal)

    def told(self) -> dict[str, float]:
        """Its numbers, for the plan's file."""
        return {"kl": self.kl, "score": self.score, "predicted": self.solution.price}

    def kind(self, prices: PriceList, *, by_bits: bool) -> tuple[bool, bool]:
        """(prunes, uses 2 bits or less if `by_bits`): plans of one kind mostly differ in little.

        SmolLM2-135M, 4.0 bits, nothing removed: rounded, the plans with and without 2 bits are 0.8% apart, which is not
        worth the minutes of a second rounding. A sentence encoder at 2.5 bits: 0.214 with pruning, 0.141 without.
        """
        return prunes(prices, self.solution), by_bits and min(bits_of(self.solution).values(), default=8) <= 2


def prunes(prices: PriceList, solution: Solution) -> bool:
    """True when any unit is removed."""
    return any(solution.picks[name].kept < len(s.order) for name, s in prices.structures.items())


def finalists(trials: list[Trial], prices: PriceList, limit: int, *, by_bits: bool, within: float) -> list[Trial]:
    """The best trial of each kind, best first, at most `limit`, none with a score above `within` times the best."""
    best: dict[tuple[bool, bool], Trial] = {}
    for trial in trials:
        best.setdefault(trial.kind(prices, by_bits=by_bits), trial)
    return [t for t in best.values() if t.score <= within * trials[0].score][:limit]


def layer_choices(prices: PriceList, solution: Solution) -> tuple[LayerChoice, ...]:
    """Kept heads and channels of every layer, sorted, from the picks."""
    out = []
    for i, layer in enumerate(prices.spec.layers):
        kept = {}
        for sub, units in (("attn", layer.kv_heads), ("mlp", layer.ffn)):
            name = f"layers.{i}.{sub}"
            if name not in solution.picks:
                kept[sub] = tuple(range(units))
                continue
            count = solution.picks[name].kept
            kept[sub] = tuple(sorted(prices.structures[name].order[units - count :])) if count else ()
        out.append(LayerChoice(kept["attn"], kept["mlp"]))
    return tuple(out)


def bits_of(solution: Solution) -> dict[str, float]:
    """Bits of every kept matrix by canonical name."""
    out = {}
    for name, option in solution.picks.items():
        for short, bits in option.bits:
            out[name if is_table(name) else f"layers.{name.split('.')[1]}.{short}"] = bits
    return out


def assemble(teacher: Model, prices: PriceList, solution: Solution, cache: RoundedCache) -> Model:
    """The candidate: pruned teacher with rounded weights, no refit, no propagated error."""
    choices = layer_choices(prices, solution)
    model = prune(teacher, choices)
    weights = dict(named_weights(model))
    full = named_weights(teacher)
    for name, bits in bits_of(solution).items():
        weight = _rounded(name, bits, full[name], cache, prices)
        if name.startswith("layers."):
            i, part = int(name.split(".")[1]), name.split(".", 2)[2]
            rows = kept_rows(teacher, i, choices[i])
            if (index := rows.get(ROWS_OF.get(part, ""))) is not None:
                weight = weight[index]
            if part in COLUMNS_OF and (index := rows[COLUMNS_OF[part]]) is not None:
                weight = weight[:, index]
        weights[name] = weight
    return build_model(model.spec, weights)


def _rounded(name: str, bits: float, full: Tensor, cache: RoundedCache, prices: PriceList) -> Tensor:
    if (name, bits) in cache.entries:
        return cache.weight(name, bits)
    scheme = prices.scheme(full.shape[1], bits)  # 5 bits and up: nearest is within a few percent of GPTQ
    grid = grid_of(scheme, len(full), full.device)
    importance = torch.ones(full.shape[1], device=full.device)
    scales, zeros = search_scales(full, importance, grid, scheme.group_size, symmetric=True)
    return nearest(full, scales, zeros, grid).dequantize()


def refine(
    solve: Callable[[Knobs], Solution],
    teacher: Model,
    prices: PriceList,
    cache: RoundedCache,
    heldout: Any,
    *,
    start: Knobs,
    trials: tuple[tuple[str, tuple[float, ...]], ...] = TRIALS,
    progress: Callable[[int, int], None] | None = None,
) -> list[Trial]:
    """Coordinate search over the knobs; all measured trials, best first."""
    done: dict[tuple, Trial] = {}
    total = 1 + sum(len(values) for _, values in trials)

    def measure(knobs: Knobs) -> Trial | None:
        try:
            solution = solve(knobs)
        except BudgetError:
            if knobs == start:
                raise
            return None  # without pruning this budget cannot be met: not a candidate
        key = tuple(sorted((name, option.kept, option.bits) for name, option in solution.picks.items()))
        if key not in done:
            kl = heldout.kl_of(assemble(teacher, prices, solution, cache))
            done[key] = Trial(knobs, solution, kl)
        return done[key]

    best, count = measure(start), 1
    assert best is not None
    if progress:
        progress(count, total)
    for knob, values in trials:
        if knob == "removal" and start.removal == float("inf"):
            continue
        base = best.knobs
        for value in values:
            current = getattr(base, knob)
            trial = measure(replace(base, **{knob: value if value == float("inf") else current * value}))
            if trial is not None and trial.score < best.score:
                best = trial
            count += 1
            if progress:
                progress(count, total)
        if knob == "removal" and not prunes(prices, best.solution):
            # Nothing is worth removing: from here on the same search as without pruning.
            best = measure(replace(best.knobs, removal=float("inf"))) or best
    if prunes(prices, best.solution):
        measure(replace(best.knobs, removal=float("inf")))  # what pruning is weighed against
    return sorted(done.values(), key=lambda t: t.score)
