"""Nodes that unpack codes as `numerics/packing.py` lays them out; where bytes are constant, onnxruntime folds them."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import numpy as np
import onnx_ir as ir

from jpq_export.lower.nodes import Nodes
from jpq_export.numerics.levels import normal_bytes
from jpq_export.numerics.scheme import TERNARY, Scheme, row_bytes

INT32, UINT8 = ir.DataType.INT32, ir.DataType.UINT8


def pattern(bits: float) -> tuple[int, int]:
    """Codes and bytes after which the bit layout repeats: (8, 3) at 3 bits, (2, 1) at 4, (5, 1) ternary."""
    if bits == TERNARY:
        return 5, 1
    shared = gcd(int(bits), 8)
    return 8 // shared, int(bits) // shared


def unpack(
    nodes: Nodes, packed: ir.Value, bits: float, *, count: int, transposed: bool = False, doubled: bool = False
) -> ir.Value:
    """Packed uint8 [N, bytes] -> codes uint8 [N, codes], or [codes, N] when `transposed`; times 2 when `doubled`.

    `count`: number of codes to cut to; 0 when rows end with a byte pattern. Bytes are transposed rather than codes:
    what onnxruntime folds stays in memory, and there are fewer of them.
    """
    codes, size = pattern(bits)
    if bits == 8:
        return nodes("Transpose", packed, perm=[1, 0]) if transposed else packed
    if missing := -(-count // codes) * size - row_bytes(count, bits):  # fill the last pattern with zero bytes
        packed = nodes("Pad", packed, nodes.ints(0, 0, 0, missing))
    columns = (nodes("Reshape", packed, nodes.ints(0, -1, size)),)  # [N, patterns, size]
    if transposed:
        columns = (nodes("Transpose", columns[0], perm=[1, 2, 0]),)  # [patterns, size, N]
    axis = 1 if transposed else 2
    if size > 1:
        columns = nodes.many("Split", columns[0], names=[None] * size, axis=axis, num_outputs=size)
    out = _digits(nodes, columns[0]) if bits == TERNARY else _cut(nodes, columns, int(bits), doubled=doubled)
    flat = nodes("Flatten", nodes("Concat", *out, axis=axis), axis=2 if transposed else 1)
    return nodes("Slice", flat, nodes.ints(0), nodes.ints(count), nodes.ints(axis // 2)) if count else flat


def _cut(nodes: Nodes, columns: Sequence[ir.Value], bits: int, *, doubled: bool) -> list[ir.Value]:
    """The codes of a pattern, from the values that hold its bytes."""
    mask = nodes.const(((1 << bits) - 1) << doubled, np.uint8)
    out = []
    for code in range(pattern(bits)[0]):
        byte, start = divmod(code * bits, 8)
        low = shifted(nodes, columns[byte], start - doubled)
        if start + bits > 8:  # the code goes on in the next byte
            low = nodes("BitwiseOr", low, shifted(nodes, columns[byte + 1], start - doubled - 8))
        out.append(nodes("BitwiseAnd", low, mask))
    return out


def _digits(nodes: Nodes, packed: ir.Value) -> list[ir.Value]:
    """The five ternary codes of every byte q: (q * 3^d modulo 256) * 3 / 256; onnxruntime multiplies no uint8."""
    wide, out = nodes("Cast", packed, to=INT32), []
    for digit in range(5):
        rest = nodes("Mul", wide, nodes.const(3**digit, np.int32)) if digit else wide
        rest = nodes("BitwiseAnd", rest, nodes.const(255, np.int32)) if digit else rest
        top = nodes("Div", nodes("Mul", rest, nodes.const(3, np.int32)), nodes.const(256, np.int32))
        out.append(nodes("Cast", top, to=UINT8))
    return out


def shifted(nodes: Nodes, value: ir.Value, by: int) -> ir.Value:
    """Shift right by `by` bits, left when negative; |by| < 8, as onnxruntime needs of uint8."""
    if not by:
        return value
    return nodes("BitShift", value, nodes.const(abs(by), np.uint8), direction="RIGHT" if by > 0 else "LEFT")


def points(nodes: Nodes, scheme: Scheme, codes: ir.Value) -> ir.Value:
    """What codes uint8 stand for: themselves, or levels as bytes."""
    if not scheme.normal:
        return codes
    return nodes("Gather", nodes.const(normal_bytes(scheme.bits), np.uint8), nodes("Cast", codes, to=INT32), axis=0)
