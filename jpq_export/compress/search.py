"""The one search: every sub-layer picks a width, every matrix a bit-width, under one budget, with a certified gap.

The problem is a multiple-choice knapsack: one class per sub-layer (structure x bits of its matrices, reduced to its
Pareto front) and one per table; minimise the sum of prices under a budget of bytes or of microseconds. Solved by
dynamic programming over the budget in RESOLUTION steps; the Lagrangian dual gives a lower bound, so the answer comes
with the fraction by which any plan could still be better (Sinha and Zoltners, 1979).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np

from jpq_export.compress.cost import CostModel
from jpq_export.compress.prices import PriceList
from jpq_export.errors import BudgetError
from jpq_export.format.encoder_spec import is_table
from jpq_export.format.plan import Budget
from jpq_export.numerics.scheme import BIT_WIDTHS

RESOLUTION = 12_000
FRONT_POINTS = 40


@dataclass(frozen=True, slots=True)
class Knobs:
    """Corrections of the additive price list, chosen by true KL (see refine): factors on groups of prices.

    `removal` inf forbids pruning; `two_bit` multiplies the price of weights of at most 2 bits, whose errors add up
    worst, and inf forbids them: at 2.58 bits SmolLM2 is then better pruned to 3 bits (KL 1.32 against 1.37, not
    predicted by prices).
    """

    removal: float = 1.0
    table: float = 1.0
    attention: float = 1.0
    two_bit: float = 1.0


def start_knobs(*, prune: bool) -> Knobs:
    """Prices as they are; without pruning nothing may be removed at any price."""
    return Knobs() if prune else Knobs(removal=float("inf"))


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a class: `kept` units (0 = removed), bits by short matrix name, its price and costs."""

    kept: int
    bits: tuple[tuple[str, float], ...]
    price: float
    removal_price: float
    bytes: int
    microseconds: float


@dataclass(frozen=True, slots=True)
class Class:
    """A sub-layer ("layers.3.attn") or table ("embed"), with its Pareto-optimal options in order of rising cost."""

    name: str
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class Solution:
    """Chosen options by class name."""

    picks: dict[str, Option]
    bytes: int
    microseconds: float
    price: float
    gap: float
    multiplier: float = field(default=0.0)  # price per byte (or microsecond) at the optimum


def build_classes(
    prices: PriceList, cost: CostModel, *, by: str, knobs: Knobs, bits: tuple[float, ...] = BIT_WIDTHS
) -> list[Class]:
    """All classes of a model. `by`: "bytes" or "microseconds", the budgeted cost the Pareto fronts are taken over."""
    spec = prices.spec
    if math.isinf(knobs.two_bit):
        bits = tuple(b for b in bits if b > 2)
        if not bits:
            raise BudgetError("no width above 2 bits may be used; add one to --widths")
    classes = []
    for name in filter(is_table, prices.matrices):
        options = []
        for b in bits:
            size, time = cost.table(name, prices.scheme(spec.hidden, b))
            price = prices.matrices[name][b] * knobs.table * (knobs.two_bit if b <= 2 else 1)
            options.append(Option(1, ((name, b),), price, 0.0, size, time))
        classes.append(Class(name, pareto(options, by)))
    for name in prices.structures:
        classes.append(Class(name, pareto(_sublayer_options(name, prices, cost, knobs, bits), by)))
    return classes


def _sublayer_options(
    name: str, prices: PriceList, cost: CostModel, knobs: Knobs, bits: tuple[float, ...]
) -> list[Option]:
    _, index, sub = name.split(".")
    i, structure = int(index), prices.structures[name]
    units, spec = len(structure.order), prices.spec
    options = []
    removable = np.isfinite(knobs.removal)
    kept_counts = [units] if not removable else [*range(units, 0, -structure.step), 0]
    for kept in kept_counts:
        removal = structure.removal[units - kept] * knobs.removal if kept < units else 0.0
        if kept == 0:
            size, time = cost.attention_rest(i, 0) if sub == "attn" else cost.mlp_rest(i, 0)
            options.append(Option(0, (), removal, removal, size, time))
            continue
        options += _with_bits(i, sub, kept, removal, prices, cost, knobs, bits, spec)
    return options


