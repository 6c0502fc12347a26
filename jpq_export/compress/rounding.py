"""Weights to codes: scale search, GPTQ, coordinate descent, closed-form scale refit. Pure tensors in, tensors out.

All of them lower tr(E H Eᵀ) for the error E = Ŵ - W, with H a second moment of the layer's inputs (Frantar et al.,
GPTQ, 2023), which prices weigh by the Fisher information (Kim et al., GuidedQuant, 2025). Rows are independent, so a
stack of rows may mix bit widths, and says of each which points there are: a `Grid`, or the largest codes [N] alone.

Columns live in the first dimension here (W as [K, N]): the inner loops walk over K and touch contiguous rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from jpq_export.compress.grid import Grid, grid_of
from jpq_export.numerics.affine import store
from jpq_export.numerics.row_blocks import RowLayout, StoredWeight
from jpq_export.numerics.scheme import Scheme

TRIED_AT_ONCE = 2**20  # weights for which clippings are tried together: 12 times as fast as 2**23, beyond the cache
ROUNDED_AT_ONCE = 5 * 2**19  # weights rounded together: 1.6 times as fast as 2**23; smaller ones are all overhead
BLOCK = 64  # columns updated lazily together; 64 measured fastest of 32/64/128 at K = 576 and 1536
NORMAL_REACH = 3.4  # deviations: the outermost of 64 levels is best a tenth farther out, that of 8 at two thirds
DAMPING = 0.01  # of the mean diagonal of H, as in GPTQ


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """Codes, or levels as bytes (`QuantizedWeight.points`), uint8 [N, K]; scales, zeros (in codes) float32 [N, K/g].

    Scales are fp16 values.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        n, k = self.codes.shape
        codes = self.codes.float().view(n, self.scales.shape[1], -1)  # [N, K/g, g]
        return ((codes - self.zeros[:, :, None]) * self.scales[:, :, None]).view(n, k)

    def rows(self, index: slice) -> Rounded:
        """A subset of the rows."""
        return Rounded(self.codes[index], self.scales[index], self.zeros[index])


def damped(H: Tensor, *, damping: float = DAMPING) -> Tensor:
    """H with `damping` of its mean diagonal added; a dead input (zero diagonal) becomes harmless."""
    diagonal = H.diagonal()
    level = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return H + torch.eye(H.shape[0], device=H.device) * (damping * level)


def search_scales(
    W: Tensor,
    weight: Tensor,
    grid: Grid | Tensor,
    group_size: int,
    *,
    symmetric: bool,
    integer_zero: bool = False,
    candidates: int = 29,
) -> tuple[Tensor, Tensor]:
    """Per group, the clipping that minimises Σ weight_k (w - ŵ)²; exact at 1 bit and ternary (symmetric).

    W [N, K], weight [K], grid of N rows -> scales, zeros [N, K/g].
    """
    grid = Grid.over(grid)
    kind = {"symmetric": symmetric, "integer_zero": integer_zero, "candidates": candidates}
    parts = [_search_rows(W[rows], weight, grid[rows], group_size, **kind) for rows in chunks(W, TRIED_AT_ONCE)]
    scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    return scales, zeros


