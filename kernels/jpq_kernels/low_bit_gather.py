"""`jpq::LowBitGather`: rows of dequantize(W), an embedding kept in its packed form."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from jpq_kernels.unpack import doubled_zero, float_base, levels, load_ternary_unit, load_unit
from jpq_kernels.weight import DeviceWeight, divide_up, expect


@triton.jit
def gather_kernel(
    indices,
    packed,
    scales,
    zeros,
    out,
    N,
    K,
    zero_row_bytes,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ELEMENT_BITS: tl.constexpr,
    UNIT_ELEMENTS: tl.constexpr,
    UNIT_CODES: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """One program: BLOCK_UNITS units of one row; out [count, K]. An index outside -N .. N-1 gives a row of NaN."""
    at = tl.program_id(0).to(tl.int64)
    index = tl.load(indices + at).to(tl.int64)
    row = tl.where(index < 0, index + N, index)
    known = (row >= 0) & (row < N)
    row = tl.where(known, row, 0)
    units = K // UNIT_CODES
    unit = tl.program_id(1) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    inside = unit < units
    group = unit * UNIT_CODES // GROUP_SIZE
    if BITS == 16:
        row_bytes = (K + 4) // 5
        elements = load_ternary_unit(packed, row * row_bytes, unit * UNIT_CODES, row_bytes, inside)
    else:
        elements = load_unit(packed, (row * units + unit) * UNIT_ELEMENTS, inside, UNIT_ELEMENTS)
    scale = tl.load(scales + row * (K // GROUP_SIZE) + group, mask=inside, other=0.0).to(tl.float32)
    scale = tl.where(known, 0.5 * scale, float("nan"))
    zero = doubled_zero(zeros, row, group, inside, zero_row_bytes, BITS, SYMMETRIC)
    base = float_base()
    value = levels(elements, base, zero, 0, 1, UNIT_CODES, BITS, ELEMENT_BITS) * scale[:, None]
    k = unit[:, None] * UNIT_CODES + tl.arange(0, UNIT_CODES)[None, :]
    tl.store(out + at * K + k, value, mask=inside[:, None])


GATHER_WARPS = 4
GATHER_CODES = 1024  # a program: 8 codes a lane of four warps, enough to hide one load behind the others


def gather_units(unit_codes: int) -> int:
    """Units of one program."""
    return max(1, GATHER_CODES // unit_codes)


def low_bit_gather(
    indices: torch.Tensor, weight: DeviceWeight, *, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows of dequantize(weight) at `indices` [...] (int32 or int64, from the end when negative) -> `dtype` [..., K].

    An index out of range gives a row of NaN: refusing it here would make every call wait for the device.
    """
    n, k = weight.shape
    shape = (*indices.shape, k)
    expect("indices", indices, (torch.int64, torch.int32), tuple(indices.shape), weight.packed.device)
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"dtype: expected float32 or float16, got {dtype}")
    out = torch.empty(shape, dtype=dtype, device=indices.device) if out is None else out
    expect("out", out, dtype, shape, indices.device)
    if indices.numel() == 0:
        return out
    units = gather_units(weight.layout.unit.codes)
    grid = (indices.numel(), divide_up(k // weight.layout.unit.codes, units))
    zeros = weight.scales if weight.zeros is None else weight.zeros
    options: dict[str, Any] = weight.layout.constants() | {"BLOCK_UNITS": units, "num_warps": GATHER_WARPS}
    arguments = (indices, weight.elements(), weight.scales, zeros, out, n, k, weight.zero_row_bytes())
    gather_kernel[grid](*arguments, **options)
    return out
