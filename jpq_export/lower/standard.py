"""Norm, rotary embedding, attention and activations as the operators of opset 23.

onnxruntime's CPU kernels for them were checked (left-padded batches, several tokens after a past, grouped heads) and
take 4-5 us for one token of SmolLM2's width, 15 us for its attention without a past.
"""

from __future__ import annotations

import onnx_ir as ir

from jpq_export.lower.nodes import Nodes

# Name after "past.{i}." -> element type, in the order `attention` takes and gives them.
CACHED = {"key": ir.DataType.FLOAT, "value": ir.DataType.FLOAT}


def norm(nodes: Nodes, x: ir.Value, weight: ir.Value, eps: float, name: str) -> ir.Value:
    """Compute x / rms(x) * weight over the last axis."""
    return nodes("RMSNormalization", x, weight, name=name, axis=-1, epsilon=eps)


def rotate(nodes: Nodes, x: ir.Value, cos: ir.Value, sin: ir.Value, *, heads: int, head_dim: int) -> ir.Value:
    """Rotate-half embedding of x [batch, seq, heads * head_dim]; cos, sin [batch, seq, head_dim / 2]."""
    del head_dim
    return nodes("RotaryEmbedding", x, cos, sin, num_heads=heads, interleaved=0)


def cache_shape(length: str, *, kv_heads: int, width: int) -> list[str | int]:
    """Dimensions of a cache tensor with `width` numbers a head; `length` names the third, "past" or "total"."""
    return ["batch", kv_heads, length, width]


def mask(nodes: Nodes, allowed: ir.Value) -> ir.Value:
    """What `attention` takes, from a boolean mask [batch, 1, seq, total]."""
    del nodes
    return allowed


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
    """Grouped-query attention over past and new tokens: gives the output, present key and present value.

    `inputs`: query, key, value [batch, seq, heads * head_dim], what `mask` gave, past key and past value. `rotary`:
    cosine and sine to turn query and key with first.
    """
    query, key, *rest = inputs
    if rotary:
        query = rotate(nodes, query, *rotary, heads=heads, head_dim=head_dim)
        key = rotate(nodes, key, *rotary, heads=kv_heads, head_dim=head_dim)
    return nodes.many(
        "Attention", query, key, *rest, names=names, q_num_heads=heads, kv_num_heads=kv_heads, scale=scale
    )


def silu(nodes: Nodes, x: ir.Value) -> ir.Value:
    """Compute x * sigmoid(x)."""
    return nodes("Mul", x, nodes("Sigmoid", x))


def gelu_tanh(nodes: Nodes, x: ir.Value) -> ir.Value:
    """GELU in its tanh form."""
    return nodes("Gelu", x, approximate="tanh")


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}
