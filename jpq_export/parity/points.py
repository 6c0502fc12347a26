"""Where a decoder's intermediate values can be read, in order of execution: names, and their places in an ONNX graph.

    embed
    layers.{i}.attn_norm, .attn.q, .attn.k, .attn.v, .attn.core (what o reads), .attn.o, [.attn_post_norm], .attn
    layers.{i}.mlp_norm, .mlp.gate, .mlp.up, .mlp.inner (what down reads), .mlp.down, [.mlp_post_norm], .mlp
    norm, logits

`layers.{i}.attn` and `layers.{i}.mlp` are the residual stream after the sub-layer: the Decoder's taps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jpq_export.format.spec import ModelSpec
from jpq_export.parity import tolerance

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

MATMULS = {"MatMul", "Gemm", "LowBitMatMul", "MatMulNBits"}


@dataclass(frozen=True, slots=True)
class Point:
    """One readable value. `bound`: relative RMS two right runtimes may differ by; `sublayer`: the tap it leads to."""

    name: str
    sublayer: str
    bound: float

    @property
    def is_tap(self) -> bool:
        """Whether this is the residual stream itself (or the logits)."""
        return self.name == self.sublayer

    @property
    def blame(self) -> str:
        """What to look at when this is the first value that is wrong."""
        if self.name.endswith(".core"):
            return f"{self.name} (between q, k, v and o: rotary, q/k norm, cache, mask, softmax)"
        if self.name.endswith(".inner"):
            return f"{self.name} (activation and product between gate, up and down)"
        if self.name == "logits":
            return "logits (the final norm is right: head, or embed when tied)"
        return self.name


def points(spec: ModelSpec) -> tuple[Point, ...]:
    """All points of a model, first computed first."""
    out, depth = [Point("embed", "embed", 4 * tolerance.UNIT_ROUNDOFF)], 0
    for i, layer in enumerate(spec.layers):
        for part, exists in (("attn", layer.kv_heads), ("mlp", layer.ffn)):
            if not exists:
                continue
            tap = f"layers.{i}.{part}"
            out += [Point(name, tap, tolerance.inside(spec, depth)) for name in _inside(spec, tap)]
            depth += 1
            out.append(Point(tap, tap, tolerance.residual(spec, depth)))
    out.append(Point("norm", "norm", tolerance.inside(spec, depth)))
    return (*out, Point("logits", "logits", tolerance.LOGITS_REL_RMS))


def _inside(spec: ModelSpec, tap: str) -> list[str]:
    order = ["q", "k", "v", "core", "o"] if tap.endswith("attn") else ["gate", "up", "inner", "down"]
    return [f"{tap}_norm", *(f"{tap}.{part}" for part in order), *([f"{tap}_post_norm"] if spec.post_norms else [])]


def linear_input(name: str) -> str:
    """The point a linear reads: "layers.0.attn.q" reads "layers.0.attn_norm"."""
    stem, part = name.rsplit(".", 1)
    return {"o": f"{stem}.core", "down": f"{stem}.inner"}.get(part, f"{stem}_norm")


def locate(graph: GraphProto, spec: ModelSpec) -> dict[str, str]:
    """The ONNX value that holds each point: point name -> value name.

    Taps carry their own names. Linears are found by following their packed weight to the matrix product that reads it
    (through DequantizeLinear and the like), so any lowering that keeps the initializers' names can be checked.
    """
    finder = _Finder(graph)
    places = {}
    for point in points(spec):
        name = point.name
        if name in finder.values:
            places[name] = name
            continue
        product = finder.product(f"{name}.packed")
        if product:
            places[name] = finder.after_bias(product, f"{name}.bias").output[0]
            places.setdefault(linear_input(name), finder.activation(product))
        elif name.endswith("_post_norm") and (reader := finder.reader(name)):
            places[name] = reader.output[0]
    return {point.name: places[point.name] for point in points(spec) if point.name in places}


class _Finder:
    """Look-ups in one graph: who reads and who makes each value."""

    def __init__(self, graph: GraphProto) -> None:
        self.initializers = {tensor.name for tensor in graph.initializer}
        self.values = {name for node in graph.node for name in node.output if name}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._weight_side: set[str] = set()

    def reader(self, name: str) -> NodeProto | None:
        """The only node that reads `name`."""
        return next(iter(self._readers.get(name, ())), None)

    def product(self, initializer: str) -> NodeProto | None:
        """The matrix product a packed weight ends in."""
        name: str | None = initializer
        while name is not None:
            self._weight_side.add(name)
            node = self.reader(name)
            if node is None or node.op_type in MATMULS:
                return node
            name = node.output[0]
        return None

    def after_bias(self, product: NodeProto, bias: str) -> NodeProto:
        """The Add of the bias behind a product, or the product itself."""
        following = self._readers.get(product.output[0], [])
        return next((node for node in following if node.op_type == "Add" and bias in node.input), product)

    def activation(self, product: NodeProto) -> str:
        """The input of a product that is not its weight."""
        return next(name for name in product.input if name not in self._weight_side | self.initializers)


def node_of(graph: GraphProto, value: str) -> str:
    """How to name the node that makes `value`: "MatMul 'name'"."""
    makers: Iterable[NodeProto] = (node for node in graph.node if value in node.output)
    node = next(iter(makers), None)
    return f"{node.op_type} {(node.name or value)!r}" if node else f"graph input {value!r}"
