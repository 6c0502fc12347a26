"""Rounding that knows which errors of different outputs add up: it lowers tr(H_O E H_I Eᵀ) instead of tr(E H_I Eᵀ).

H_I is the second moment of a layer's inputs, H_O of the gradients by its outputs; their Kronecker product approximates
the Hessian of the KL by the weight (Martens and Grosse, K-FAC, 2015; Tseng et al., YAQA, 2025). With unit upper
triangular factors H = M D Mᵀ of both, every element is rounded after those above it and to its left, against the
errors they have left behind (Babai's nearest plane; GPTQ is the case H_O = 1):

    q_ij = round(w_ij - Σ_{i' <= i, j' <= j, not both equal} M_O[i', i] E[i', j'] M_I[j', j])

Elements on one anti-diagonal do not see each other. The matrix is cut into tiles of T x T, tiles on an anti-diagonal
are rounded together, and inside them their own anti-diagonals, one vector operation for all tiles at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from jpq_export.compress.grid import Grid
from jpq_export.compress.rounding import Rounded, damped

TILE = 32  # 16 and 64 are 5% to 10% slower at 1536 x 576
BLOCK = 2048  # outputs whose gradients' moments are kept together: memory and time grow linearly beyond
# Share of the identity in H_O: a moment of 12k tokens says little about most of its directions.
OUTPUT_DAMPING = 0.1


def add_output_moment(moments: dict[str, Tensor], name: str, rows: Tensor, *, fast: bool) -> None:
    """moments[name] += rowsᵀ rows of [tokens, N], in blocks of outputs: float32 [blocks, B, B], B = min(N, BLOCK).

    `fast`: bf16 products. What they lose is far below the identity's share that is added before use.
    """
    count = rows.shape[1]
    size = min(count, BLOCK)
    parts = F.pad(rows, (0, -count % size)).view(len(rows), -1, size).transpose(0, 1)  # [blocks, tokens, B]
    parts = parts.bfloat16() if fast else parts
    fresh = torch.bmm(parts.transpose(1, 2), parts).float()
    moments[name] = moments[name] + fresh if name in moments else fresh


def compact(moment: Tensor) -> Tensor:
    """A finished moment in half the memory: float16, mean diagonal one."""
    mean = moment.diagonal(dim1=1, dim2=2).mean().clamp(min=torch.finfo(torch.float32).tiny)
    return (moment / mean).clamp(-6e4, 6e4).half()


def kept_blocks(moment: Tensor, rows: Tensor | None, count: int) -> list[Tensor]:
    """The moments [n, n] of the outputs that stay, block by block: `rows` sorted, None for all `count`."""
    size = moment.shape[1]
    rows = torch.arange(count, device=moment.device) if rows is None else rows.to(moment.device)
    inside = [rows[(rows >= b * size) & (rows < (b + 1) * size)] - b * size for b in range(len(moment))]
    return [block[index][:, index].float() for block, index in zip(moment, inside, strict=True) if len(index)]


def two_sided(W: Tensor, H_in: Tensor, H_out: list[Tensor], start: Rounded, grid: Grid | Tensor) -> Rounded:
    """New codes for the scales and zeros of `start`, whose own codes stay where they are better.

    That happens at 1 and 2 bits: clipping upsets the order this relies on, while coordinate descent does not mind it.
    W [N, K]; H_in [K, K]; H_out: of consecutive outputs, N together; grid of N rows.
    """
    grid = Grid.over(grid)
    parts, begin = [], 0
    for block in H_out:
        rows = slice(begin, begin + len(block))
        w, old, begin = W[rows], start.rows(rows), rows.stop
        new = Rounded(_codes(w, H_in, block, old, grid[rows]), old.scales, old.zeros)
        better = two_sided_loss(w, H_in, block, new) < two_sided_loss(w, H_in, block, old)
        parts.append(new.codes if better else old.codes)
    return Rounded(torch.cat(parts), start.scales, start.zeros)


def two_sided_loss(W: Tensor, H_in: Tensor, H_out: Tensor, rounded: Rounded) -> float:
    """tr(H_O E H_I Eᵀ) with both moments as they are used here; H_out [N, N]."""
    E = rounded.dequantize() - W
    return float(((_output_moment(H_out) @ E @ damped(H_in)) * E).sum())


def _output_moment(H: Tensor) -> Tensor:
    """H_O with a mean diagonal of one, part of it the identity."""
    scale = H.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    eye = torch.eye(len(H), device=H.device)
    return (1 - OUTPUT_DAMPING) * H / scale + OUTPUT_DAMPING * eye


def unit_upper(H: Tensor) -> Tensor:
    """M of H = M D Mᵀ, unit upper triangular."""
    factor = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)
    return factor / factor.diagonal()


def _codes(W: Tensor, H_in: Tensor, H_out: Tensor, start: Rounded, grid: Grid) -> Tensor:
    """uint8 [N, K]; rows and columns are taken in order of falling diagonals, as GPTQ takes columns."""
    H_in, H_out = damped(H_in), _output_moment(H_out)
    rows, columns = (torch.argsort(H.diagonal(), descending=True) for H in (H_out, H_in))
    size = W.shape[1] // start.scales.shape[1]
    pick = (rows[:, None], columns[None, :])
    scale, zero = (part.repeat_interleave(size, 1)[pick] for part in (start.scales, start.zeros))
    M_out, M_in = (unit_upper(H[order][:, order]) for H, order in ((H_out, rows), (H_in, columns)))
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    codes[pick] = _round_tiles(W[pick], scale, zero, grid[rows], M_out, M_in).to(torch.uint8)
    return codes


@dataclass(slots=True, eq=False)
class _Tiles:
    """A matrix [N, K] padded and cut: `flat` [N/T, K/T, T * T]."""

    flat: Tensor

    @staticmethod
    def of(matrix: Tensor, fill: float) -> _Tiles:
        n, k = (-(-size // TILE) * TILE for size in matrix.shape)
        padded = matrix.new_full((n, k), fill)
        padded[: matrix.shape[0], : matrix.shape[1]] = matrix
        tiles = padded.view(n // TILE, TILE, k // TILE, TILE).transpose(1, 2)
        return _Tiles(tiles.reshape(n // TILE, k // TILE, TILE * TILE))


def _padded_factor(M: Tensor) -> Tensor:
    """The factor with identity behind it, to whole tiles."""
    size = -(-len(M) // TILE) * TILE
    out = torch.eye(size, device=M.device)
    out[: len(M), : len(M)] = M
    return out


def _round_tiles(W: Tensor, scale: Tensor, zero: Tensor, grid: Grid, M_out: Tensor, M_in: Tensor) -> Tensor:
    """Codes [N, K] as floats, everything in the order of rounding; `scale`, `zero` [N, K], grid of N rows."""
    w, s, z = (_Tiles.of(m, fill).flat for m, fill in ((W, 0.0), (scale, 1.0), (zero, 0.0)))
    down, across = w.shape[:2]
    n, k = down * TILE, across * TILE
    padded = Grid.joined([grid, Grid(grid.top.new_zeros(n - len(grid)))]).view(down, TILE)
    M_out, M_in = _padded_factor(M_out), _padded_factor(M_in)
    tiles_out, tiles_in = M_out.view(down, TILE, n), M_in.view(across, TILE, k)
    # Factors inside a tile: rows of M_Oᵀ by output, columns of M_I by input in reverse (see _round_one).
    own_out = torch.stack([tiles_out[i, :, i * TILE : (i + 1) * TILE].triu(1).T for i in range(down)])
    own_in = torch.stack([tiles_in[j, :, j * TILE : (j + 1) * TILE].triu(1).T.flip(0) for j in range(across)])
    by_row, by_column = M_out.T.reshape(down, TILE, n), M_in.T.reshape(across, TILE, k)
    E, U = W.new_zeros(down, TILE, k), W.new_zeros(n, k)  # errors, and errors with what came from the left
    codes = torch.zeros_like(w)
    for step in range(down + across - 1):
        i = torch.arange(max(0, step - across + 1), min(down, step + 1), device=W.device)
        j = step - i
        left = torch.bmm(E[i], by_column[j].transpose(1, 2))  # [tiles, T, T]
        above = torch.bmm(by_row[i], U.view(n, across, TILE)[:, j].transpose(0, 1))
        tile = (w[i, j], above.flatten(1), left.flatten(1), s[i, j], z[i, j], padded[i])
        codes[i, j], error, reached = _round_one(*tile, own_out[i], own_in[j])
        E.view(down, TILE, across, TILE)[i, :, j] = error
        U.view(down, TILE, across, TILE)[i, :, j] = reached
    whole = codes.view(down, across, TILE, TILE).transpose(1, 2).reshape(n, k)
    return whole[: W.shape[0], : W.shape[1]]


def _round_one(
    w: Tensor,
    above: Tensor,
    left: Tensor,
    scale: Tensor,
    zero: Tensor,
    grid: Grid,
    own_out: Tensor,
    own_in: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [tiles, T * T], errors and errors with what came from the left [tiles, T, T].

    w, above and left (feedback from other tiles), scale, zero [tiles, T * T], grid [tiles, T]; own_out [tiles, T, T]:
    row a is M_O[:, a]; own_in: row T - 1 - b is M_I[:, b]. The anti-diagonal a + b = m of a tile is then a run of rows
    of both, and of the flat tile every (T - 1)th element; `reached` is kept with b in reverse for the same reason,
    there every (T + 1)th.
    """
    size = TILE
    codes, error, reached = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    error_rows, reached_rows = error.view(-1, size, size), reached.view(-1, size, size)
    inverse, offset = 1 / scale, torch.addcmul(w, zero, scale)  # the error of code q is q * scale - offset
    base = torch.addcmul(zero, w - above, inverse)  # where the code lies without feedback from the left and inside
    for m in range(2 * size - 1):
        low, high = max(0, m - size + 1), min(size, m + 1)
        run = slice(m + low * (size - 1), m + (high - 1) * (size - 1) + 1, size - 1)
        first = size - 1 - m + low
        back = slice(first, first + high - low)  # rows of what is kept in reverse
        from_left = left[:, run] + torch.linalg.vecdot(error_rows[:, low:high], own_in[:, back])
        feedback = from_left + torch.linalg.vecdot(reached_rows[:, back], own_out[:, low:high])
        place = torch.addcmul(base[:, run], feedback, inverse[:, run], value=-1)
        q = grid[:, low:high].nearest()(place)
        codes[:, run] = q
        e = (q * scale[:, run]).sub_(offset[:, run])
        error[:, run] = e
        reached[:, (size - 1 - m) * size + low * (size + 1) :: size + 1][:, : high - low] = e + from_left
    return codes, error_rows, reached_rows.flip(1).transpose(1, 2)
