"""`jpq::LowBitMatMul`, Y = X · dequantize(W)ᵀ (+ bias), for few rows of X (decode) and for many (prefill).

Both kernels multiply X with the exact integers 2 * (code - zero) and apply scale / 2 to the sum over a part of one
group, in fp32. So W is never rounded; X is rounded to fp16 by the kernel for many rows only (exact for fp16 X; values
of fp32 X beyond 65504 become infinite there, as in any fp16 product).

Both may split K over programs: each writes its sum to a workspace [splits, rows, N], and a second kernel adds them in
the order of K. No atomics: the same inputs give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from jpq_export.numerics.scheme import KERNEL_NORMAL
from jpq_kernels.unpack import add_products, doubled_zero, float_base, levels, load_ternary_unit, load_unit
from jpq_kernels.weight import DeviceWeight, Layout, divide_up, expect

MOST_FEW_ROWS = 16


@triton.jit
def store_result(out, workspace, y, m, n, rows, N, split, splits):
    """Write tile y at rows m, columns n: of out [rows, N], or when K is split of workspace [splits, rows, N]."""
    inside = (m < rows)[:, None] & (n < N)[None, :]
    place = m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(out + place, y, mask=inside & (splits == 1))
    tl.store(workspace + split.to(tl.int64) * rows * N + place, y, mask=inside & (splits > 1))


# `packed` must not be known to be 16-byte aligned: Triton would then give a lane four neighbouring units, while the
# codes of X's units lie 16 bytes a unit, one unit a lane. With one unit a lane both, X needs no exchange of lanes.
@triton.jit(do_not_specialize_on_alignment=["packed"])
def few_rows_kernel(
    x,
    packed,
    scales,
    zeros,
    bias,
    out,
    workspace,
    rows,
    N,
    K,
    bias_length,
    zero_row_bytes,
    split_units,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ELEMENT_BITS: tl.constexpr,
    UNIT_ELEMENTS: tl.constexpr,
    UNIT_CODES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One program: ROWS rows of X by BLOCK_N rows of W, over the units of one split.

    A lane keeps one unit of each of the BLOCK_N rows; the codes are multiplied in fp32 as they are unpacked.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    n_inside = n < N
    row = n[:, None].to(tl.int64)  # [BLOCK_N, 1]
    units = K // UNIT_CODES
    last = tl.minimum(units, (split + 1) * split_units)
    lanes = tl.arange(0, BLOCK_UNITS)
    vector = tl.arange(0, VECTOR)
    base = float_base()
    total = tl.zeros([ROWS, BLOCK_N, BLOCK_UNITS], tl.float32)
    for start in range(split * split_units, last, BLOCK_UNITS):
        unit = start + lanes
        unit_inside = unit < last
        inside = n_inside[:, None] & unit_inside[None, :]
        group = (unit * UNIT_CODES // GROUP_SIZE)[None, :]
        if BITS == 16:
            row_bytes = (K + 4) // 5
            elements = load_ternary_unit(packed, row * row_bytes, unit[None, :] * UNIT_CODES, row_bytes, inside)
        else:
            elements = load_unit(
                packed, row * (units * UNIT_ELEMENTS) + unit[None, :] * UNIT_ELEMENTS, inside, UNIT_ELEMENTS
            )
        scale = tl.load(scales + row * (K // GROUP_SIZE) + group, mask=inside, other=0.0).to(tl.float32)
        zero = doubled_zero(zeros, row, group, inside, zero_row_bytes, BITS, SYMMETRIC)
        part = tl.zeros([ROWS, BLOCK_N, BLOCK_UNITS], tl.float32)
        for first in tl.static_range(0, UNIT_CODES, VECTOR):
            k = unit[:, None] * UNIT_CODES + first + vector[None, :]  # [BLOCK_UNITS, VECTOR]
            x_inside = (m < rows)[:, None, None] & unit_inside[None, :, None]
            value = tl.load(x + m[:, None, None] * K + k[None, :, :], mask=x_inside, other=0.0).to(tl.float32)
            part = add_products(part, value, elements, base, zero, first, 1, VECTOR, BITS, ELEMENT_BITS)
        total += part * scale[None, :, :]
    y = 0.5 * tl.sum(total, axis=2)  # [ROWS, BLOCK_N]
    y += tl.load(bias + n, mask=n < bias_length, other=0.0)[None, :]
    store_result(out, workspace, y, m, n, rows, N, split, tl.num_programs(1))


@triton.jit
def many_rows_kernel(
    x,
    packed,
    scales,
    zeros,
    bias,
    out,
    workspace,
    rows,
    N,
    K,
    bias_length,
    zero_row_bytes,
    split_blocks,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ELEMENT_BITS: tl.constexpr,
    UNIT_ELEMENTS: tl.constexpr,
    UNIT_CODES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """One program: a tile [BLOCK_M, BLOCK_N] of Y, over the blocks of one split.

    A block is BLOCK_UNITS units of one group: its product with X runs on the tensor cores, exact integers in fp16, and
    its scale is applied to the sum: cheaper than scaling W while BLOCK_M <= the block's codes, and without rounding W.
    """
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    n_inside = n < N
    row = n.to(tl.int64)
    BLOCK_CODES: tl.constexpr = BLOCK_UNITS * UNIT_CODES
    GROUP_BLOCKS: tl.constexpr = (GROUP_SIZE + BLOCK_CODES - 1) // BLOCK_CODES
    GROUP_UNITS: tl.constexpr = GROUP_SIZE // UNIT_CODES
    groups = K // GROUP_SIZE
    last = tl.minimum(groups * GROUP_BLOCKS, (split + 1) * split_blocks)
    base = float_base()
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(split * split_blocks, last):
        group = block // GROUP_BLOCKS
        unit = (block % GROUP_BLOCKS) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)  # within the group
        inside = n_inside[:, None] & (unit < GROUP_UNITS)[None, :]
        if BITS == 16:
            row_bytes = (K + 4) // 5
            first = (group * GROUP_UNITS + unit[None, :]) * UNIT_CODES
            elements = load_ternary_unit(packed, row[:, None] * row_bytes, first, row_bytes, inside)
        else:
            place = row[:, None] * (groups * GROUP_UNITS) + group * GROUP_UNITS + unit[None, :]
            elements = load_unit(packed, place * UNIT_ELEMENTS, inside, UNIT_ELEMENTS)
        zero = doubled_zero(zeros, row[:, None], group, n_inside[:, None], zero_row_bytes, BITS, SYMMETRIC)
        code = levels(elements, base, zero, 0, 1, UNIT_CODES, BITS, ELEMENT_BITS)
        code = tl.reshape(code, [BLOCK_N, BLOCK_CODES]).to(tl.float16)  # |2 (code - zero)| <= 510: exact
        k = (block % GROUP_BLOCKS) * BLOCK_CODES + tl.arange(0, BLOCK_CODES)  # within the group
        x_inside = (m < rows)[:, None] & (k < GROUP_SIZE)[None, :]
        x_place = m[:, None].to(tl.int64) * K + group * GROUP_SIZE + k[None, :]
        value = tl.load(x + x_place, mask=x_inside, other=0.0).to(tl.float16)
        scale = tl.load(scales + row * groups + group, mask=n_inside, other=0.0).to(tl.float32)
        total += tl.dot(value, tl.trans(code)) * scale[None, :]
    y = 0.5 * total + tl.load(bias + n, mask=n < bias_length, other=0.0)[None, :]
    store_result(out, workspace, y, m, n, rows, N, split, tl.num_programs(2))


@triton.jit
def add_splits_kernel(workspace, bias, out, count, N, bias_length, splits, BLOCK: tl.constexpr):
    """Set out [rows, N] to the sum of workspace [splits, rows, N] in order, plus bias [N]; count = rows * N."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(workspace + i, mask=inside, other=0.0)
        workspace += count
    n = i % N
    total += tl.load(bias + n, mask=inside & (n < bias_length), other=0.0)
    tl.store(out + i, total, mask=inside)


