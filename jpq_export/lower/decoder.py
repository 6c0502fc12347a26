"""The ONNX graph of a decoder, node by node from `ModelSpec`: embedding, norm, rope, attention, mlp, head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from jpq_export.format.compressed import CompressedModel
from jpq_export.format.spec import INT8_ACTIVATIONS, INT8_CACHE, LOGITS_AT, LOGITS_FROM, ModelSpec
from jpq_export.lower import basic, growing, growing_int8, half, int8_cache, rotation, rowwise, standard
from jpq_export.lower.chain import MOST_LINKS, Chain
from jpq_export.lower.functions import DOMAIN, Part
from jpq_export.lower.nodes import Nodes
from jpq_export.lower.signed import SignedWeights
from jpq_export.lower.weights import Form, Weights

SIZE_OF = {"attn": "kv_heads", "mlp": "ffn"}
FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL


@dataclass(frozen=True, slots=True)
class Dialect:
    """What the reader of the file understands. `fused`: Attention, RMSNormalization and RotaryEmbedding are known.

    `half`: attention and its cache are fp16. `growing`: our own operators for what onnxruntime is slow
    at: attention over a cache that grows in place, products of one X at once, what stands between products.
    `chained`: and all that lies between two attentions at once, where the file is for a CPU. `asked`: the input by
    which the reader says whose logits it wants, LOGITS_FROM or LOGITS_AT.
    """

    opset: int = 23
    ir_version: int = 10
    fused: bool = True
    functions: bool = True
    half: bool = False
    growing: bool = False
    chained: bool = False
    asked: str = LOGITS_FROM


class DecoderGraph:
    """Builds one graph. Afterwards `inputs`, `presents` and `taps` (the residual stream) hold its values in order."""

    def __init__(self, model: CompressedModel, form: Form, dialect: Dialect) -> None:
        """Start with an empty graph."""
        assert isinstance(model.spec, ModelSpec)
        self.spec: ModelSpec = model.spec
        self._vectors = model.vectors
        self.dialect = dialect
        self.nodes = Nodes()
        if form == "signed":
            self.weights = SignedWeights(model, self.nodes)
        else:
            kind = {"with_overloads": dialect.functions, "together": dialect.growing}
            integers = self.spec.activations == INT8_ACTIVATIONS
            self.weights = Weights(model, form, self.nodes, **kind, integer_inputs=integers)
        fused = growing if dialect.growing else half if dialect.half else standard
        self.ops = fused if dialect.fused else basic
        if self.spec.kv_cache == INT8_CACHE:
            self.ops = growing_int8 if dialect.growing else int8_cache
        self.inputs: list[ir.Value] = []
        self.presents: list[ir.Value] = []
        self.taps: list[ir.Value] = []
        self._rotary: dict[int, tuple[ir.Value, ir.Value]] = {}
        self._masks: dict[int | None, ir.Value] = {}
        # Norms by the sub-layer they are for, the first of which is of the embedding: the others join a residual sum.
        self._coming = iter(self._norms_of_sums() if dialect.growing and not self.spec.layer_norm else ())
        self._ready: dict[str, ir.Value] = {}
        # Products of which the next belong to one operator; `_at_hand`: the norm it has computed last. Not with an int8
        # cache: where roundings flip, parity judges every product by what it reads, which a chain does not show.
        never = self.spec.layer_norm or self.spec.turned_reads  # a chain knows neither
        self._chained = dialect.chained and not never and self.spec.kv_cache != INT8_CACHE
        self._chain: Chain | None = None
        self._at_hand: str | None = None
        self._chains: list[Chain] = []

    def _norms_of_sums(self) -> list[str]:
        layers = enumerate(self.spec.layers)
        present = [(i, part) for i, layer in layers for part in ("attn", "mlp") if getattr(layer, SIZE_OF[part])]
        last = ["norm"] if self._stays() else []  # not of a stream that is turned back first
        return [*(f"layers.{i}.{part}_norm" for i, part in present), *last][1:]

    def _stays(self) -> bool:
        """Whether the stream is in the basis of its last norm."""
        return not self.spec.rotated or self.spec.turned_reads

    def build(self) -> ir.Value:
        """All nodes; returns the logits [batch, wanted, vocab], wanted: new tokens that were asked for."""
        ids, mask, positions = (
            self._input(name, INT64, ["batch", length])
            for name, length in (("input_ids", "seq"), ("attention_mask", "total"), ("position_ids", "seq"))
        )
        self._rotary = self._rotary_tables(positions)
        self._masks = self._attention_masks(ids, mask)
        x = self._embed(ids, positions)
        spec = self.spec
        for i in range(len(spec.layers)):
            x = self._attention(i, x)
            x = self._mlp(i, x)
        self._close_chain()
        self.nodes.scope = "rotation" if spec.rotated else ""
        x = self._norm(x if self._stays() else self._turned(x, back=True), "norm")
        self.taps.append(x)
        x = self._turned(x) if spec.rotated else x
        self.nodes.scope = ""
        return self.weights.linear(self._wanted(x), "logits", weight="embed" if spec.tied else "head")

    def _wanted(self, x: ir.Value) -> ir.Value:
        """What the head reads: new tokens from LOGITS_FROM on, an input with a default of 0 (all), or those LOGITS_AT.

        A prompt needs the logits of its last token only, and the head is a fifth of SmolLM2-135M's parameters, 63% of
        Gemma-3-270M's. TensorRT knows no defaults, and would want to know on the host where a slice begins.
        """
        nodes = self.nodes
        if self.dialect.asked == LOGITS_AT:
            return nodes("Gather", x, self._input(LOGITS_AT, INT64, ["wanted"]), axis=1)
        start = nodes.initializer(LOGITS_FROM, ir.tensor(np.zeros(1, np.int64)))
        self.inputs.append(start)
        return nodes("Slice", x, start, nodes.ints(np.iinfo(np.int64).max), nodes.ints(1))

    def hide_sums(self) -> None:
        """Take the names of sums nobody reads: onnxruntime keeps what has a name, 30 MB of a prompt of 128 tokens."""
        for chain in self._chains:
            for value in chain.sums:
                if not value.uses():
                    value.name = ""

    def functions(self) -> list[ir.Function]:
        """Bodies of all our operators used so far, sorted."""
        opset, spec = self.dialect.opset, self.spec
        found = self.weights.functions(opset)
        if not self.dialect.growing:
            return found
        ops = growing_int8 if spec.kv_cache == INT8_CACHE else growing
        sizes = sorted({layer.kv_heads for layer in spec.layers if layer.kv_heads})
        facts = {"rotary": bool(spec.ropes), "scale": spec.attention_scale, "opset": opset}
        attentions = [
            each for kv in sizes for each in ops.functions(kv * spec.heads_per_group, kv, spec.head_dim, **facts)
        ]
        chains = {chain.overload: chain for chain in self._chains}
        used = {(node.op_type, node.overload) for node in self.nodes.nodes if node.domain == DOMAIN}
        bodies = [chains[key].function(opset) for key in sorted(chains)]
        all_of_them = [*attentions, *rowwise.functions(spec, opset), *found, *bodies]
        return [each for each in all_of_them if (each.name, each.overload) in used]

    def _turned(self, x: ir.Value, *, back: bool = False) -> ir.Value:
        return rotation.rotated(x, self.nodes, self._vectors, self.spec.hidden, back=back)

    def _read(self, x: ir.Value, at: str) -> ir.Value:
        """What the first linears of a sub-layer read of the stream x."""
        x = self._norm(x, f"{at}_norm")
        return self._turned(x) if self.spec.turned_reads else x

    def _input(self, name: str, dtype: ir.DataType, shape: list[str | int]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def _embed(self, ids: ir.Value, positions: ir.Value) -> ir.Value:
        """[batch, seq] -> [batch, seq, hidden]."""
        nodes, spec = self.nodes, self.spec
        nodes.scope = "embed"
        looked_up = None if spec.learned_positions else "embed"
        rows = self.weights.rows(ids, "embed", name=None if spec.embed_scale != 1 or spec.turned_reads else looked_up)
        if spec.turned_reads:
            rows = self._turned(rows, back=True)
            rows = rows if spec.embed_scale != 1 else nodes("Identity", rows, name=looked_up)
        if spec.embed_scale != 1:
            rows = nodes("Mul", rows, nodes.const(spec.embed_scale, np.float32), name=looked_up)
        if spec.learned_positions:
            rows = nodes("Add", rows, self.weights.rows(positions, "positions", name=None), name="embed")
        self.taps.append(rows)
        return rows

    def _rotary_tables(self, positions: ir.Value) -> dict[int, tuple[ir.Value, ir.Value]]:
        """Cosine and sine [batch, seq, head_dim / 2] of every rope a layer uses, computed once a pass."""
        nodes, tables = self.nodes, {}
        if not self.spec.ropes:
            return tables
        nodes.scope = "rope"
        used = sorted({layer.rope for layer in self.spec.layers if layer.kv_heads})
        wide = nodes("Unsqueeze", nodes("Cast", positions, to=FLOAT), nodes.ints(-1)) if used else positions
        for index in used:
            rope = self.spec.ropes[index]
            angle = nodes("Mul", wide, nodes.const(rope.inv_freq, np.float32))
            cos, sin = nodes("Cos", angle), nodes("Sin", angle)
            if rope.scaling != 1:
                scaling = nodes.const(rope.scaling, np.float32)
                cos, sin = nodes("Mul", cos, scaling), nodes("Mul", sin, scaling)
            tables[index] = cos, sin
        return tables

    def _attention_masks(self, ids: ir.Value, mask: ir.Value) -> dict[int | None, ir.Value]:
        """Boolean masks [batch, 1, seq, total] by window, True = may look; the Decoder's `Context.mask` in ONNX."""
        windows = dict.fromkeys(layer.window for layer in self.spec.layers if layer.kv_heads)
        if not windows:
            return {}
        nodes = self.nodes
        nodes.scope = "mask"
        total = nodes("Shape", mask, start=1, end=2)
        past = nodes("Sub", total, nodes("Shape", ids, start=1, end=2))
        ends = [nodes("Squeeze", value, nodes.ints(0)) for value in (past, total)]
        zero, one = nodes.const(0, np.int64), nodes.const(1, np.int64)
        query = nodes("Unsqueeze", nodes("Range", ends[0], ends[1], one), nodes.ints(1))
        key = nodes("Unsqueeze", nodes("Range", zero, ends[1], one), nodes.ints(0))
        # A padding position sees only itself: its softmax stays finite, and nobody reads its result.
        itself = nodes("Equal", key, query)
        real = nodes("Unsqueeze", nodes("Cast", mask, to=BOOL), nodes.ints(1, 2))  # [batch, 1, 1, total]
        causal = nodes("LessOrEqual", key, query)
        out = {}
        for window in windows:
            allowed = causal
            if window is not None:
                since = nodes("Sub", query, nodes.const(window, np.int64))
                allowed = nodes("And", causal, nodes("Greater", key, since))
            allowed = nodes("Or", nodes("And", allowed, real), itself)
            out[window] = self.ops.mask(nodes, allowed)
        return out

    def _norm(self, x: ir.Value, name: str) -> ir.Value:
        if name in self._ready:
            return self._ready.pop(name)
        factor, eps = self.weights.norm(name), self.spec.norm_eps
        if not self.spec.layer_norm:
            return self.ops.norm(self.nodes, x, factor, eps, name)
        shift = self.weights.vector(f"{name}.bias")
        return self.nodes("LayerNormalization", x, factor, shift, name=name, axis=-1, epsilon=eps)

    def _residual(self, x: ir.Value, y: ir.Value, at: str) -> ir.Value:
        """Add y to x, where y passes the post-norm first when the model has one: value `at`, a tap."""
        if self.spec.post_norms:
            y = self._norm(y, f"{at}_post_norm")
        coming = next(self._coming, None)
        if coming:
            weight, names = self.weights.norm(coming), (at, coming)
            out, self._ready[coming] = rowwise.add_norm(self.nodes, x, y, weight, self.spec.norm_eps, names)
        else:
            out = self.nodes("Add", x, y, name=at)
        self.taps.append(out)
        return out

    def _attention(self, index: int, x: ir.Value) -> ir.Value:
        """Add the attention sub-layer to x; nothing when it was removed."""
        spec, layer = self.spec, self.spec.layers[index]
        if not layer.kv_heads:
            return x
        at = self.nodes.scope = f"layers.{index}.attn"
        query, key, value = self._projections(x, at)
        heads, kv_heads = layer.kv_heads * spec.heads_per_group, layer.kv_heads
        if spec.qk_norm:
            query = self._head_norm(query, f"{at}.q_norm", heads)
            key = self._head_norm(key, f"{at}.k_norm", kv_heads)
        past = [self._cache_input(index, part, kv_heads) for part in self.ops.CACHED]
        core, *present = self.ops.attention(
            self.nodes,
            (query, key, value, self._masks[layer.window], *past),
            self._rotary[layer.rope] if spec.ropes else None,
            heads=heads,
            scale=spec.attention_scale,
            names=(f"{at}.core", *(f"present.{index}.{part}" for part in self.ops.CACHED)),
            kv_heads=kv_heads,
            head_dim=spec.head_dim,
        )
        for item, part in zip(present, self.ops.CACHED, strict=True):
            item.shape = ir.Shape(self._cache_shape("total", part, kv_heads))
            item.type = ir.TensorType(self.ops.CACHED[part])
        self.presents += present
        parts = self.weights.parts([f"{at}.o"]) if self._chained else None
        if parts is None:
            return self._residual(x, self.weights.linear(core, f"{at}.o"), at)
        self._chain = Chain(core, x, spec.norm_eps)
        return self._chained_sum(self._chain, parts[0], at)

    def _projections(self, x: ir.Value, at: str) -> tuple[ir.Value, ...]:
        """Query, key and value of the stream x."""
        names = [f"{at}.{part}" for part in "qkv"]
        parts = self.weights.parts(names) if self._chain else None
        if self._chain and parts:
            return self._end_chain(self._chain).give(parts, names, self.nodes)
        self._close_chain()
        return self.weights.linears(self._read(x, at), names)

    def _chained_sum(self, chain: Chain, part: Part, at: str) -> ir.Value:
        """`_residual` as a link: value `at`, a tap."""
        self._at_hand = next(self._coming, None)
        norm = self.weights.norm(self._at_hand) if self._at_hand else None
        post = self.weights.norm(f"{at}_post_norm") if self.spec.post_norms else None
        self.taps.append(chain.sum(part, at, norm, post))
        return self.taps[-1]

    def _end_chain(self, chain: Chain) -> Chain:
        self._chain, self._at_hand = None, None
        self._chains.append(chain)
        return chain

    def _close_chain(self) -> None:
        """What comes is none of a chain: let it have the norm that is at hand."""
        if self._chain is None:
            return
        name = self._at_hand
        normed = self._end_chain(self._chain).close(self.nodes, name or "")
        if name and normed:
            self._ready[name] = normed

    def _cache_input(self, index: int, part: str, kv_heads: int) -> ir.Value:
        shape = self._cache_shape("past", part, kv_heads)
        return self._input(f"past.{index}.{part}", self.ops.CACHED[part], shape)

    def _cache_shape(self, length: str, part: str, kv_heads: int) -> list[str | int]:
        width = 1 if part.endswith("_scale") else self.spec.head_dim
        return self.ops.cache_shape(length, kv_heads=kv_heads, width=width)

    def _head_norm(self, x: ir.Value, norm: str, heads: int) -> ir.Value:
        """A norm of every head of x [batch, seq, heads * head_dim]."""
        nodes = self.nodes
        split = nodes("Reshape", x, nodes.ints(0, 0, heads, self.spec.head_dim))
        return nodes("Reshape", self._norm(split, norm), nodes.ints(0, 0, -1))

    def _mlp(self, index: int, x: ir.Value) -> ir.Value:
        """Add the MLP sub-layer to x; nothing when it was removed."""
        if not self.spec.layers[index].ffn:
            return x
        at = self.nodes.scope = f"layers.{index}.mlp"
        names = [f"{at}.{part}" for part in (("gate", "up") if self.spec.gated else ("up",))]
        if self._chained and self.spec.gated:
            gates, down = self.weights.parts(names), self.weights.parts([f"{at}.down"])
            if gates and down:
                return self._chained_mlp(x, gates, down[0], at)
        self._close_chain()
        inner = self._read(x, at)
        first, *factor = self.weights.linears(inner, names)
        if factor and self.dialect.growing:
            product = rowwise.gated(self.nodes, self.spec.activation, first, *factor, name=f"{at}.inner")
        else:
            active = self.ops.ACTIVATIONS[self.spec.activation](self.nodes, first)
            product = self.nodes("Mul" if factor else "Identity", active, *factor, name=f"{at}.inner")
        return self._residual(x, self.weights.linear(product, f"{at}.down"), at)

    def _chained_mlp(self, x: ir.Value, gates: list[Part], down: Part, at: str) -> ir.Value:
        if self._chain and len(self._chain.links) + 3 > MOST_LINKS:  # query, key and value may follow
            self._close_chain()
        chain = self._chain = self._chain or Chain(self._norm(x, f"{at}_norm"), x, self.spec.norm_eps)
        chain.gate(gates, self.spec.activation)
        return self._chained_sum(chain, down, at)
