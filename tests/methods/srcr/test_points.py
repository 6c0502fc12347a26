"""The theoretical rate at the paper's operating points, and which combinations a grid holds."""

from __future__ import annotations

import pytest

from jpq_export.errors import UsageError
from jpq_export.methods.srcr.points import (
    CASES,
    PATTERNS,
    RATES,
    Cell,
    check_pattern,
    grid,
    neighbours,
    theoretical_rate,
)

POINTS = [
    (0.0, 4, 0.75),
    (0.25, 4, 0.8125),
    (0.0, 3, 0.8125),
    (0.0, 2, 0.875),
    (0.5, 4, 0.875),
    (0.5, 8, 0.75),
    (0.0, 16, 0.0),
]


@pytest.mark.parametrize(("sparsity", "bits", "rate"), POINTS)
def test_the_rate_is_the_papers_at_its_operating_points(sparsity: float, bits: int, rate: float) -> None:
    assert theoretical_rate(sparsity, bits) == rate
    assert theoretical_rate(sparsity + 0.01, bits) != rate  # twin


def test_every_combination_of_a_rate_has_that_rate_and_the_published_ones_are_there() -> None:
    cells = grid(RATES, (2, 3, 4, 6, 8), PATTERNS, CASES)
    assert {round(cell.rate, 9) for cell in cells} == set(RATES)
    assert len({cell.name for cell in cells}) == len(cells)
    found = {(cell.sparsity, cell.bits, cell.pattern) for cell in cells}
    expected = {(0.0, 4, "dense"), (0.0, 3, "dense"), (0.0, 2, "dense"), (0.25, 4, "unstructured"), (0.25, 4, "2:8")}
    assert expected | {(0.5, 4, "2:4"), (0.5, 4, "structural")} <= found


def test_a_semi_structured_pattern_stands_only_at_its_own_sparsity() -> None:
    cells = grid(RATES, (2, 3, 4, 5, 6, 8), ("2:4", "2:8"), ("B",))
    for cell in cells:
        numbers = neighbours(cell.pattern)
        assert numbers is None or cell.sparsity == pytest.approx(numbers[0] / numbers[1])
    assert {cell.pattern for cell in cells} == {"dense", "2:4", "2:8"}


def test_a_rate_without_combinations_and_unknown_patterns_are_refused() -> None:
    with pytest.raises(UsageError, match="--rates 75: no sparsity gives it at 3 bits"):
        grid((0.75,), (3,), PATTERNS, CASES)
    for wrong in ("4:2", "0:4", "2:6", "2:64", "blocks"):
        with pytest.raises(UsageError, match="--patterns"):
            check_pattern(wrong)
    assert check_pattern("6:8") == "6:8"


def test_every_pattern_says_what_runs_faster() -> None:
    assert "Ampere" in Cell(0.5, 4, "2:4", "B").note
    assert "every target" in Cell(0.5, 4, "structural", "A").note
    for pattern in ("unstructured", "2:8", "6:8"):
        assert "only in theory" in Cell(0.25, 4, pattern, "B").note