@dataclass(frozen=True, slots=True)
class FewRowsTile:
    """Tile of `few_rows_kernel`; one warp a program, so lanes exchange nothing through shared memory."""

    rows: int
    block_n: int
    vector_bytes: int
    block_units: int = 32  # one unit a lane
    num_warps: int = 1


@dataclass(frozen=True, slots=True)
class ManyRowsTile:
    """Tile of `many_rows_kernel`."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    block_bytes: int = 128  # of a row of X: 64 codes for fp16, 32 for fp32


# BLOCK_N rows of W share one load of X (the more, the fewer loads a weight), but each row of X keeps two sums for each
# of them in registers, beside X's codes of a whole unit, which the compiler loads first. At 3 and 5 bits (32 codes a
# unit) fp32 X of 8 rows spilled with 4 rows of W on sm_87 or sm_90, and 16 rows always: so more go in blocks of 8.
FEW_ROWS_TILES = (
    FewRowsTile(rows=1, block_n=8, vector_bytes=16),
    FewRowsTile(rows=2, block_n=8, vector_bytes=16),
    FewRowsTile(rows=4, block_n=8, vector_bytes=16),
    FewRowsTile(rows=8, block_n=2, vector_bytes=8),
)
# 16 rows is the smallest product of the tensor cores. 64 x 64 keeps 8 warps' worth of tiles on the small boards' 8
# multiprocessors for the narrow layers of small models; 128 rows halve the unpacking where there are rows enough.
MANY_ROWS_TILES = (
    ManyRowsTile(block_m=16, block_n=64, num_warps=4, num_stages=3),
    ManyRowsTile(block_m=64, block_n=64, num_warps=4, num_stages=3),
    ManyRowsTile(block_m=128, block_n=64, num_warps=8, num_stages=3),
)
ADD_SPLITS_BLOCK = 256
MANY_CHOICES = (KERNEL_NORMAL + 5, KERNEL_NORMAL + 6)
WARPS_PER_MULTIPROCESSOR = 16  # the most programs of one warp that sm_87 keeps at once
FP16_DOT_FROM = 5  # rows: from here on, fp32 products of fp16 X outlast the loads they wait for


def low_bit_matmul(
    x: torch.Tensor,
    weight: DeviceWeight,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    multiprocessors: int | None = None,
) -> torch.Tensor:
    """Y = X · dequantize(W)ᵀ (+ bias); X [..., K] fp32 or fp16 -> Y [..., N] of the same type.

    bias: fp32 [N]. `out` [..., N] and `workspace`, fp32 of `workspace_size(...)` numbers, are made here when not given.
    `multiprocessors`: how many the device has; read from it when not given. ValueError for tensors that do not fit.
    """
    n, k = weight.shape
    check_operands(x, weight, bias)
    rows = x.numel() // k
    shape = (*x.shape[:-1], n)
    out = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
    expect("out", out, x.dtype, shape, x.device)
    if rows == 0:
        return out
    launch = plan(rows, weight, x.dtype, multiprocessors or count_multiprocessors(x.device))
    size = launch.workspace_size(rows, n)
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.float32, device=x.device)
    elif workspace.dtype != torch.float32 or workspace.numel() < size or workspace.device != x.device:
        raise ValueError(
            f"workspace: expected float32 of {size} numbers on {x.device}, got {workspace.dtype} "
            f"of {workspace.numel()} on {workspace.device}"
        )
    run(launch, x, weight, bias, out, workspace)
    if size:
        grid = (divide_up(rows * n, ADD_SPLITS_BLOCK),)
        bias_length, addend = (0, workspace) if bias is None else (n, bias)
        options: dict[str, Any] = {"BLOCK": ADD_SPLITS_BLOCK}
        add_splits_kernel[grid](workspace, addend, out, rows * n, n, bias_length, launch.splits, **options)
    return out


def check_operands(x: torch.Tensor, weight: DeviceWeight, bias: torch.Tensor | None) -> None:
    """ValueError unless X and the bias fit the weight."""
    n, k = weight.shape
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x: last dimension must be the weight's in_features {k}, got shape {tuple(x.shape)}")
    expect("x", x, (torch.float32, torch.float16), tuple(x.shape), weight.packed.device)
    if bias is not None:
        expect("bias", bias, torch.float32, (n,), x.device)


@dataclass(frozen=True, slots=True)
class Launch:
    """Which kernel, with which tile, and into how many parts K is split; a part is `split_steps` steps long.

    A step is one unit (few rows) or one block (many rows).
    """

    tile: FewRowsTile | ManyRowsTile
    splits: int
    split_steps: int

    def workspace_size(self, rows: int, n: int) -> int:
        """Numbers of the workspace; 0 when K is not split."""
        return self.splits * rows * n if self.splits > 1 else 0


def plan(rows: int, weight: DeviceWeight, dtype: torch.dtype, multiprocessors: int) -> Launch:
    """Choose tile and split of a product of `rows` rows on a device of so many multiprocessors."""
    n, k = weight.shape
    few = rows <= MOST_FEW_ROWS and not (dtype == torch.float16 and rows >= FP16_DOT_FROM)
    if few:
        tiles = few_rows_tiles(weight.bits)
        tile = next((tile for tile in tiles if rows <= tile.rows), tiles[-1])
        steps, least = k // weight.layout.unit.codes, 2 * tile.block_units
        programs = divide_up(n, tile.block_n) * divide_up(rows, tile.rows)
        wanted = WARPS_PER_MULTIPROCESSOR * multiprocessors
    else:
        tile = next((tile for tile in MANY_ROWS_TILES if rows <= tile.block_m), MANY_ROWS_TILES[-1])
        steps, least = weight.groups * group_blocks(weight.layout, tile, dtype.itemsize), 4
        programs = divide_up(n, tile.block_n) * divide_up(rows, tile.block_m)
        wanted = 2 * multiprocessors
    splits = max(1, min(wanted // programs, steps // least))
    split_steps = divide_up(steps, splits)
    return Launch(tile, divide_up(steps, split_steps), split_steps)


def few_rows_tiles(bits: int) -> tuple[FewRowsTile, ...]:
    """The tiles for a width, smallest first.

    Normal levels of 5 and 6 bits are chosen among 8 and 16 words: with 4 rows of X that spilled on sm_90 and sm_110.
    """
    return tuple(tile for tile in FEW_ROWS_TILES if tile.rows != 4 or bits not in MANY_CHOICES)


def block_units(layout: Layout, tile: ManyRowsTile, x_bytes: int) -> int:
    """Units of a block: a power of two, at most those of a group rounded up, at least 16 codes."""
    codes = layout.unit.codes
    whole_group = 1 << (layout.group_size // codes - 1).bit_length()  # rounded up to a power of two
    return max(min(whole_group, tile.block_bytes // x_bytes // codes), divide_up(16, codes))


def group_blocks(layout: Layout, tile: ManyRowsTile, x_bytes: int) -> int:
    """Blocks in a group."""
    return divide_up(layout.group_size, block_units(layout, tile, x_bytes) * layout.unit.codes)


def constants_of(layout: Layout, tile: FewRowsTile | ManyRowsTile, x_bytes: int) -> dict[str, int | bool]:
    """Constants of the kernel that `tile` belongs to, for X of `x_bytes` a number."""
    if isinstance(tile, ManyRowsTile):
        shape = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_UNITS": block_units(layout, tile, x_bytes)}
    else:
        vector = min(layout.unit.codes, tile.vector_bytes // x_bytes)
        shape = {"ROWS": tile.rows, "BLOCK_N": tile.block_n, "BLOCK_UNITS": tile.block_units, "VECTOR": vector}
    return layout.constants() | shape


def run(
    launch: Launch,
    x: torch.Tensor,
    weight: DeviceWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    """Start the kernel; the bias is added here only when K is not split."""
    n, k = weight.shape
    rows = x.numel() // k
    bias_length = n if bias is not None and launch.splits == 1 else 0
    tensors = (x, weight.elements(), weight.scales, weight.scales if weight.zeros is None else weight.zeros)
    numbers = (rows, n, k, bias_length, weight.zero_row_bytes(), launch.split_steps)
    arguments = (*tensors, workspace if bias is None else bias, out, workspace, *numbers)
    tile = launch.tile
    options: dict[str, Any] = constants_of(weight.layout, tile, x.element_size()) | {"num_warps": tile.num_warps}
    if isinstance(tile, FewRowsTile):
        grid = (divide_up(n, tile.block_n), launch.splits, divide_up(rows, tile.rows))
        few_rows_kernel[grid](*arguments, **options)
    else:
        grid = (divide_up(n, tile.block_n), divide_up(rows, tile.block_m), launch.splits)
        options["num_stages"] = tile.num_stages
        many_rows_kernel[grid](*arguments, **options)


def count_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 for the CPU, where the kernels run in Triton's interpreter."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
