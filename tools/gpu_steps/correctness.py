"""Every case through a set of kernels against fp64, outputs poisoned with NaN, each with twins that must fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from gpu_steps.cases import (
    BITS,
    GROUP_SIZES,
    Problem,
    Rounding,
    Shape,
    Stored,
    distance,
    is_normal,
    random_problem,
    random_weight,
    shapes,
    tiny,
    wrong_weights,
)
from gpu_steps.outcome import FAILED, PASSED, Outcome, Settings

GUARD = 64  # numbers behind an output that nobody may write
SEEN = 4.0  # a twin must miss the bound by this factor


class Kernels(Protocol):
    """Kernels under test; each writes into an output that starts as NaN."""

    def matmul(self, x: torch.Tensor, weight: Stored, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """Out [rows, n] = x · dequant(W)ᵀ (+ bias)."""
        ...

    def gather(self, indices: torch.Tensor, weight: Stored, out: torch.Tensor) -> None:
        """Out [count, k] = rows of dequant(W)."""
        ...

    def rounding(self, shape: Shape) -> Rounding:
        """What the kernel for this shape may lose."""
        ...


@dataclass(frozen=True, slots=True)
class Checked:
    """One case: `error` in units of the bound, what the twins showed, and what is wrong ("" when nothing is)."""

    case: str
    error: float
    twins: dict[str, float]
    wrong: str

    def row(self) -> dict[str, Any]:
        """For the table."""
        seen = min(self.twins.values(), default=float("inf"))
        return {"case": self.case, "error of bound": self.error, "weakest twin": seen, "wrong": self.wrong}


def poisoned(count: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """`count` NaN and a guard of NaN behind them."""
    return torch.full((count + GUARD,), float("nan"), dtype=dtype, device=device)


def product(kernels: Kernels, problem: Problem, weight: Stored) -> torch.Tensor:
    """Y of the problem with `weight`; AssertionError when something behind Y was written."""
    rows, n = problem.shape.rows, problem.shape.n
    buffer = poisoned(rows * n, problem.x.dtype, str(problem.x.device))
    out = buffer[: rows * n].view(rows, n)
    kernels.matmul(problem.x, weight, problem.bias, out)
    assert bool(buffer[rows * n :].isnan().all()), "written past the end of Y"
    return out


def check_product(kernels: Kernels, shape: Shape, rng: np.random.Generator, device: str) -> Checked:
    """The product and its twins."""
    problem, rounding = random_problem(shape, rng, device), kernels.rounding(shape)
    try:
        y = product(kernels, problem, problem.weight)
        error = distance(y, problem, rounding)
        wrong = "" if error <= 1 else "beyond the bound"
        if not torch.equal(y, product(kernels, problem, problem.weight)):
            wrong = wrong or "another result the second time"
        made = {name: product(kernels, problem, weight) for name, weight in wrong_weights(problem)}
    except AssertionError as failed:
        return Checked(str(shape), float("inf"), {}, str(failed))
    twins = {name: distance(y, problem, rounding) for name, y in made.items()}
    missed = [name for name, seen in twins.items() if not seen > SEEN]
    return Checked(str(shape), error, twins, wrong or (f"twin not seen: {', '.join(missed)}" if missed else ""))


def check_gather(kernels: Kernels, shape: Shape, rng: np.random.Generator, device: str) -> Checked:
    """Rows bit for bit, counted from the end too; out of range gives NaN; a flipped code must show."""
    weight, n = random_weight(shape, rng, device), shape.n
    listed = [0, n - 1, -1, -n, n // 2, n, -n - 1]
    kind = torch.int64 if shape.bits % 2 else torch.int32
    indices = torch.tensor(listed, dtype=kind, device=device)
    buffer = poisoned(len(listed) * shape.k, torch.float32, device)
    out = buffer[:-GUARD].view(len(listed), shape.k)
    kernels.gather(indices, weight, out)
    expected = weight.dense()[[index % n for index in listed[:-2]]].to(torch.float32)
    problem = Problem(shape, torch.zeros(1, shape.k, device=device), weight, None)
    other = torch.full_like(out, float("nan"))
    kernels.gather(indices, next(iter(wrong_weights(problem)))[1], other)
    twin = float(not torch.equal(other[:-2], expected))
    wrong = "" if torch.equal(out[:-2], expected) else "rows differ"
    if not bool(out[-2:].isnan().all()):
        wrong = wrong or "an index out of range is not NaN"
    if not bool(buffer[-GUARD:].isnan().all()):
        wrong = wrong or "written past the end"
    twin_seen = float("inf") if twin else 0.0
    return Checked(
        f"look-up: {shape}", 0.0, {"one code's highest bit": twin_seen}, wrong or ("" if twin else "twin not seen")
    )


def check_all(kernels: Kernels, settings: Settings) -> Outcome:
    """All cases; passed when nothing is wrong with any."""
    rng, checked = np.random.default_rng(20261123), []
    products = shapes(quick=settings.quick)
    lookups = [Shape(b, g, 3 + b % 32, 57, 1, symmetric=is_normal(b) or b % 2 == 0) for b in BITS for g in GROUP_SIZES]
    if settings.rehearse:
        products, lookups = [tiny(shape) for shape in products[::5]], lookups[::4]
    checked = [check_product(kernels, shape, rng, settings.device) for shape in products]
    checked += [check_gather(kernels, shape, rng, settings.device) for shape in lookups]
    if not settings.rehearse:  # more codes than 32 bits can count bytes of X and W for
        large = Shape(4, 128, 32, 152_064, 3, "fp16", False, True)
        checked += [
            check_product(kernels, large, rng, settings.device),
            check_gather(kernels, large, rng, settings.device),
        ]
    return judge(checked)


def judge(checked: list[Checked]) -> Outcome:
    """One outcome of all: every wrong case is listed, and the largest error of the others."""
    bad = [case for case in checked if case.wrong]
    worst = max((case.error for case in checked if not case.wrong), default=float("nan"))
    weakest = min((seen for case in checked for seen in case.twins.values()), default=float("nan"))
    facts = {
        "cases": len(checked),
        "wrong": len(bad),
        "largest error, of what rounding may do": worst,
        "weakest twin, same unit": weakest,
    }
    if not bad and checked:
        return Outcome(PASSED, "", facts)
    reason = f"{len(bad)} of {len(checked)} cases wrong; first: {bad[0].case}: {bad[0].wrong}" if bad else "no cases"
    return Outcome(FAILED, reason, facts, [case.row() for case in bad])
