"""The operators of `standard.py` with attention and its cache in fp16, for engines that compute products in fp16.

All else stays in fp32: the residual stream of some models outgrows fp16 (Gemma-3's passes 65504), and a norm in fp16
loses more than it saves. Engines fuse the casts into what stands beside them.
"""

from __future__ import annotations

import onnx_ir as ir

from jpq_export.lower.nodes import Nodes
from jpq_export.lower.standard import ACTIVATIONS, cache_shape, mask, norm, rotate

__all__ = ["ACTIVATIONS", "CACHED", "attention", "cache_shape", "mask", "norm"]
FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
CACHED = {"key": FLOAT16, "value": FLOAT16}


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
    """As `standard.attention`; past and present keys and values are fp16, query, key, value and the output float32.

    The cache is joined before: TensorRT parses an Attention of one output only.
    """
    query, key, value, allowed, *past = inputs
    if rotary:
        query = rotate(nodes, query, *rotary, heads=heads, head_dim=head_dim)
        key = rotate(nodes, key, *rotary, heads=kv_heads, head_dim=head_dim)
    query, key, value = (
        _by_head(nodes, part, count, head_dim) for part, count in ((query, heads), (key, kv_heads), (value, kv_heads))
    )
    present = [
        nodes("Concat", old, new, axis=2, name=name)
        for old, new, name in zip(past, (key, value), names[1:], strict=True)
    ]
    core = nodes("Attention", query, *present, allowed, scale=scale)  # [batch, heads, seq, head_dim]
    core = nodes("Reshape", nodes("Transpose", core, perm=[0, 2, 1, 3]), nodes.ints(0, 0, -1))
    return nodes("Cast", core, to=FLOAT, name=names[0]), *present


def _by_head(nodes: Nodes, x: ir.Value, heads: int, head_dim: int) -> ir.Value:
    """[batch, seq, heads * head_dim] float32 -> [batch, heads, seq, head_dim] fp16."""
    split = nodes("Reshape", nodes("Cast", x, to=FLOAT16), nodes.ints(0, 0, heads, head_dim))
    return nodes("Transpose", split, perm=[0, 2, 1, 3])
