"""Where a decoder's intermediate values can be read, in order of execution; the lowered graph uses the same names.

    embed
    layers.{i}.attn_norm, .attn.q, .attn.k, .attn.v, [.attn.q_norm, .attn.k_norm], .attn.core (what o reads), .attn.o,
        [.attn_post_norm], .attn
    layers.{i}.mlp_norm, [.mlp.gate,] .mlp.up, .mlp.inner (what down reads), .mlp.down, [.mlp_post_norm], .mlp
    norm, logits

`layers.{i}.attn` and `layers.{i}.mlp` are the residual stream after the sub-layer: the Decoder's taps. A traced graph
has one point for each of its matrices, called as transformers calls the module, and logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jpq_export.format.encoder_spec import EncoderSpec, Spec
from jpq_export.format.spec import ModelSpec
from jpq_export.parity import tolerance

if TYPE_CHECKING:
    from onnx import GraphProto

COMPOUND = {
    "core": "between q, k, v and o: rotary, cache, mask, softmax",
    "inner": "activation and product of gate and up",
    "logits": "the final norm is right: head, or embed when tied",
}

CHAIN_SUMS = (1, 4)  # `then` of a link of a LowBitChain that adds to the stream: with a norm behind it, without


@dataclass(frozen=True, slots=True)
class Point:
    """One readable value. `bound`: relative RMS two right runtimes may differ by; `sublayer`: the tap it leads to."""

    name: str
    sublayer: str
    bound: float

    @property
    def is_tap(self) -> bool:
        """Whether this is the residual stream itself, or the logits."""
        return self.name == self.sublayer

    @property
    def blame(self) -> str:
        """What to look at when this is the first value that is wrong."""
        compound = COMPOUND.get(self.name.rsplit(".", 1)[-1])
        return f"{self.name} ({compound})" if compound else self.name


def points(spec: Spec) -> tuple[Point, ...]:
    """All points of a model, first computed first."""
    if isinstance(spec, EncoderSpec):
        return _encoder_points(spec)
    if spec.traced:
        return _traced_points(spec)
    out, depth = [Point("embed", "embed", tolerance.EMBED)], 0
    for i, layer in enumerate(spec.layers):
        for part, exists in (("attn", layer.kv_heads), ("mlp", layer.ffn)):
            if not exists:
                continue
            tap = f"layers.{i}.{part}"
            out += [Point(name, tap, tolerance.inside(spec, depth)) for name in _inside(spec, tap)]
            depth += 1
            out.append(Point(tap, tap, tolerance.residual(spec, depth)))
    out.append(Point("norm", "norm", tolerance.inside(spec, depth)))
    return (*out, Point("logits", "logits", tolerance.logits(spec)))


def _traced_points(spec: ModelSpec) -> tuple[Point, ...]:
    """What every matrix of a traced graph gives; how many sub-layers lie before it is not known: at most its place."""
    names = spec.matrices()
    out = [Point(name, name, tolerance.inside(spec, depth)) for depth, name in enumerate(names)]
    return (*out, Point("logits", "logits", tolerance.LOGITS_REL_RMS))


def _encoder_points(spec: EncoderSpec) -> tuple[Point, ...]:
    """The stream of an encoder is what the norm after a sub-layer gives; a removed sub-layer still has its norm."""
    out, depth = [Point("embed", "embed", tolerance.residual(spec, 0))], 0
    for i, layer in enumerate(spec.layers):
        for part, order, exists in (("attn", "q k v core o", layer.kv_heads), ("mlp", "up inner down", layer.ffn)):
            tap = f"layers.{i}.{part}"
            if exists:
                out += [Point(f"{tap}.{name}", tap, tolerance.inside(spec, depth)) for name in order.split()]
            depth += 1
            out.append(Point(tap, tap, tolerance.residual(spec, depth)))
    return (*out, Point("embedding", "embedding", tolerance.residual(spec, depth)))


def _inside(spec: ModelSpec, tap: str) -> list[str]:
    if tap.endswith("attn"):
        order = ["q", "k", "v", *(["q_norm", "k_norm"] if spec.qk_norm else []), "core", "o"]
    else:
        order = [*(["gate"] if spec.gated else []), "up", "inner", "down"]
    return [f"{tap}_norm", *(f"{tap}.{part}" for part in order), *([f"{tap}_post_norm"] if spec.post_norms else [])]


def linear_input(name: str, spec: Spec) -> str:
    """The point a linear reads: "layers.0.attn.q" reads "layers.0.attn_norm", in an encoder the sub-layer before."""
    stem, part = name.rsplit(".", 1)
    if isinstance(spec, EncoderSpec) and part in ("q", "k", "v", "up"):
        index = int(stem.split(".")[1])
        return f"layers.{index}.attn" if part == "up" else f"layers.{index - 1}.mlp" if index else "embed"
    return {"o": f"{stem}.core", "down": f"{stem}.inner"}.get(part, f"{stem}_norm")


def present_in(graph: GraphProto, spec: Spec) -> tuple[str, ...]:
    """The points a graph has values for."""
    values = {name for node in graph.node for name in node.output}
    return tuple(point.name for point in points(spec) if point.name in values)


def show_sums(graph: GraphProto) -> None:
    """Name the residual sums inside every LowBitChain after the sub-layer whose weight they add: "layers.0.attn"."""
    for node in graph.node:
        if node.op_type != "LowBitChain":
            continue
        facts = {attribute.name: attribute.i for attribute in node.attribute}
        at, weight, total = 2, 0, 0
        for link in range(facts["links"]):
            adds, name = facts[f"then_{link}"] in CHAIN_SUMS, node.input[at].removesuffix(".packed")
            for _ in range(facts[f"count_{link}"]):
                at += 3 - facts[f"symmetric_{weight}"] + facts[f"bias_{weight}"]
                weight += 1
            at += facts[f"post_{link}"] + (facts[f"then_{link}"] == CHAIN_SUMS[0])
            if adds:
                node.output[total] = name.rpartition(".")[0]
                total += 1


def inside_chain(graph: GraphProto, point: Point) -> bool:
    """Whether the graph has no value of the point because a LowBitChain computes it and keeps it to itself."""
    if point.is_tap or any(point.name in node.output for node in graph.node):
        return False
    name = point.name.replace(".inner", ".down")  # which reads it
    weight = f"{name}.weight" if name.endswith("_norm") else f"{name}.packed"
    return any(node.op_type == "LowBitChain" and weight in node.input for node in graph.node)


def node_of(graph: GraphProto, value: str) -> str:
    """How to name the node that makes `value`: "LowBitMatMul 'layers.0.attn.q'", of several outputs also which one."""
    node = next((node for node in graph.node if value in node.output), None)
    if node is None:
        return f"graph input {value!r}"
    which = "" if value in (node.name, node.output[0]) else f", output {value!r}"
    return f"{node.op_type} {node.name or value!r}{which}"
