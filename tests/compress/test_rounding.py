"""Rounding: equality with slow literal versions, falling losses, and twins that must fail."""

from __future__ import annotations

import itertools

import pytest
import torch

from jpq_export.compress import rounding
from jpq_export.compress.rounding import (
    Rounded,
    coordinate_descent,
    damped,
    gptq,
    nearest,
    quantize,
    refit_scales,
    row_loss,
    search_scales,
    stored,
)
from jpq_export.numerics.scheme import TERNARY, Scheme, levels


def problem(n: int = 12, k: int = 96, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs, uneven channels: where GPTQ and descent matter."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(k) + 0.5 * torch.randn(k, k, generator=generator) / k**0.5
    x = torch.randn(4 * k, k, generator=generator) @ mix * torch.exp(0.7 * torch.randn(k, generator=generator))
    return torch.randn(n, k, generator=generator), x.T @ x / len(x)


def tops(n: int, bits: float) -> torch.Tensor:
    return torch.full((n,), float(levels(bits) - 1))


def slow_gptq(W: torch.Tensor, H: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: float) -> torch.Tensor:
    """Optimal brain quantization, literally: round a column, then re-solve for the columns left (float64)."""
    H, work = damped(H).double(), W.double().clone()
    k = W.shape[1]
    size = k // scales.shape[1]
    order = torch.argsort(H.diagonal(), descending=True).tolist()
    codes = torch.zeros_like(W)
    for position, j in enumerate(order):
        left = order[position:]
        inverse = torch.linalg.inv(H[left][:, left])
        s, z = scales[:, j // size].double(), zeros[:, j // size].double()
        codes[:, j] = (work[:, j] / s + z).round().clamp(0, top).float()
        error = work[:, j] - (codes[:, j].double() - z) * s
        work[:, left] -= error[:, None] / inverse[0, 0] * inverse[0]
    return codes


@pytest.mark.parametrize("bits", [1, TERNARY, 2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_equals_optimal_brain_quantization_column_by_column(bits: float, symmetric: bool) -> None:
    W, H = problem()
    top = tops(len(W), bits)
    scales, zeros = search_scales(W, H.diagonal(), top, 32, symmetric=symmetric)
    fast = gptq(W, H, scales, zeros, top).codes.float()
    slow = slow_gptq(W, H, scales, zeros, float(top[0]))
    assert (fast != slow).float().mean() < 0.003  # a tie within fp32 rounding may fall either way
    shifted = slow_gptq(W, H, scales.roll(1, 1), zeros, float(top[0]))
    assert (fast != shifted).float().mean() > 0.05


def test_block_size_does_not_change_gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = problem(k=192)
    top = tops(len(W), 3)
    scales, zeros = search_scales(W, H.diagonal(), top, 64, symmetric=True)
    wide = gptq(W, H, scales, zeros, top).codes
    monkeypatch.setattr(rounding, "BLOCK", 16)
    narrow = gptq(W, H, scales, zeros, top).codes
    assert (wide != narrow).float().mean() < 0.003


@pytest.mark.parametrize(("bits", "least"), [(1, 0.85), (TERNARY, 0.7), (2, 0.7), (3, 0.7), (4, 0.7)])
def test_descent_and_refit_only_ever_lower_the_loss(bits: float, least: float) -> None:
    W, H = problem()
    top = tops(len(W), bits)
    scales, zeros = search_scales(W, H.diagonal(), top, 32, symmetric=True)
    state = nearest(W, scales, zeros, top)
    losses = [row_loss(W, damped(H), state)]
    for _ in range(3):
        state = refit_scales(W, H, state)
        losses.append(row_loss(W, damped(H), state))
        state = coordinate_descent(W, H, state, top)
        losses.append(row_loss(W, damped(H), state))
    for before, after in itertools.pairwise(losses):
        assert (after <= before * (1 + 1e-5)).all()
    assert losses[-1].sum() < least * losses[0].sum()
    wrong = coordinate_descent(W, torch.eye(len(H)) * H.diagonal().flip(0), nearest(W, scales, zeros, top), top)
    assert row_loss(W, damped(H), wrong).sum() > losses[-1].sum() * 1.15


def test_descent_reaches_a_point_no_single_code_change_improves() -> None:
    W, H = problem(n=3, k=32)
    top = tops(3, 2)
    scales, zeros = search_scales(W, H.diagonal(), top, 32, symmetric=True)
    state = coordinate_descent(W, H, gptq(W, H, scales, zeros, top), top, passes=30)
    best = row_loss(W, damped(H), state)
    for column in range(32):
        for code in range(4):
            codes = state.codes.clone()
            codes[:, column] = code
            assert (row_loss(W, damped(H), Rounded(codes, scales, zeros)) >= best * (1 - 1e-5)).all()


@pytest.mark.parametrize("bits", [1, TERNARY, 2])
def test_jpq_beats_gptq_beats_rtn(bits: float) -> None:
    W, H = problem()
    scheme = Scheme(bits, 32)
    loss = {m: float(row_loss(W, H, quantize(W, H, scheme, method=m)).sum()) for m in ("rtn", "gptq", "jpq")}
    assert loss["jpq"] < 0.95 * loss["gptq"] < 0.95 * 0.9 * loss["rtn"]


def test_rows_with_their_own_widths_equal_separate_calls() -> None:
    W, H = problem(n=8)
    top = torch.tensor([1.0, 2.0, 3.0, 3.0] + [15.0] * 4)
    scales, zeros = search_scales(W, H.diagonal(), top, 32, symmetric=True)
    mixed = gptq(W, H, scales, zeros, top)
    alone = gptq(W[4:], H, scales[4:], zeros[4:], tops(4, 4))
    assert torch.equal(mixed.codes[4:], alone.codes)
    assert mixed.codes[:4].amax(1).tolist() == [1, 2, 3, 3]
    ternary = search_scales(W[1:2], H.diagonal(), tops(1, TERNARY), 32, symmetric=True)[0]
    assert torch.equal(scales[1:2], ternary)
    assert not torch.equal(search_scales(W[1:2], H.diagonal(), tops(1, 1), 32, symmetric=True)[0], ternary)


def weighted_errors(W: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """Σ weight (w - ŵ)² of every group under rounding to nearest: [N, K/g]."""
    zeros = (top / 2)[:, None].expand_as(scales)
    error = nearest(W, scales, zeros, top).dequantize() - W
    return (error.square() * weight).view(*scales.shape, -1).sum(-1)


@pytest.mark.parametrize("bits", [1, TERNARY])
def test_two_and_three_levels_get_the_best_of_all_scales(bits: float) -> None:
    W, H = problem(n=20)
    weight, top = H.diagonal(), tops(20, bits)
    scales, _ = search_scales(W, weight, top, 32, symmetric=True)
    found = weighted_errors(W, weight, scales, top)
    peak = W.view(20, -1, 32).abs().amax(-1)
    tried = [weighted_errors(W, weight, peak * fraction, top) for fraction in torch.linspace(0.02, 2.2, 1500).tolist()]
    best = torch.stack(tried).amin(0)
    assert (found <= best * (1 + 1e-4)).all()  # the file's fp16 scale moves a minimum by less than its square
    from_peak = weighted_errors(W, weight, peak / (top / 2)[:, None], top)  # the twin: levels out to the largest weight
    assert float(from_peak.sum()) > 1.5 * float(best.sum())
    flat = weighted_errors(W, weight, search_scales(W, torch.ones(96), top, 32, symmetric=True)[0], top)
    assert float(flat.sum()) > 1.001 * float(found.sum())  # and a search that does not weigh


@pytest.mark.parametrize("bits", [1, TERNARY])
def test_narrow_scales_of_weights_without_importance_are_finite(bits: float) -> None:
    W, _ = problem(n=4)
    W[2] = 0
    scales, _ = search_scales(W, torch.zeros(96), tops(4, bits), 32, symmetric=True)
    assert torch.isfinite(scales).all()
    assert (scales > 0).all()


@pytest.mark.parametrize("bits", [1, TERNARY, 3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_stored_weight_dequantizes_to_the_same_numbers(symmetric: bool, bits: float) -> None:
    W, H = problem()
    scheme = Scheme(bits, 32, symmetric)
    rounded = quantize(W, H, scheme)
    assert torch.equal(torch.from_numpy(stored(rounded, scheme).dequantize()), rounded.dequantize())
    assert stored(rounded, scheme).nbytes == scheme.weight_bytes(*W.shape)


def test_a_dead_input_and_a_zero_row_are_harmless() -> None:
    W, H = problem()
    W[3] = 0
    H[:, 5] = H[5, :] = 0
    rounded = quantize(W, H, Scheme(3, 32))
    assert torch.isfinite(rounded.dequantize()).all()
    assert rounded.dequantize()[3].abs().max() < 1e-3


@pytest.mark.parametrize("method", ["rtn", "gptq", "jpq"])
def test_an_integer_zero_is_held_and_costs_little(method: str) -> None:
    W, H = problem(n=24)
    half, whole = (quantize(W, H, Scheme(4, 32, integer_zero=i), method=method) for i in (False, True))
    assert (float(half.zeros.unique()), float(whole.zeros.unique())) == (7.5, 8.0)
    assert int(whole.codes.max()) <= 15
    # One of 16 levels stands at the edge of one side only: an RMS of up to 15/14 more, 1.15 in the loss.
    loss = [float(row_loss(W, H, rounded).sum()) for rounded in (half, whole)]
    assert loss[1] < 1.15 * loss[0]
    shifted = Rounded(half.codes, half.scales, whole.zeros)  # the twin: codes made for the other zero
    assert float(row_loss(W, H, shifted).sum()) > 2 * loss[0]