def chunks(W: Tensor, elements: int) -> list[slice]:
    """Slices of the rows of W [N, K] with about as many `elements` each; one, on a GPU, or where there are no rows."""
    step = max(1, elements // W.shape[1] if W.device.type == "cpu" else len(W))
    return [slice(start, start + step) for start in range(0, max(1, len(W)), step)]


def _search_rows(
    W: Tensor,
    weight: Tensor,
    grid: Grid,
    group_size: int,
    *,
    symmetric: bool,
    integer_zero: bool,
    candidates: int,
) -> tuple[Tensor, Tensor]:
    n, k = W.shape
    groups = W.view(n, k // group_size, group_size)
    importance = weight.view(1, -1, group_size)
    top = grid.top.view(n, 1)
    nearest_of = grid.nearest()
    if symmetric:
        peak = groups.abs().amax(-1).clamp(min=1e-8)  # [N, K/g]
        if grid.table is not None:  # the outermost of normal levels lies beyond the peak of a small group
            wide = groups.square().mean(-1).sqrt_().mul_(NORMAL_REACH)
            peak = torch.where(grid.normal.view(n, 1), torch.maximum(peak, wide), peak)
        base = peak / grid.reach().view(n, 1)
        zero = grid.middle(integer_zero=integer_zero).view(n, 1).expand_as(peak)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        base = (high - low).clamp(min=1e-8) / top
        zero = (-low / base).round()
    best = torch.full(base.shape, torch.inf, device=W.device)
    scales, zeros = base.clone(), zero.clone()
    for shrink in torch.linspace(0.40, 1.10, candidates).tolist():
        scale = to_fp16(base * shrink)
        z = zero if symmetric else (-groups.amin(-1).clamp(max=0) / base).round().clamp(torch.zeros_like(top), top)
        codes = nearest_of(groups / scale[..., None] + z[..., None])
        error = ((codes - z[..., None]) * scale[..., None] - groups).square_().mul_(importance).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, z, zeros)
    if symmetric and not integer_zero and (top == 1).any():
        scales = torch.where(top == 1, _binary_scales(groups, importance), scales)
    if symmetric and (top == 2).any():
        scales = torch.where(top == 2, _ternary_scales(groups, importance), scales)
    return scales, zeros


def _binary_scales(groups: Tensor, importance: Tensor) -> Tensor:
    """The best scale for levels -s/2, s/2: the derivative of Σ h (|w| - s/2)² vanishes at the mean of |w|.

    groups [N, K/g, g], importance [1, K/g, g] -> [N, K/g]. A grid below the peak misses it: for normal weights and
    groups of 64 it lies at a third of the peak.
    """
    return to_fp16(2 * (groups.abs() * importance).sum(-1) / importance.sum(-1).clamp(min=1e-30))


def _ternary_scales(groups: Tensor, importance: Tensor) -> Tensor:
    """The best scale for levels -s, 0, s, exactly, over all scales; shapes as in `_binary_scales`.

    The weights beyond s/2 are the m largest for some m, and for those s is their mean: Σ h w² falls by (Σ h |w|)² / Σ h
    over them, so the largest fall over all m is the least error.
    """
    size, order = groups.abs().sort(-1, descending=True)
    weight = importance.expand_as(groups).gather(-1, order)
    total, mass = (size * weight).cumsum(-1), weight.cumsum(-1).clamp(min=1e-30)
    best = (total.square() / mass).argmax(-1, keepdim=True)
    return to_fp16((total.gather(-1, best) / mass.gather(-1, best))[..., 0])


def to_fp16(scales: Tensor) -> Tensor:
    """Round to what the file stores, never to zero."""
    return scales.clamp(6e-8, 6e4).half().float()


def nearest(W: Tensor, scales: Tensor, zeros: Tensor, grid: Grid | Tensor) -> Rounded:
    """Round to nearest: W [N, K]."""
    n, k = W.shape
    groups = W.view(n, scales.shape[1], -1)
    codes = Grid.over(grid).nearest()(groups / scales[..., None] + zeros[..., None])
    return Rounded(codes.view(n, k).to(torch.uint8), scales, zeros)


class Sweep(NamedTuple):
    """How GPTQ goes over columns: their `order` [K], and U [K, K], upper triangular, with H⁻¹ = UᵀU in that order."""

    order: Tensor
    U: Tensor

    @staticmethod
    def of(H: Tensor) -> Sweep:
        """Columns in order of falling diag(H); H [K, K] symmetric."""
        H = damped(H)
        order = torch.argsort(H.diagonal(), descending=True)
        factor = torch.linalg.cholesky(H[order][:, order])
        return Sweep(order, torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True))


