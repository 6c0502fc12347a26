"""The study's grid: pairs of sparsity and bits at equal theoretical compression rates; what each pattern means."""

from __future__ import annotations

import re
from dataclasses import dataclass

from jpq_export.errors import UsageError
from jpq_export.methods.srcr.sweep import Zeros

FULL_BITS = 16  # what the rate is measured against
RATES = (0.75, 0.8125, 0.875)
PATTERNS = ("unstructured", "2:4", "2:8", "structural")
CASES = ("A", "B")
DENSE = "dense"
SAME = 1e-9  # of two rates or shares: room for rounding in binary
NOTES = {
    DENSE: "no zeros: stored as counted, but for scales and zero points; every kernel of this project runs it",
    "unstructured": "shrinks only in theory: kernels and files here keep every zero as a code; with an index of 1 bit "
    "a weight a file could be smaller, none here is, and no common hardware skips scattered zeros",
    "2:4": "can run faster: the sparse tensor cores of Nvidia GPUs from Ampere on (Jetson Orin, RTX 30 and later) "
    "skip two zeros of four in matrix products, which helps long prompts; this project's kernels do not use them "
    "and its files keep every zero",
    "structural": "smaller and faster on every target: whole key/value heads and channels are gone from file, products "
    "and KV cache",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination. `sparsity`: share of the layers' weights that go; `case`: "A", "B", or "" where none is pruned.

    `pattern`: "dense", "unstructured", "structural", or "n:m", n zeros in every m neighbours of a row.
    """

    sparsity: float
    bits: int
    pattern: str = DENSE
    case: str = ""

    @property
    def name(self) -> str:
        """Of its file, such as unstructured-s25-q4-B."""
        end = f"-{self.case}" if self.case else ""
        return f"{self.pattern.replace(':', 'of')}-s{100 * self.sparsity:.4g}-q{self.bits}{end}"

    @property
    def rate(self) -> float:
        """Its theoretical compression rate."""
        return theoretical_rate(self.sparsity, self.bits)

    @property
    def zeros(self) -> Zeros:
        """What the sweep makes zero; a structural pattern removes beforehand."""
        if self.pattern == "structural":
            return Zeros(0.0)
        numbers = neighbours(self.pattern)
        return Zeros(self.sparsity, numbers[1] if numbers else None)

    @property
    def note(self) -> str:
        """What a target can run faster, and what shrinks only on paper."""
        if self.pattern in NOTES:
            return NOTES[self.pattern]
        return f"shrinks only in theory: no common hardware skips {self.pattern.replace(':', ' zeros of ')}; see 2:4"


def theoretical_rate(sparsity: float, bits: float) -> float:
    """TCr = 1 - (1 - s) q / 16 (arXiv 2505.07289): what zeros and bits alone would save of 16-bit weights."""
    return 1 - (1 - sparsity) * bits / FULL_BITS


def sparsity_at(rate: float, bits: float) -> float:
    """The sparsity at which `bits` give this rate; negative where the bits alone save more."""
    return 1 - FULL_BITS * (1 - rate) / bits


def neighbours(pattern: str) -> tuple[int, int] | None:
    """'2:4' -> (2, 4): two zeros in every four; None for a pattern of another kind."""
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    return (int(found[1]), int(found[2])) if found else None


def grid(
    rates: tuple[float, ...], widths: tuple[int, ...], patterns: tuple[str, ...], cases: tuple[str, ...]
) -> tuple[Cell, ...]:
    """All combinations that exist, by rate; UsageError when a rate has none.

    A semi-structured pattern has one sparsity, n/m, and so stands only where some width meets it.
    """
    cells: list[Cell] = []
    for rate in rates:
        fresh = [cell for bits in widths for cell in _at(rate, bits, patterns, cases)]
        if not fresh:
            raise UsageError(
                f"--rates {100 * rate:g}: no sparsity gives it at {', '.join(map(str, widths))} bits with these "
                "--patterns; add widths or patterns"
            )
        cells += fresh
    return tuple(dict.fromkeys(cells))


def _at(rate: float, bits: int, patterns: tuple[str, ...], cases: tuple[str, ...]) -> list[Cell]:
    share = sparsity_at(rate, bits)
    if abs(share) < SAME:
        return [Cell(0.0, bits)]
    if not 0 < share < 1:
        return []
    found = []
    for pattern in patterns:
        numbers = neighbours(pattern)
        if numbers and abs(numbers[0] / numbers[1] - share) > SAME:
            continue
        found += [Cell(share, bits, pattern, case) for case in (cases if pattern != "structural" else ("A",))]
    return found


def check_pattern(pattern: str) -> str:
    """The pattern itself; UsageError for one that does not exist."""
    numbers = neighbours(pattern)
    if pattern in PATTERNS or (numbers and 0 < numbers[0] < numbers[1] <= 32 and 128 % numbers[1] == 0):
        return pattern
    raise UsageError(
        f"--patterns: {pattern!r} is not one of {', '.join(PATTERNS)} nor n:m, n zeros in every m weights of a row "
        "with m a power of two up to 32"
    )