def _with_bits(i, sub, kept, removal, prices, cost, knobs, bits, spec) -> list[Option]:
    layer = spec.layers[i]
    narrowed = replace(layer, **({"kv_heads": kept} if sub == "attn" else {"ffn": kept}))
    shapes = spec.with_layers((*spec.layers[:i], narrowed, *spec.layers[i + 1 :])).linear_shapes(i)
    shapes = {n: shape for n, shape in shapes.items() if n.startswith(sub)}
    full = spec.linear_shapes(i)
    rest_bytes, rest_time = cost.attention_rest(i, kept) if sub == "attn" else cost.mlp_rest(i, kept)
    factor = knobs.attention if sub == "attn" else 1.0
    per_matrix = []
    for n, (rows, columns) in shapes.items():
        share = rows * columns / (full[n][0] * full[n][1])  # what is kept still errs
        entries = []
        for b in bits:
            size, time = cost.matrix(rows, columns, prices.scheme(columns, b))
            surcharge = factor * (knobs.two_bit if b <= 2 else 1)
            entries.append((n, b, prices.matrices[f"layers.{i}.{n}"][b] * share * surcharge, size, time))
        per_matrix.append(entries)
    out = []
    for combo in product(*per_matrix):
        if max(c[1] for c in combo) > 2 * min(c[1] for c in combo) + 2:
            continue  # far-apart widths inside one sub-layer are never on the front; skipping them saves half the time
        out.append(
            Option(
                kept,
                tuple((c[0], c[1]) for c in combo),
                removal + sum(c[2] for c in combo),
                removal,
                rest_bytes + sum(c[3] for c in combo),
                rest_time + sum(c[4] for c in combo),
            )
        )
    return out


def pareto(options: list[Option], by: str) -> tuple[Option, ...]:
    """Options no other one beats in both cost and price, cheapest first."""
    front: list[Option] = []
    for option in sorted(options, key=lambda o: (getattr(o, by), o.price, o.bytes)):
        if not front or option.price < front[-1].price:
            front.append(option)
    return tuple(front)


def solve(classes: list[Class], budget: Budget, *, fixed: float) -> Solution:
    """The cheapest-price pick per class with total cost <= budget; BudgetError says the smallest possible budget.

    `fixed`: bytes, or microseconds where the budget is a latency, of what no class is about.
    """
    by = "microseconds" if budget.bytes is None else "bytes"
    limit = budget.bytes if budget.bytes is not None else (budget.latency_ms or 0) * 1e3
    room = limit - fixed
    costs = [np.array([getattr(o, by) for o in c.options], np.float64) for c in classes]
    prices = [np.array([o.price for o in c.options]) for c in classes]
    smallest = sum(c[0] for c in costs)
    if smallest > room:
        least = (smallest + fixed) / (1 if by == "bytes" else 1e3)
        raise budget.too_small(least, "the smallest possible plan needs")
    bound, multiplier = dual_bound(costs, prices, room)
    picks = _dynamic_program(costs, prices, room)
    picks = _spend_rest(costs, prices, picks, room)
    price = float(sum(p[k] for p, k in zip(prices, picks, strict=True)))
    chosen = {c.name: c.options[k] for c, k in zip(classes, picks, strict=True)}
    return Solution(
        chosen,
        sum(o.bytes for o in chosen.values()),
        sum(o.microseconds for o in chosen.values()),
        price,
        max(0.0, price - bound) / max(price, 1e-12),
        multiplier,
    )


