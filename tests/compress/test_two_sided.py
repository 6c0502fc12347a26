"""Two-sided rounding: the definition element by element, the optimum of tiny problems, blocks, pruned outputs."""

from itertools import product

import pytest
import torch

from jpq_export.compress import two_sided as module
from jpq_export.compress.rounding import Rounded, coordinate_descent, damped, gptq, nearest, search_scales
from jpq_export.compress.two_sided import (
    add_output_moment,
    compact,
    kept_blocks,
    two_sided,
    two_sided_loss,
    unit_upper,
)


def moment(size, rank, seed):
    """A positive semi-definite matrix with errors that add up along few directions."""
    rows = torch.randn(rank, size, generator=torch.Generator().manual_seed(seed))
    return rows.T @ rows / rank


def problem(n, k, *, bits=2, group=8, rank=None, seed=0):
    W = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    H_in, H_out = moment(k, rank or k // 2 + 1, seed + 1), moment(n, rank or n // 2 + 1, seed + 2)
    top = torch.full((n,), float((1 << bits) - 1))
    scales, zeros = search_scales(W, H_in.diagonal() + 1e-3, top, group, symmetric=True)
    return W, H_in, H_out, nearest(W, scales, zeros, top), top


def element_by_element(W, H_in, H_out, start, top):
    """The formula of the module's text, in float64, in its order of rows and columns."""
    H_in, H_out = damped(H_in).double(), module._output_moment(H_out).double()
    rows, columns = (torch.argsort(H.diagonal(), descending=True) for H in (H_out, H_in))
    M_out, M_in = (unit_upper(H[o][:, o]) for H, o in ((H_out, rows), (H_in, columns)))
    group = W.shape[1] // start.scales.shape[1]
    pick = (rows[:, None], columns[None, :])
    w = W.double()[pick]
    scale, zero = (part.double().repeat_interleave(group, 1)[pick] for part in (start.scales, start.zeros))
    error, codes = torch.zeros_like(w), torch.zeros_like(w)
    for i, j in product(range(w.shape[0]), range(w.shape[1])):
        seen = M_out[: i + 1, i] @ error[: i + 1, : j + 1] @ M_in[: j + 1, j]  # its own error is still zero
        codes[i, j] = ((w[i, j] - seen) / scale[i, j] + zero[i, j]).round().clamp(0, float(top[rows[i]]))
        error[i, j] = (codes[i, j] - zero[i, j]) * scale[i, j] - w[i, j]
    out = torch.empty_like(codes)
    out[pick] = codes
    return out.to(torch.uint8)


@pytest.mark.parametrize(("n", "k", "group"), [(7, 8, 8), (40, 48, 16), (33, 72, 24), (64, 32, 32), (3, 96, 8)])
def test_tiles_are_the_definition_element_by_element(n, k, group):
    W, H_in, H_out, start, top = problem(n, k, group=group)
    got = two_sided(W, H_in, [H_out], start, top).codes
    expected = element_by_element(W, H_in, H_out, start, top)
    assert (got == expected).float().mean() > 0.999  # a tie in fp32 may fall the other way
    one_sided = element_by_element(W, H_in, torch.eye(n), start, top)
    assert (one_sided == expected).float().mean() < 0.98


def test_without_output_correlations_it_is_gptq():
    W, H_in, _, start, top = problem(40, 64, group=16)
    same = gptq(W, H_in, start.scales, start.zeros, top).codes
    assert (two_sided(W, H_in, [torch.eye(40)], start, top).codes == same).float().mean() > 0.999


def best_of_all(W, H_in, H_out, start):
    """The least loss over all codes of 2 bits."""
    losses = []
    for codes in product(range(4), repeat=W.numel()):
        tried = Rounded(torch.tensor(codes, dtype=torch.uint8).view(W.shape), start.scales, start.zeros)
        losses.append(two_sided_loss(W, H_in, H_out, tried))
    return min(losses)


def test_it_is_near_the_optimum_of_tiny_problems_and_one_sided_rounding_is_not():
    ours = plain = optimum = 0.0
    for seed in range(12):
        W, H_in, H_out, start, top = problem(3, 2, group=2, rank=2, seed=10 * seed)
        found = best_of_all(W, H_in, H_out, start)
        mine = two_sided_loss(W, H_in, H_out, two_sided(W, H_in, [H_out], start, top))
        assert mine >= found * (1 - 1e-5)
        ours, optimum = ours + mine, optimum + found
        plain += two_sided_loss(W, H_in, H_out, gptq(W, H_in, start.scales, start.zeros, top))
    assert ours < 1.02 * optimum
    assert plain > 1.1 * optimum


@pytest.mark.parametrize(("bits", "share"), [(1, 1.0), (2, 1.0), (3, 0.9), (4, 0.8)])
def test_it_never_raises_the_loss_that_one_sided_methods_leave(bits, share):
    W, H_in, H_out, start, top = problem(96, 128, bits=bits, group=32)
    one = coordinate_descent(W, H_in, gptq(W, H_in, start.scales, start.zeros, top), top, passes=2)
    two = two_sided(W, H_in, [H_out], one, top)
    assert two_sided_loss(W, H_in, H_out, two) <= share * two_sided_loss(W, H_in, H_out, one)
    assert int(two.codes.max()) <= int(top[0])
    assert torch.equal(two.scales, one.scales)


def test_rows_may_have_widths_of_their_own():
    W, H_in, H_out, _, _ = problem(12, 32, group=8)
    top = torch.tensor([1.0, 3.0, 7.0] * 4)
    scales, zeros = search_scales(W, H_in.diagonal() + 1e-3, top, 8, symmetric=True)
    codes = two_sided(W, H_in, [H_out], nearest(W, scales, zeros, top), top).codes
    assert (codes.amax(1) <= top).all()
    assert (codes.amax(1) == top).float().mean() > 0.5


def test_moments_are_sums_over_tokens_in_blocks_of_outputs(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 8)
    moments = {}
    rows = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    for part in rows.split(11):
        add_output_moment(moments, "a", part, fast=False)
    assert moments["a"].shape == (3, 8, 8)
    whole = rows.T @ rows
    kept = torch.tensor([0, 3, 7, 9, 15, 17, 19])
    blocks = kept_blocks(moments["a"], kept, 20)
    for block, index in zip(blocks, (kept[:3], kept[3:5], kept[5:]), strict=True):
        torch.testing.assert_close(block, whole[index][:, index])
    assert [len(block) for block in kept_blocks(moments["a"], None, 20)] == [8, 8, 4]
    assert [len(block) for block in kept_blocks(moments["a"], torch.tensor([1, 18]), 20)] == [1, 1]  # an empty block
    fast = {}
    add_output_moment(fast, "a", rows, fast=True)
    assert not torch.equal(fast["a"], moments["a"])
    torch.testing.assert_close(fast["a"], moments["a"], rtol=0.05, atol=0.5)
    stored = compact(moments["a"])
    assert stored.dtype == torch.float16
    assert float(stored.float().diagonal(dim1=1, dim2=2).mean()) == pytest.approx(1, abs=1e-3)


def test_blocks_of_outputs_are_rounded_apart():
    W, H_in, H_out, start, top = problem(24, 32, group=8)
    parts = [H_out[:16, :16], H_out[16:, 16:]]
    got = two_sided(W, H_in, parts, start, top).codes
    for rows, block in zip((slice(0, 16), slice(16, 24)), parts, strict=True):
        alone = two_sided(W[rows], H_in, [block], start.rows(rows), top[rows]).codes
        assert torch.equal(got[rows], alone)
