"""One sweep: equality with slow literal versions, zeros that stay, patterns as named, one sweep against two."""

from __future__ import annotations

import pytest
import torch

from jpq_export.compress.rounding import Rounded, damped, gptq, row_loss
from jpq_export.methods.srcr.sweep import (
    BLOCK,
    Grid,
    Zeros,
    grid_for,
    prune_and_round,
    prune_then_round,
    sweep,
)
from jpq_export.numerics.scheme import Scheme

HALF = (Zeros(0.5), Zeros(0.25), Zeros(0.5, 4), Zeros(0.25, 8))
NAMES = ("half", "quarter", "2:4", "2:8")


def problem(n: int = 8, k: int = 64, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs, uneven channels: where moving errors on matters."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(k) + 0.5 * torch.randn(k, k, generator=generator) / k**0.5
    x = torch.randn(4 * k, k, generator=generator) @ mix * torch.exp(0.7 * torch.randn(k, generator=generator))
    return torch.randn(n, k, generator=generator), x.T @ x / len(x)


def slow(
    W: torch.Tensor, H: torch.Tensor, zeros: Zeros, grid: Grid | None = None, kept: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Optimal brain surgery, literally: settle a column, re-solve for the columns left by an inverse made anew.

    float64, no factorization; zeros of a block are chosen weight by weight from a sorted list.
    """
    H, work = damped(H).double(), W.double().clone()
    n, k = W.shape
    of = zeros.of or 1
    first = sorted(range(k // of), key=lambda g: -float(damped(H.float()).diagonal()[g * of : (g + 1) * of].sum()))
    order = [g * of + i for g in first for i in range(of)]
    mask = torch.ones(n, k, dtype=torch.bool) if kept is None else kept
    for position, j in enumerate(order):
        left = order[position:]
        step = zeros.of or BLOCK
        if kept is None and position % BLOCK % step == 0:
            block = left[: min(step, BLOCK - position % BLOCK)]
            scores = []
            for place, column in enumerate(block):
                inverse = torch.linalg.inv(H[left[place:]][:, left[place:]])[0, 0]
                scores += [(float(work[row, column] ** 2 / inverse), place, row) for row in range(n)]
            groups = [[s for s in scores if s[2] == row] for row in range(n)] if zeros.of else [scores]
            for group in groups:
                for _, place, row in sorted(group)[: round(zeros.share * len(group))]:
                    mask[row, block[place]] = False
        inverse = torch.linalg.inv(H[left][:, left])
        settled = work[:, j]
        if grid is not None:
            scale, zero = (t[:, j // (k // grid.scales.shape[1])].double() for t in (grid.scales, grid.zeros))
            code = (settled / scale + zero).round().clamp(min=0).minimum(grid.max_code.double())
            settled = (code - zero) * scale
        settled = torch.where(mask[:, j], settled, 0.0)
        error = (work[:, j] - settled) / inverse[0, 0]
        work[:, left] -= error[:, None] * inverse[0]
        work[:, j] = settled
    return work.float(), mask


@pytest.mark.parametrize("zeros", HALF, ids=NAMES)
def test_sparsegpt_equals_optimal_brain_surgery_column_by_column(zeros: Zeros) -> None:
    W, H = problem(4, 160 if zeros.share == 0.5 else 64)  # 160: a second block, and one that is not full
    weights, kept = slow(W, H, zeros)
    found = sweep(W, H, zeros)
    assert torch.equal(found.kept, kept)
    torch.testing.assert_close(found.weights, weights, rtol=1e-4, atol=1e-4)  # fp32 against float64, 160 updates


@pytest.mark.parametrize("zeros", HALF, ids=NAMES)
def test_pruning_and_rounding_in_one_sweep_equals_it_too(zeros: Zeros) -> None:
    W, H = problem(4, 64)
    grid = grid_for(W, H, Scheme(4, 32, symmetric=False))
    weights, kept = slow(W, H, zeros, grid)
    found = sweep(W, H, zeros, grid)
    assert torch.equal(found.kept, kept)
    torch.testing.assert_close(found.weights, weights, rtol=1e-5, atol=1e-5)  # points of one grid


def test_twin_without_the_update_of_later_columns_it_differs() -> None:
    W, H = problem(4, 64)
    found = sweep(W, torch.diag(H.diagonal()), Zeros(0.5))
    weights, kept = slow(W, H, Zeros(0.5))
    assert not torch.equal(found.kept, kept)
    assert not torch.allclose(found.weights, weights, rtol=1e-4, atol=1e-4)


def test_without_zeros_the_sweep_is_the_repositorys_gptq() -> None:
    W, H = problem(12, 192)
    grid = grid_for(W, H, Scheme(3, 64, symmetric=False))
    mine, theirs = sweep(W, H, Zeros(0.0), grid), gptq(W, H, grid.scales, grid.zeros, grid.max_code)
    assert mine.codes is not None
    assert torch.equal(mine.codes, theirs.codes)
    assert not torch.equal(mine.codes, gptq(W, torch.eye(192), grid.scales, grid.zeros, grid.max_code).codes)  # twin


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zeros", HALF, ids=NAMES)
def test_zeros_are_exact_after_rounding_and_as_many_as_asked(zeros: Zeros, bits: int) -> None:
    W, H = problem(8, 192)
    rounded = prune_and_round(W, H, zeros, Scheme(bits, 64, symmetric=False))
    swept = sweep(W, H, zeros, Grid(rounded.scales, rounded.zeros, torch.full((8,), float(2**bits - 1))))
    weights = rounded.dequantize()
    assert (weights[~swept.kept] == 0).all()
    assert float((~swept.kept).float().mean()) == zeros.share
    if zeros.of:
        gone = (~swept.kept).view(8, -1, zeros.of).sum(-1)
        assert (gone == zeros.count).all()


def test_twin_unstructured_zeros_are_no_pattern() -> None:
    W, H = problem(8, 192)
    gone = (~sweep(W, H, Zeros(0.5)).kept).view(8, -1, 4).sum(-1)
    assert not (gone == 2).all()


def test_case_a_knows_no_mask() -> None:
    W, H = problem(8, 192)
    scheme, zeros = Scheme(4, 64, symmetric=False), Zeros(0.25)
    share = float((prune_then_round(W, H, zeros, scheme).dequantize() == 0).float().mean())
    assert 0 < share < zeros.share <= float((prune_and_round(W, H, zeros, scheme).dequantize() == 0).float().mean())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("zeros", HALF, ids=NAMES)
def test_one_sweep_loses_no_more_than_two_that_hold_the_same_zeros(zeros: Zeros, bits: int) -> None:
    """On average over seeds; rounding after SparseGPT within its zeros is the slow version, with the mask given.

    Two blocks of columns: in the first one the zeros are chosen before anything is rounded.
    """
    joined = apart = 0.0
    for seed in range(4):
        W, H = problem(8, 192, seed=seed)
        scheme = Scheme(bits, 32, symmetric=False)
        pruned = sweep(W, H, zeros)
        grid = grid_for(pruned.weights, H, scheme)
        weights, _ = slow(pruned.weights, H, zeros, grid, pruned.kept.clone())
        apart += float((((weights - W) @ H) * (weights - W)).sum())
        joined += float(row_loss(W, H, prune_and_round(W, H, zeros, scheme)).sum())
    assert joined < apart


def test_a_half_zero_point_and_a_row_that_does_not_divide_are_refused() -> None:
    W, H = problem(4, 60)
    with pytest.raises(ValueError, match="60 columns are not a multiple of 8"):
        sweep(W, H, Zeros(0.25, 8))
    with pytest.raises(ValueError, match="between two codes"):
        sweep(W, H, Zeros(0.5), grid_for(W, H, Scheme(4, 20)))


def test_a_dead_input_is_harmless() -> None:
    W, H = problem(4, 64)
    H[5], H[:, 5] = 0, 0
    rounded: Rounded = prune_and_round(W, H, Zeros(0.5), Scheme(4, 32, symmetric=False))
    assert torch.isfinite(rounded.dequantize()).all()


@pytest.mark.parametrize("zeros", HALF, ids=NAMES)
def test_equal_weights_lose_exactly_the_share_and_always_the_same(zeros: Zeros) -> None:
    kept = sweep(torch.ones(8, 192), torch.eye(192), zeros).kept
    assert float((~kept).float().mean()) == zeros.share
    assert torch.equal(kept, sweep(torch.ones(8, 192), torch.eye(192), zeros).kept)