def gptq(W: Tensor, H: Tensor | Sweep, scales: Tensor, zeros: Tensor, grid: Grid | Tensor) -> Rounded:
    """GPTQ with fixed group scales and columns in order of falling diag(H) (Frantar et al., 2023, algorithm 1).

    W [N, K]; H [K, K] symmetric, or what `Sweep.of` it is; scales, zeros [N, K/g]; grid of N rows.
    """
    nearest_of = Grid.over(grid).nearest()
    k = W.shape[1]
    group_size = k // scales.shape[1]
    order, U = H if isinstance(H, Sweep) else Sweep.of(H)
    work = W.T[order].contiguous()  # [K, N]
    scale, zero = scales.T[order // group_size], zeros.T[order // group_size]  # [K, N]
    inverse = 1 / scale
    codes = torch.empty_like(work)
    for start in range(0, k, BLOCK):
        end = min(start + BLOCK, k)
        errors = torch.empty_like(work[start:end])
        for j in range(start, end):
            w = work[j]
            codes[j] = nearest_of(torch.addcmul(zero[j], w, inverse[j]))
            error = w.sub(codes[j].sub(zero[j]).mul_(scale[j])).div_(U[j, j].item())
            errors[j - start] = error
            if j + 1 < end:
                work[j + 1 : end].addr_(U[j, j + 1 : end], error, alpha=-1)
        if end < k:
            work[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
    back = torch.argsort(order)
    return Rounded(codes[back].T.contiguous().to(torch.uint8), scales, zeros)


def coordinate_descent(W: Tensor, H: Tensor, start: Rounded, grid: Grid | Tensor, *, passes: int = 1) -> Rounded:
    """Cyclic coordinate descent on the codes; every accepted move lowers tr(E H Eᵀ) (Behdin et al., QuantEase, 2023).

    Shapes as in `gptq`; scales and zeros stay.
    """
    nearest_of = Grid.over(grid).nearest()
    k = W.shape[1]
    group_size = k // start.scales.shape[1]
    H = damped(H)
    scale = start.scales.T.repeat_interleave(group_size, 0)  # [K, N]
    zero = start.zeros.T.repeat_interleave(group_size, 0)
    inverse = 1 / scale
    codes = start.codes.T.float().contiguous()
    current = (codes - zero) * scale
    slope = H @ (current - W.T)  # [K, N], half the gradient of f
    diagonal = H.diagonal().tolist()
    for _ in range(passes):
        for begin in range(0, k, BLOCK):
            end = min(begin + BLOCK, k)
            moved = torch.zeros_like(current[begin:end])
            for j in range(begin, end):
                wanted = torch.add(current[j], slope[j], alpha=-1 / diagonal[j])
                codes[j] = nearest_of(torch.addcmul(zero[j], wanted, inverse[j]))
                fresh = codes[j].sub(zero[j]).mul_(scale[j])
                torch.sub(fresh, current[j], out=moved[j - begin])
                current[j] = fresh
                if j + 1 < end:
                    slope[j + 1 : end].addr_(H[j + 1 : end, j], moved[j - begin])
            slope[:begin].addmm_(H[:begin, begin:end], moved)
            slope[end:].addmm_(H[end:, begin:end], moved)
            inside = (
                H[begin:end, begin:end].tril(0).T
            )  # what the inner loop has not added yet: j and the columns before
            slope[begin:end].addmm_(inside, moved)
    return Rounded(codes.T.contiguous().to(torch.uint8), start.scales, start.zeros)


def refit_scales(W: Tensor, H: Tensor, rounded: Rounded) -> Rounded:
    """All scales of a row at once, in closed form: θ = (ΦᵀHΦ)⁻¹ ΦᵀHw with Φ the centred codes by group."""
    n, k = W.shape
    groups = rounded.scales.shape[1]
    H = damped(H)
    centred = rounded.codes.float().view(n, groups, -1) - rounded.zeros[..., None]  # [N, G, g]
    flat = centred.view(n, k)
    size = k // groups
    normal = torch.empty(n, groups, groups, device=W.device)
    for g in range(groups):
        part = centred[:, g] @ H[g * size : (g + 1) * size]  # [N, K]
        normal[:, g] = (part * flat).view(n, groups, size).sum(-1)
    target = ((W @ H) * flat).view(n, groups, size).sum(-1)  # [N, G]
    ridge = 1e-4 * normal.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    eye = torch.eye(groups, device=W.device)
    # Ridge towards the present scales: an all-zero group keeps its scale instead of becoming arbitrary.
    system = normal + ridge[:, None, None] * eye
    scales = torch.linalg.solve(system, (target + ridge[:, None] * rounded.scales)[..., None])[..., 0]
    scales = torch.where(scales > 0.25 * rounded.scales, scales, rounded.scales)
    fresh = Rounded(rounded.codes, to_fp16(scales), rounded.zeros)
    keep = row_loss(W, H, fresh) < row_loss(W, H, rounded)
    return Rounded(rounded.codes, torch.where(keep[:, None], fresh.scales, rounded.scales), rounded.zeros)


def row_loss(W: Tensor, H: Tensor, rounded: Rounded) -> Tensor:
    """E H eᵀ of every row: [N]."""
    E = rounded.dequantize() - W
    return ((E @ H) * E).sum(-1)


def quantize(W: Tensor, H: Tensor, scheme: Scheme | RowLayout, *, method: str = "jpq", passes: int = 2) -> Rounded:
    """Quantize W [N, K] under H [K, K]: "rtn" (nearest), "gptq" (plain), "jpq" (GPTQ, then descent and refits)."""
    grid = grid_of(scheme, len(W), W.device)
    one = scheme.kind if isinstance(scheme, RowLayout) else scheme
    kind = {"symmetric": one.symmetric, "integer_zero": one.integer_zero}
    return quantize_rows(W, H, grid, one.group_size, **kind, method=method, passes=passes)


def quantize_rows(
    W: Tensor,
    H: Tensor,
    grid: Grid | Tensor,
    group_size: int,
    *,
    symmetric: bool,
    integer_zero: bool = False,
    method: str = "jpq",
    passes: int = 2,
    candidates: int = 29,
) -> Rounded:
    """`quantize` with points of every row; `candidates` clippings are tried for every scale."""
    grid = Grid.over(grid)
    weight = H.diagonal().clamp(min=0) + 1e-3 * H.diagonal().mean() + 1e-30
    kind = {"symmetric": symmetric, "integer_zero": integer_zero}
    scales, zeros = search_scales(W, weight, grid, group_size, **kind, candidates=candidates)
    if method == "rtn":
        return nearest(W, scales, zeros, grid)
    sweep, parts = Sweep.of(H), []
    for rows in chunks(W, ROUNDED_AT_ONCE):
        rounded = gptq(W[rows], sweep, scales[rows], zeros[rows], grid[rows])
        for _ in range(passes if method == "jpq" else 0):
            rounded = coordinate_descent(W[rows], H, refit_scales(W[rows], H, rounded), grid[rows])
        parts.append((rounded.codes, rounded.scales, rounded.zeros))
    return Rounded(*(torch.cat(part) for part in zip(*parts, strict=True)))


def stored(rounded: Rounded, scheme: Scheme | RowLayout) -> StoredWeight:
    """As the file holds it."""
    kind = scheme.kind if isinstance(scheme, RowLayout) else scheme
    zeros = None if kind.symmetric else rounded.zeros.to(torch.uint8).cpu().numpy()
    codes, scales = rounded.codes.cpu().numpy(), rounded.scales.cpu().numpy()
    return scheme.store(codes, scales, zeros) if isinstance(scheme, RowLayout) else store(codes, scales, zeros, scheme)
