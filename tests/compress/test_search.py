"""The search: exact against enumeration, certified gap, budgets kept, impossible budgets refused."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from jpq_export.compress.search import Class, Option, dual_bound, pareto, solve
from jpq_export.errors import BudgetError
from jpq_export.format.plan import Budget


def of_bytes(size: float) -> Budget:
    return Budget("size", size, int(size))


def random_classes(count: int, options: int, *, seed: int) -> list[Class]:
    generator = np.random.default_rng(seed)
    classes = []
    for i in range(count):
        size = np.sort(generator.integers(100, 10_000, options))
        price = np.sort(generator.random(options))[::-1]
        made = [Option(1, (), float(p), 0.0, int(s), float(s) / 7) for s, p in zip(size, price, strict=True)]
        classes.append(Class(f"layers.{i}.mlp", pareto(made, "bytes")))
    return classes


def enumerate_best(classes: list[Class], room: float) -> float:
    prices = [
        sum(o.price for o in combo)
        for combo in product(*(c.options for c in classes))
        if sum(o.bytes for o in combo) <= room
    ]
    return min(prices)


@pytest.mark.parametrize("seed", range(12))
def test_solution_is_within_its_certified_gap_of_the_enumerated_optimum(seed: int) -> None:
    classes = random_classes(5, 6, seed=seed)
    low = sum(c.options[0].bytes for c in classes)
    high = sum(c.options[-1].bytes for c in classes)
    budget = low + 0.4 * (high - low)
    solution = solve(classes, of_bytes(budget + 50), fixed=50)
    best = enumerate_best(classes, budget)
    assert solution.bytes <= budget
    assert best <= solution.price <= best * 1.01 + 1e-9
    assert solution.price * (1 - solution.gap) <= best + 1e-9  # the bound is a bound
    cheaper = enumerate_best(classes, budget * 1.3)
    assert solution.price > cheaper or cheaper == best  # the twin: a larger budget's optimum is not reachable


def test_dual_bound_never_exceeds_the_optimum_and_is_not_trivial() -> None:
    classes = random_classes(5, 6, seed=3)
    costs = [np.array([o.bytes for o in c.options], float) for c in classes]
    prices = [np.array([o.price for o in c.options]) for c in classes]
    room = sum(c[0] for c in costs) * 1.5
    bound, multiplier = dual_bound(costs, prices, room)
    best = enumerate_best(classes, room)
    assert 0.5 * best < bound <= best + 1e-12
    assert multiplier > 0


def test_impossible_budget_names_the_smallest_possible_one() -> None:
    classes = random_classes(3, 4, seed=0)
    smallest = sum(c.options[0].bytes for c in classes) + 10
    with pytest.raises(BudgetError) as caught:
        solve(classes, of_bytes(smallest - 1), fixed=10)
    told = re.search(r"needs (\d+\.\d{3}) MB", str(caught.value))
    assert told
    assert smallest <= float(told[1]) * 1e6 < smallest + 1000
    assert solve(classes, of_bytes(smallest), fixed=10).bytes + 10 == smallest


def test_pareto_drops_what_is_beaten() -> None:
    base = Option(1, (), 1.0, 0.0, 100, 1.0)
    better, worse, dearer = replace(base, price=0.5), replace(base, bytes=120), replace(base, bytes=200, price=0.1)
    assert pareto([base, better, worse, dearer], "bytes") == (better, dearer)


def test_latency_budget_counts_microseconds() -> None:
    classes = random_classes(4, 5, seed=1)
    fastest = sum(min(o.microseconds for o in c.options) for c in classes)
    solution = solve(classes, Budget("latency", 1, None, fastest * 1.5e-3), fixed=0)
    assert solution.microseconds <= fastest * 1.5
