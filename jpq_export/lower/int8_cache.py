"""Attention over a key/value cache of int8 codes with one fp32 scale for each (batch, head, position).

    scale = max |x| / 127        codes = round(x / scale), ties to even        read: codes * scale

In standard operators only, passed in and out; growing_int8.py has it in place. x: keys after rotary, and values,
[batch, kv_heads, seq, head_dim]. |x / scale| is at most 127 (1 + 2^-23), so rounding
needs no clip. Plain Div, Round and Cast rather than QuantizeLinear: its kernels may multiply by a reciprocal, which
rounds otherwise than PyTorch does. One layer at a time is widened to fp32, what lies between steps stays int8.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from jpq_export.lower.nodes import Nodes
from jpq_export.lower.standard import ACTIVATIONS, cache_shape, mask, norm, rotate

__all__ = ["ACTIVATIONS", "CACHED", "attention", "cache_shape", "mask", "norm", "to_codes"]
FLOAT, INT8 = ir.DataType.FLOAT, ir.DataType.INT8
LARGEST = 127
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # divisor of a row of zeros, whose codes and scale are 0
# name after "past.{i}." -> element type, in the order `attention` takes and gives them
CACHED = {"key": INT8, "value": INT8, "key_scale": FLOAT, "value_scale": FLOAT}


def attention(
    nodes: Nodes,
    inputs: tuple[ir.Value, ...],
    rotary: tuple[ir.Value, ir.Value] | None,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
    names: tuple[str, ...],
) -> tuple[ir.Value, ...]:
    """As `standard.attention` with a cache of four: codes of keys and values, scales of keys and values.

    `inputs`: query, key, value [batch, seq, heads * head_dim], mask, the past four. Gives the output and the present
    four, `names` in this order.
    """
    query, key, value, allowed, *past = inputs
    if rotary:
        query = rotate(nodes, query, *rotary, heads=heads, head_dim=head_dim)
        key = rotate(nodes, key, *rotary, heads=kv_heads, head_dim=head_dim)
    query, key, value = (
        _by_head(nodes, part, count, head_dim) for part, count in ((query, heads), (key, kv_heads), (value, kv_heads))
    )
    (key_codes, key_scale), (value_codes, value_scale) = to_codes(nodes, key), to_codes(nodes, value)
    present = [
        nodes("Concat", old, new, axis=2, name=name)
        for old, new, name in zip(past, (key_codes, value_codes, key_scale, value_scale), names[1:], strict=True)
    ]
    keys, values = (
        nodes("Mul", nodes("Cast", codes, to=FLOAT), steps)
        for codes, steps in zip(present[:2], present[2:], strict=True)
    )
    core = nodes("Attention", query, keys, values, allowed, scale=scale)  # [batch, heads, seq, head_dim]
    core = nodes("Transpose", core, perm=[0, 2, 1, 3])
    return nodes("Reshape", core, nodes.ints(0, 0, -1), name=names[0]), *present


def _by_head(nodes: Nodes, x: ir.Value, heads: int, head_dim: int) -> ir.Value:
    """[batch, seq, heads * head_dim] -> [batch, heads, seq, head_dim]."""
    return nodes("Transpose", nodes("Reshape", x, nodes.ints(0, 0, heads, head_dim)), perm=[0, 2, 1, 3])


def to_codes(nodes: Nodes, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """[..., head_dim] float32 -> codes int8 of that shape, scales float32 [..., 1]."""
    peak = nodes("ReduceMax", nodes("Abs", x), nodes.ints(-1), keepdims=1)
    scale = nodes("Div", peak, nodes.const(LARGEST, np.float32))
    steps = nodes("Div", x, nodes("Max", scale, nodes.const(SMALLEST_SCALE, np.float32)))
    return nodes("Cast", nodes("Round", steps), to=INT8), scale
