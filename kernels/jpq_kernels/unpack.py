"""Packed codes to numbers inside a Triton kernel: the device's one statement of `numerics/packing.py`.

A row's bit stream is read in elements of 32 bits (8 where a row does not divide into words). The smallest run of whole
elements that holds whole codes is a unit: UNIT_ELEMENTS elements, UNIT_CODES codes (3 words hold 32 codes of 3 bits,
one word holds 8 of 4 bits). A lane loads whole units, so no byte is read twice and no code needs a branch: which bits
of which element hold a code is known when the kernel is compiled.

Normal levels (BITS 35 to 38, for codes of 3 to 6 bits) are looked up once a code is alone: bytes around 128.

Ternary rows (BITS 16) have no such unit: groups begin anywhere in a byte of five codes. There a unit is up to 16 codes
and the four bytes they may touch, as one word, beside the number of codes of the first byte that come before.
"""

# Constants are annotated as what Triton wraps them in, which knows fewer operators than the integers they are.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

from jpq_export.numerics.levels import MIDDLE, NORMAL_WIDTHS, normal_bytes

CENTRE: tl.constexpr = tl.constexpr(MIDDLE)
FIRST_NORMAL: tl.constexpr = tl.constexpr(NORMAL_WIDTHS[0])
# Levels of codes 4 i .. 4 i + 3 of every width, the first in the lowest byte.
LEVEL_WORDS: tl.constexpr = tl.constexpr(
    tuple(tuple(np.frombuffer(normal_bytes(bits).tobytes(), "<u4").tolist()) for bits in NORMAL_WIDTHS)
)


@triton.jit
def load_unit(packed, offsets, mask, COUNT: tl.constexpr, FIRST: tl.constexpr = 0):
    """Elements FIRST .. COUNT-1 of the units at `offsets` (int64, in elements), as a tuple of uint32 tensors."""
    element = tl.load(packed + offsets + FIRST, mask=mask, other=0).to(tl.uint32)
    if FIRST + 1 == COUNT:
        return (element,)
    else:
        return (element,) + load_unit(packed, offsets, mask, COUNT, FIRST + 1)  # noqa: RUF005 Triton knows no stars


@triton.jit
def load_ternary_unit(packed, row_start, first, row_bytes, mask):
    """The four bytes from the one that holds code `first` of the row on, as uint32, and how many of its codes precede.

    `row_start`: int64 offset of the row; bytes past the row's end are not read.
    """
    byte = first // 5
    word = tl.load(packed + row_start + byte, mask=mask, other=0).to(tl.uint32)
    for i in tl.static_range(1, 4):
        inside = mask & (byte + i < row_bytes)
        word = word | (tl.load(packed + row_start + byte + i, mask=inside, other=0).to(tl.uint32) << (8 * i))
    return (word, first - 5 * byte)


@triton.jit
def ternary_digit(q, digit):
    """Code number `digit` (0 .. 4) of the stored byte q, both int32 or uint32: the top of q * 3**digit modulo 256."""
    power = tl.where(digit == 4, 81, (0x1B090301 >> (8 * digit & 31)) & 255).to(tl.uint32)  # 3**digit
    return ((q * power & 255) * 3) >> 8


@triton.jit
def float_base():
    """The bits of 2**23 as float32, in a way the compiler cannot see through (no grid has 2**30 programs).

    Mask and base would both be immediates otherwise, and one instruction takes only one: two a code instead of one.
    """
    return (0x4B000000 + (tl.program_id(0) >> 30)).to(tl.uint32)


@triton.constexpr_function
def width_of(bits: int) -> int:
    """Bits of a code in a row."""
    return bits % 32


@triton.jit
def level_words(code, WIDTH: tl.constexpr, FIRST: tl.constexpr, BIT: tl.constexpr):
    """The word with the level of each code, from word FIRST on, chosen by bits 2 .. BIT of the code."""
    if BIT == 1:
        return tl.full(code.shape, LEVEL_WORDS[WIDTH - FIRST_NORMAL][FIRST], tl.uint32)
    else:
        low = level_words(code, WIDTH, FIRST, BIT - 1)
        high = level_words(code, WIDTH, FIRST + (1 << (BIT - 2)), BIT - 1)
        return tl.where(((code >> BIT) & 1) == 1, high, low)


@triton.jit
def level(code, WIDTH: tl.constexpr):
    """The level of each code (uint32, of WIDTH bits), as a byte around 128: 1, 3, 7 or 15 choices and a shift."""
    return (level_words(code, WIDTH, 0, WIDTH - 1) >> ((code & 3) << 3)) & 255