def dual_bound(costs: list[np.ndarray], prices: list[np.ndarray], room: float) -> tuple[float, float]:
    """Max over λ >= 0 of Σ min(price + λ cost) - λ room: no plan within `room` can have a lower total price."""

    def dual(multiplier: float) -> tuple[float, float]:
        picks = [int(np.argmin(p + multiplier * c)) for c, p in zip(costs, prices, strict=True)]
        used = sum(c[k] for c, k in zip(costs, picks, strict=True))
        value = sum(p[k] + multiplier * c[k] for c, p, k in zip(costs, prices, picks, strict=True))
        return float(value - multiplier * room), float(used)

    low, high = 0.0, 1e-12
    while dual(high)[1] > room:
        high *= 4
    best, at = dual(0.0)[0], 0.0
    for _ in range(60):
        middle = (low + high) / 2
        value, used = dual(middle)
        if value > best:
            best, at = value, middle
        low, high = (middle, high) if used > room else (low, middle)
    return best, at


def _dynamic_program(costs: list[np.ndarray], prices: list[np.ndarray], room: float) -> list[int]:
    """Exact over costs rounded up to room / RESOLUTION, so the result always fits."""
    base = sum(c[0] for c in costs)  # every class at its cheapest; only the extra cost competes
    unit = max((room - base) / RESOLUTION, 1e-9)
    best = np.zeros(RESOLUTION + 1)
    pointers = []
    for c, p in zip(costs, prices, strict=True):
        extra = np.ceil((c - c[0]) / unit - 1e-9).astype(np.int64)
        fresh = np.full(RESOLUTION + 1, np.inf)
        pointer = np.zeros(RESOLUTION + 1, np.int32)
        for k in np.flatnonzero(extra <= RESOLUTION):
            shifted = best[: RESOLUTION + 1 - extra[k]] + p[k]
            view, mark = fresh[extra[k] :], pointer[extra[k] :]
            better = shifted < view
            view[better], mark[better] = shifted[better], k
        best = fresh
        pointers.append((extra, pointer))
    at, picks = RESOLUTION, []
    for extra, pointer in reversed(pointers):
        k = int(pointer[at])
        picks.append(k)
        at -= int(extra[k])
    return picks[::-1]


def _spend_rest(costs: list[np.ndarray], prices: list[np.ndarray], picks: list[int], room: float) -> list[int]:
    """Rounding up left a little room: take the best affordable upgrades until none fits."""
    picks = list(picks)
    left = room - sum(c[k] for c, k in zip(costs, picks, strict=True))
    while True:
        best, move = 0.0, None
        for i, (c, p) in enumerate(zip(costs, prices, strict=True)):
            gain = p[picks[i]] - p
            extra = c - c[picks[i]]
            fits = (extra <= left) & (gain > best)
            if fits.any():
                k = int(np.argmax(np.where(fits, gain, -1)))
                best, move = float(gain[k]), (i, k, float(extra[k]))
        if move is None:
            return picks
        picks[move[0]] = move[1]
        left -= move[2]


def front(classes: list[Class], *, by: str, fixed_bytes: int, fixed_microseconds: float) -> list[Solution]:
    """The whole size-quality front: Lagrangian solutions from smallest to largest, about FRONT_POINTS of them."""
    costs = [np.array([getattr(o, by) for o in c.options], np.float64) for c in classes]
    prices = [np.array([o.price for o in c.options]) for c in classes]
    slopes = np.concatenate([-np.diff(p) / np.maximum(np.diff(c), 1e-9) for c, p in zip(costs, prices, strict=True)])
    slopes = slopes[slopes > 0]
    solutions: dict[tuple[int, ...], Solution] = {}
    # No slope at all: one width and no pruning leave a single plan.
    for multiplier in np.quantile(slopes, np.linspace(1, 0, FRONT_POINTS)) if len(slopes) else [0.0]:
        picks = tuple(int(np.argmin(p + multiplier * c)) for c, p in zip(costs, prices, strict=True))
        chosen = {c.name: c.options[k] for c, k in zip(classes, picks, strict=True)}
        solutions[picks] = Solution(
            chosen,
            sum(o.bytes for o in chosen.values()) + fixed_bytes,
            sum(o.microseconds for o in chosen.values()) + fixed_microseconds,
            float(sum(p[k] for p, k in zip(prices, picks, strict=True))),
            0.0,
            float(multiplier),
        )
    return sorted(solutions.values(), key=lambda s: getattr(s, by))
