"""As `growing.py` with a cache of int8 codes and scales, which are those of `int8_cache.py`: two operators of ours.

`jpq::CacheCodes` turns the new keys and makes codes of keys and values; `jpq::Int8Attention` puts these behind those of
the past and lets the queries look at all of them. Two, so that what is stored can be read, and replaced, from outside
(see parity/runners.py).
"""

from __future__ import annotations

import onnx_ir as ir

from jpq_export.lower import int8_cache
from jpq_export.lower.functions import DOMAIN
from jpq_export.lower.growing import END, TABLES, cache_shape, overload
from jpq_export.lower.int8_cache import CACHED, FLOAT
from jpq_export.lower.nodes import Nodes
from jpq_export.lower.standard import ACTIVATIONS, mask, norm

__all__ = ["ACTIVATIONS", "CACHED", "attention", "cache_shape", "functions", "mask", "norm"]
CODES, ATTENTION = "CacheCodes", "Int8Attention"


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
    """As `int8_cache.attention`, past and present in the order of `cache_shape`."""
    query, key, value, allowed, *past = inputs
    name = overload(heads, kv_heads, head_dim, rotary=rotary is not None)
    tables = rotary or ()
    codes = nodes.many(
        CODES, key, value, *tables, names=[None] * len(CACHED), domain=DOMAIN, overload=name, kv_heads=kv_heads
    )
    facts = {"heads": heads, "kv_heads": kv_heads, "scale": scale}
    return nodes.many(
        ATTENTION, query, *codes, allowed, *past, *tables, names=names, domain=DOMAIN, overload=name, **facts
    )


def functions(heads: int, kv_heads: int, head_dim: int, *, rotary: bool, scale: float, opset: int) -> list[ir.Function]:
    """The ONNX functions of an overload."""
    name = overload(heads, kv_heads, head_dim, rotary=rotary)
    return [
        _codes(name, kv_heads, head_dim, rotary=rotary, opset=opset),
        _attention(name, heads, kv_heads, head_dim, rotary=rotary, scale=scale, opset=opset),
    ]


def _values(*names: str) -> dict[str, ir.Value]:
    return {name: ir.Value(name=name) for name in names}


def _codes(name: str, kv_heads: int, head_dim: int, *, rotary: bool, opset: int) -> ir.Function:
    """Key and value [batch, seq, kv_heads * head_dim] -> codes [batch, seq, kv_heads, head_dim], scales [..., 1]."""
    nodes = Nodes()
    inputs = _values("key", "value", *(TABLES if rotary else ()))
    key, shape = inputs["key"], nodes.ints(0, 0, kv_heads, head_dim)
    if rotary:
        key = nodes("RotaryEmbedding", key, inputs["cos"], inputs["sin"], num_heads=kv_heads, interleaved=0)
    pairs = [int8_cache.to_codes(nodes, nodes("Reshape", x, shape)) for x in (key, inputs["value"])]
    outputs = [pair[i] for i in range(2) for pair in pairs]
    graph = ir.Graph(list(inputs.values()), outputs, nodes=nodes.nodes, opset_imports={"": opset}, name=CODES)
    attributes = [ir.Attr("kv_heads", ir.AttributeType.INT, None)]
    return ir.Function(DOMAIN, CODES, name, graph=graph, attributes=attributes)


def _attention(
    name: str, heads: int, kv_heads: int, head_dim: int, *, rotary: bool, scale: float, opset: int
) -> ir.Function:
    """Present = Concat(past[: total - seq], new, past[total :]) of codes and scales; attention over what they mean."""
    nodes = Nodes()
    past = [f"past_{part}" for part in CACHED]
    inputs = _values("query", *CACHED, "mask", *past, *(TABLES if rotary else ()))
    query = inputs["query"]
    if rotary:
        query = nodes("RotaryEmbedding", query, inputs["cos"], inputs["sin"], num_heads=heads, interleaved=0)
    total = nodes("Shape", inputs["mask"], start=3, end=4)
    before = nodes("Sub", total, nodes("Shape", query, start=1, end=2))
    presents = {}
    for part in CACHED:
        parts = (
            nodes("Slice", inputs[f"past_{part}"], nodes.ints(0), before, nodes.ints(0)),
            nodes("Transpose", inputs[part], perm=[1, 0, 2, 3]),
            nodes("Slice", inputs[f"past_{part}"], total, nodes.ints(END), nodes.ints(0)),
        )
        presents[part] = nodes("Concat", *parts, axis=0, name=f"present_{part}")
    rows = {part: nodes("Slice", value, nodes.ints(0), total, nodes.ints(0)) for part, value in presents.items()}
    read = []
    for part in ("key", "value"):
        wide = nodes("Mul", nodes("Cast", rows[part], to=FLOAT), rows[f"{part}_scale"])
        read.append(
            nodes("Reshape", nodes("Transpose", wide, perm=[1, 0, 2, 3]), nodes.ints(0, 0, kv_heads * head_dim))
        )
    core = nodes(
        "Attention", query, *read, inputs["mask"], name="output", scale=scale, q_num_heads=heads, kv_num_heads=kv_heads
    )
    outputs = [core, *presents.values()]
    graph = ir.Graph(list(inputs.values()), outputs, nodes=nodes.nodes, opset_imports={"": opset}, name=ATTENTION)
    attributes = [ir.Attr(key, ir.AttributeType.INT, None) for key in ("heads", "kv_heads")]
    attributes.append(ir.Attr("scale", ir.AttributeType.FLOAT, None))
    return ir.Function(DOMAIN, ATTENTION, name, graph=graph, attributes=attributes)
