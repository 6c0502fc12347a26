"""The same five as `standard.py` from basic operators (opset 18), for TensorRT before 10.15, which parses no others."""

from __future__ import annotations

from math import pi, sqrt

import numpy as np
import onnx_ir as ir

from jpq_export.lower.nodes import Nodes
from jpq_export.lower.standard import CACHED, cache_shape, silu

__all__ = ["ACTIVATIONS", "CACHED", "attention", "cache_shape", "mask", "norm"]
BLOCKED = -1e9  # added to a score that may not be looked at: its softmax is exactly 0 in fp32, and no infinity appears


def norm(nodes: Nodes, x: ir.Value, weight: ir.Value, eps: float, name: str) -> ir.Value:
    """Compute x / rms(x) * weight over the last axis."""
    mean = nodes("ReduceMean", nodes("Mul", x, x), nodes.ints(-1), keepdims=1)
    rms = nodes("Sqrt", nodes("Add", mean, nodes.const(eps, np.float32)))
    return nodes("Mul", nodes("Div", x, rms), weight, name=name)


def rotate(nodes: Nodes, x: ir.Value, cos: ir.Value, sin: ir.Value, *, heads: int, head_dim: int) -> ir.Value:
    """Rotate-half embedding of x [batch, seq, heads * head_dim]; cos, sin [batch, seq, head_dim / 2]."""
    split = nodes("Reshape", x, nodes.ints(0, 0, heads, head_dim))
    low, high = nodes.many("Split", split, names=[None, None], axis=-1, num_outputs=2)
    cos, sin = (nodes("Unsqueeze", table, nodes.ints(2)) for table in (cos, sin))  # [batch, seq, 1, head_dim / 2]
    first = nodes("Sub", nodes("Mul", low, cos), nodes("Mul", high, sin))
    second = nodes("Add", nodes("Mul", high, cos), nodes("Mul", low, sin))
    return nodes("Reshape", nodes("Concat", first, second, axis=-1), nodes.ints(0, 0, -1))


def mask(nodes: Nodes, allowed: ir.Value) -> ir.Value:
    """What `attention` adds to scores, from booleans [batch, 1, seq, total]: float32 [batch, 1, 1, seq, total]."""
    bias = nodes("Where", allowed, nodes.const(0, np.float32), nodes.const(BLOCKED, np.float32))
    return nodes("Unsqueeze", bias, nodes.ints(1))


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
    """As `standard.attention`."""
    query, key, value, bias, past_key, past_value = inputs
    if rotary:
        query = rotate(nodes, query, *rotary, heads=heads, head_dim=head_dim)
        key = rotate(nodes, key, *rotary, heads=kv_heads, head_dim=head_dim)
    per_group = heads // kv_heads
    split = nodes("Reshape", query, nodes.ints(0, 0, kv_heads, per_group, head_dim))
    query = nodes("Transpose", split, perm=[0, 2, 3, 1, 4])  # [batch, kv_heads, group, seq, head_dim]
    query = nodes("Mul", query, nodes.const(scale, np.float32))
    presents = []
    for new, past, name in ((key, past_key, names[1]), (value, past_value, names[2])):
        split = nodes("Reshape", new, nodes.ints(0, 0, kv_heads, head_dim))
        new = nodes("Transpose", split, perm=[0, 2, 1, 3])  # [batch, kv_heads, seq, head_dim]
        presents.append(nodes("Concat", past, new, axis=2, name=name))
    keys, values = (nodes("Unsqueeze", present, nodes.ints(2)) for present in presents)
    scores = nodes("MatMul", query, nodes("Transpose", keys, perm=[0, 1, 2, 4, 3]))
    weights = nodes("Softmax", nodes("Add", scores, bias), axis=-1)
    out = nodes("Transpose", nodes("MatMul", weights, values), perm=[0, 3, 1, 2, 4])  # [batch, seq, kv_heads, group, d]
    return nodes("Reshape", out, nodes.ints(0, 0, -1), name=names[0]), *presents


def gelu_tanh(nodes: Nodes, x: ir.Value) -> ir.Value:
    """GELU in its tanh form."""
    cube = nodes("Mul", nodes("Mul", x, x), x)
    bent = nodes("Add", x, nodes("Mul", cube, nodes.const(0.044715, np.float32)))
    gate = nodes("Tanh", nodes("Mul", bent, nodes.const(sqrt(2 / pi), np.float32)))
    half = nodes("Mul", x, nodes.const(0.5, np.float32))
    return nodes("Mul", half, nodes("Add", gate, nodes.const(1, np.float32)))


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}
