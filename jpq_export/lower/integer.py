"""Body of `jpq::LowBitMatMulInteger`: a product of integers, X rounded to 8 bits token by token, in standard ONNX.

    step = max |x| / 127          of every token, in fp32
    a = round(x / step)           ties to even; stored as a + 128, for onnxruntime's uint8 kernels know no saturation
    y = step Σ_g s_g (Σ_k a c - z_g Σ_k a)     over the groups g of K, k inside a group; c are codes, z zeros, s scales

The inner sums are MatMulInteger's int32, exact; z may be half an integer, for it meets them in fp32, where they are
exact too up to groups of 518 codes of 8 bits (below 2^24), and rounded once beyond. Weights keep their low-bit file
format: codes are unpacked to uint8 when the file is loaded (constant folding). One batched product, [K/g, tokens, g] by
[K/g, g, N]: it costs more than one product with whole rows would, and keeps the groups that low widths need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from jpq_export.lower.nodes import Nodes
from jpq_export.lower.unpacking import points, unpack

if TYPE_CHECKING:
    from jpq_export.lower.functions import Variant

OP_TYPE = "LowBitMatMulInteger"
LARGEST, OFFSET = 127, 128
FLOAT, UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8


def matmul(nodes: Nodes, variant: Variant, inputs: dict[str, ir.Value]) -> ir.Value:
    """Y = round8(X) · dequantize(W)ᵀ (+ bias): X [batch, seq, K] -> [batch, seq, N]."""
    x, size = inputs["X"], variant.scheme.group_size
    step, codes = round_tokens(nodes, x)  # [batch, seq, 1]; whole numbers in fp32, as x
    grouped = nodes("Reshape", nodes("Flatten", codes, axis=2), nodes.ints(0, -1, size))  # [M, K/g, g]
    grouped = nodes("Transpose", grouped, perm=[1, 0, 2])  # [K/g, M, g]
    shifted = nodes("Cast", nodes("Add", grouped, nodes.const(OFFSET, np.float32)), to=UINT8)
    weight = _codes(nodes, variant, inputs["packed"])  # uint8 [K/g, g, N]
    sums = nodes("MatMulInteger", shifted, weight, nodes.const(OFFSET, np.uint8))  # int32 [K/g, M, N]
    totals = nodes("ReduceSum", grouped, nodes.ints(-1), keepdims=1)  # [K/g, M, 1]
    centred = nodes("Sub", nodes("Cast", sums, to=FLOAT), nodes("Mul", totals, _zeros(nodes, variant, inputs)))
    scales = _by_group(nodes, nodes("Cast", inputs["scales"], to=FLOAT))
    flat = nodes("ReduceSum", nodes("Mul", centred, scales), nodes.ints(0), keepdims=0)  # [M, N]
    shape = nodes("Concat", nodes("Shape", x, start=0, end=2), nodes.ints(-1), axis=0)
    y = nodes("Mul", nodes("Reshape", flat, shape), step)
    return nodes("Add", y, inputs["bias"]) if variant.bias else y


def round_tokens(nodes: Nodes, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Steps [..., 1] and codes [..., K] of x [..., K], both float32."""
    peak = nodes("ReduceMax", nodes("Abs", x), nodes.ints(-1), keepdims=1)
    step = nodes("Div", peak, nodes.const(LARGEST, np.float32))
    step = nodes("Max", step, nodes.const(np.finfo(np.float32).tiny, np.float32))  # a token of zeros has the codes 0
    return step, nodes("Round", nodes("Div", x, step))


def _codes(nodes: Nodes, variant: Variant, packed: ir.Value) -> ir.Value:
    codes = points(nodes, variant.scheme, unpack(nodes, packed, variant.scheme.bits, count=variant.columns))  # [N, K]
    grouped = nodes("Reshape", codes, nodes.ints(0, -1, variant.scheme.group_size))
    return nodes("Transpose", grouped, perm=[1, 2, 0])


def _zeros(nodes: Nodes, variant: Variant, inputs: dict[str, ir.Value]) -> ir.Value:
    """One number, or [K/g, 1, N]."""
    scheme = variant.scheme
    if scheme.symmetric:
        return nodes.const(scheme.centre, np.float32)
    zeros = unpack(nodes, inputs["zeros"], scheme.bits, count=variant.groups)  # [N, K/g]
    return _by_group(nodes, nodes("Cast", zeros, to=FLOAT))


def _by_group(nodes: Nodes, values: ir.Value) -> ir.Value:
    """[N, K/g] -> [K/g, 1, N]."""
    return nodes("Unsqueeze", nodes("Transpose", values, perm=[1, 0]), nodes.ints(1))