@triton.jit
def doubled(unit, base, CODE: tl.constexpr, BITS: tl.constexpr, ELEMENT_BITS: tl.constexpr):
    """2**23 + 2 * code number CODE of each unit, as float32.

    A float32 of exponent 23 counts in ones, so a code put into its low bits needs no conversion instruction (those run
    at a quarter of the rate or less); `base` is what `float_base` returns. Doubled, so that subtracting
    2**23 + 2 * zero is exact for half-integer zeros.
    """
    if BITS == 16:
        at = unit[1] + CODE
        byte = at * 13 >> 6  # at // 5, for at < 20
        code = ternary_digit((unit[0] >> (8 * byte).to(tl.uint32)) & 255, at - 5 * byte)
        return ((code << 1) | base).to(tl.float32, bitcast=True)
    else:
        WIDTH: tl.constexpr = width_of(BITS)
        START: tl.constexpr = CODE * WIDTH % ELEMENT_BITS
        AT: tl.constexpr = CODE * WIDTH // ELEMENT_BITS
        bits = unit[AT] << 1 if START == 0 else unit[AT] >> (START - 1)
        if START + WIDTH > ELEMENT_BITS:
            bits = bits | (unit[AT + 1] << (ELEMENT_BITS - START + 1))
        MASK: tl.constexpr = ((1 << WIDTH) - 1) << 1
        bits = bits & MASK if WIDTH == BITS else level((bits & MASK) >> 1, WIDTH) << 1
        return (bits | base).to(tl.float32, bitcast=True)


@triton.jit
def levels(
    unit,
    base,
    zero,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    ELEMENT_BITS: tl.constexpr,
):
    """2 * (code - zero) of codes FIRST, FIRST + STEP, .. (COUNT of them) of each unit: float32 [..., COUNT], exact.

    `zero` is what `doubled_zero` returns. Even and odd codes are joined, so all codes of a unit stay with its lane.
    """
    if COUNT == 1:
        return tl.expand_dims(doubled(unit, base, FIRST, BITS, ELEMENT_BITS) - zero, -1)
    else:
        even = levels(unit, base, zero, FIRST, 2 * STEP, COUNT // 2, BITS, ELEMENT_BITS)
        odd = levels(unit, base, zero, FIRST + STEP, 2 * STEP, COUNT // 2, BITS, ELEMENT_BITS)
        return tl.reshape(tl.join(even, odd), even.shape[:-1] + [COUNT])  # noqa: RUF005


@triton.jit
def add_products(
    total,
    value,
    unit,
    base,
    zero,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    ELEMENT_BITS: tl.constexpr,
):
    """Add to total [R, N, U]: the sum over codes FIRST, FIRST + STEP, .. of value [R, U, COUNT] * 2 (code - zero).

    `value` is taken apart instead of the codes being joined: it is the smaller one, shared by all rows of W.
    """
    if COUNT == 1:
        code = doubled(unit, base, FIRST, BITS, ELEMENT_BITS) - zero
        return total + tl.reshape(value, value.shape[:-1])[:, None, :] * code[None, :, :]
    else:
        even, odd = tl.split(tl.reshape(value, value.shape[:-1] + [COUNT // 2, 2]))  # noqa: RUF005
        total = add_products(total, even, unit, base, zero, FIRST, 2 * STEP, COUNT // 2, BITS, ELEMENT_BITS)
        return add_products(total, odd, unit, base, zero, FIRST + STEP, 2 * STEP, COUNT // 2, BITS, ELEMENT_BITS)


@triton.jit
def doubled_zero(zeros, row, group, mask, zero_row_bytes, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """2**23 + 2 * zero point of `group` in `row` (broadcast against each other), as float32."""
    if SYMMETRIC:
        return 8388608.0 + (2 if BITS == 16 else 2 * CENTRE if BITS > 32 else (1 << BITS) - 1)
    elif BITS == 16:
        q = tl.load(zeros + row.to(tl.int64) * zero_row_bytes + group // 5, mask=mask, other=0).to(tl.uint32)
        return 8388608.0 + (2 * ternary_digit(q, group % 5)).to(tl.float32)
    else:
        start = group * BITS
        byte = zeros + row.to(tl.int64) * zero_row_bytes + start // 8
        shift = start % 8
        bits = tl.load(byte, mask=mask, other=0).to(tl.uint32)
        if 8 % BITS != 0:  # a code may run into the next byte
            spans = mask & (shift + BITS > 8)
            bits = bits | (tl.load(byte + 1, mask=spans, other=0).to(tl.uint32) << 8)
        code = (bits >> shift) & ((1 << BITS) - 1)
        return 8388608.0 + (2 * code).to(tl.float32)
