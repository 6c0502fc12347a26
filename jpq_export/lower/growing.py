"""The operators of `standard.py` with `jpq::Attention`: rotary embedding, and a cache that grows in place.

The cache is [room, batch, kv_heads, head_dim]. Its first `total - seq` rows hold what came before (`total`: the mask's
last dimension); what it has beyond them is room. Present is past with the new rows behind those:

    present = Concat(past[: total - seq], new, past[total :])

so a past without room grows as everywhere, and one with room keeps its shape: bound to both, nothing is copied from
token to token. onnxruntime's own Attention copies the whole cache at every token, and repeats it for grouped heads
(SmolLM2-135M, one core, 1,900 tokens: 21 ms of a token's 26). The body is that Attention, for an onnxruntime without
our library.
"""

from __future__ import annotations

import onnx_ir as ir

from jpq_export.lower.functions import DOMAIN
from jpq_export.lower.nodes import Nodes
from jpq_export.lower.standard import ACTIVATIONS, CACHED, mask, norm

__all__ = ["ACTIVATIONS", "CACHED", "OP_TYPE", "attention", "cache_shape", "functions", "mask", "norm", "overload"]
OP_TYPE = "Attention"
INPUTS = ("query", "key", "value", "mask", "past_key", "past_value")
TABLES = ("cos", "sin")
END = 2**63 - 1


def cache_shape(length: str, *, kv_heads: int, width: int) -> list[str | int]:
    """Dimensions of a cache tensor; `length` names the first, "past" or "total"."""
    return [length, "batch", kv_heads, width]


def overload(heads: int, kv_heads: int, head_dim: int, *, rotary: bool) -> str:
    """Name of the function's overload: "h9_kv3_d64_rotary"; shapes depend on all of it."""
    return f"h{heads}_kv{kv_heads}_d{head_dim}" + ("_rotary" if rotary else "")


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
    """As `standard.attention`, past and present in the order of `cache_shape`."""
    return nodes.many(
        OP_TYPE,
        *inputs,
        *(rotary or ()),
        names=names,
        domain=DOMAIN,
        overload=overload(heads, kv_heads, head_dim, rotary=rotary is not None),
        heads=heads,
        kv_heads=kv_heads,
        scale=scale,
    )


def functions(heads: int, kv_heads: int, head_dim: int, *, rotary: bool, scale: float, opset: int) -> list[ir.Function]:
    """The ONNX function of an overload."""
    nodes = Nodes()
    inputs = {name: ir.Value(name=name) for name in (*INPUTS, *(TABLES if rotary else ()))}
    query, key = inputs["query"], inputs["key"]
    if rotary:
        tables = inputs["cos"], inputs["sin"]
        query = nodes("RotaryEmbedding", query, *tables, num_heads=heads, interleaved=0)
        key = nodes("RotaryEmbedding", key, *tables, num_heads=kv_heads, interleaved=0)
    total = nodes("Shape", inputs["mask"], start=3, end=4)
    before = nodes("Sub", total, nodes("Shape", query, start=1, end=2))
    presents, read = [], []
    for new, past, name in ((key, "past_key", "present_key"), (inputs["value"], "past_value", "present_value")):
        split = nodes("Reshape", new, nodes.ints(0, 0, kv_heads, head_dim))
        parts = (
            nodes("Slice", inputs[past], nodes.ints(0), before, nodes.ints(0)),
            nodes("Transpose", split, perm=[1, 0, 2, 3]),
            nodes("Slice", inputs[past], total, nodes.ints(END), nodes.ints(0)),
        )
        presents.append(nodes("Concat", *parts, axis=0, name=name))
        rows = nodes("Slice", presents[-1], nodes.ints(0), total, nodes.ints(0))
        read.append(
            nodes("Reshape", nodes("Transpose", rows, perm=[1, 0, 2, 3]), nodes.ints(0, 0, kv_heads * head_dim))
        )
    values = (query, *read, inputs["mask"])
    core = nodes("Attention", *values, name="output", scale=scale, q_num_heads=heads, kv_num_heads=kv_heads)
    graph = ir.Graph(
        list(inputs.values()), [core, *presents], nodes=nodes.nodes, opset_imports={"": opset}, name=OP_TYPE
    )
    attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in ("heads", "kv_heads")]
    attributes.append(ir.Attr("scale", ir.AttributeType.FLOAT, None))
    name = overload(heads, kv_heads, head_dim, rotary=rotary)
    return [ir.Function(DOMAIN, OP_TYPE, name, graph=graph, attributes=attributes)]
