"""The ONNX graph of a decoder, node by node from `ModelSpec`: embedding, norm, rope, attention, mlp, head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from jpq_export.format.compressed import CompressedModel
from jpq_export.format.spec import ModelSpec
from jpq_export.lower import basic, half, standard
from jpq_export.lower.nodes import Nodes
from jpq_export.lower.signed import SignedWeights
from jpq_export.lower.weights import Form, Weights

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL


@dataclass(frozen=True, slots=True)
class Dialect:
    """What the reader of the file understands. `fused`: Attention, RMSNormalization and RotaryEmbedding are known.

    `half`: attention and its cache are fp16.
    """

    opset: int = 23
    ir_version: int = 10
    fused: bool = True
    functions: bool = True
    half: bool = False


class DecoderGraph:
    """Builds one graph. Afterwards `inputs`, `presents` and `taps` (the residual stream) hold its values in order."""

    def __init__(self, model: CompressedModel, form: Form, dialect: Dialect) -> None:
        """Start with an empty graph."""
        assert isinstance(model.spec, ModelSpec)
        self.spec: ModelSpec = model.spec
        self.dialect = dialect
        self.nodes = Nodes()
        if form == "signed":
            self.weights = SignedWeights(model, self.nodes)
        else:
            self.weights = Weights(model, form, self.nodes, with_overloads=dialect.functions)
        self.ops = half if dialect.half else standard if dialect.fused else basic
        self.cache_type = ir.DataType.FLOAT16 if dialect.half else FLOAT
        self.inputs: list[ir.Value] = []
        self.presents: list[ir.Value] = []
        self.taps: list[ir.Value] = []
        self._rotary: dict[int, tuple[ir.Value, ir.Value]] = {}
        self._masks: dict[int | None, ir.Value] = {}

    def build(self) -> ir.Value:
        """All nodes; returns the logits [batch, seq, vocab]."""
        ids, mask, positions = (
            self._input(name, INT64, ["batch", length])
            for name, length in (("input_ids", "seq"), ("attention_mask", "total"), ("position_ids", "seq"))
        )
        self._rotary = self._rotary_tables(positions)
        self._masks = self._attention_masks(ids, mask)
        x = self._embed(ids, positions)
        for i in range(len(self.spec.layers)):
            x = self._attention(i, x)
            x = self._mlp(i, x)
        self.nodes.scope = ""
        x = self._norm(x, "norm")
        self.taps.append(x)
        return self.weights.linear(x, "logits", weight="embed" if self.spec.tied else "head")

    def _input(self, name: str, dtype: ir.DataType, shape: list[str | int]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def _embed(self, ids: ir.Value, positions: ir.Value) -> ir.Value:
        """[batch, seq] -> [batch, seq, hidden]."""
        nodes, spec = self.nodes, self.spec
        nodes.scope = "embed"
        looked_up = None if spec.learned_positions else "embed"
        rows = self.weights.rows(ids, "embed", name=looked_up if spec.embed_scale == 1 else None)
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
        factor, eps = self.weights.norm(name), self.spec.norm_eps
        if not self.spec.layer_norm:
            return self.ops.norm(self.nodes, x, factor, eps, name)
        shift = self.weights.vector(f"{name}.bias")
        return self.nodes("LayerNormalization", x, factor, shift, name=name, axis=-1, epsilon=eps)

    def _residual(self, x: ir.Value, y: ir.Value, at: str) -> ir.Value:
        """Add y to x, where y passes the post-norm first when the model has one: value `at`, a tap."""
        if self.spec.post_norms:
            y = self._norm(y, f"{at}_post_norm")
        out = self.nodes("Add", x, y, name=at)
        self.taps.append(out)
        return out

    def _attention(self, index: int, x: ir.Value) -> ir.Value:
        """Add the attention sub-layer to x; nothing when it was removed."""
        spec, layer = self.spec, self.spec.layers[index]
        if not layer.kv_heads:
            return x
        at = self.nodes.scope = f"layers.{index}.attn"
        inner = self._norm(x, f"{at}_norm")
        query, key, value = (self.weights.linear(inner, f"{at}.{part}") for part in "qkv")
        heads = {"q": layer.kv_heads * spec.heads_per_group, "k": layer.kv_heads}
        query, key = (
            self._position(value, f"{at}.{part}_norm", heads[part], layer.rope)
            for part, value in (("q", query), ("k", key))
        )
        past = [
            self._input(f"past.{index}.{part}", self.cache_type, ["batch", layer.kv_heads, "past", spec.head_dim])
            for part in ("key", "value")
        ]
        core, *present = self.ops.attention(
            self.nodes,
            (query, key, value, self._masks[layer.window], *past),
            heads=heads["q"],
            kv_heads=heads["k"],
            head_dim=spec.head_dim,
            scale=spec.attention_scale,
            names=(f"{at}.core", f"present.{index}.key", f"present.{index}.value"),
        )
        for item in present:
            item.shape = ir.Shape(["batch", layer.kv_heads, "total", spec.head_dim])
            item.type = ir.TensorType(self.cache_type)
        self.presents += present
        return self._residual(x, self.weights.linear(core, f"{at}.o"), at)

    def _position(self, x: ir.Value, norm: str, heads: int, rope: int) -> ir.Value:
        """Per-head norm, then rotary embedding, where the model has them: [batch, seq, heads * head_dim]."""
        if self.spec.qk_norm:
            nodes = self.nodes
            split = nodes("Reshape", x, nodes.ints(0, 0, heads, self.spec.head_dim))
            x = nodes("Reshape", self._norm(split, norm), nodes.ints(0, 0, -1))
        if not self._rotary:
            return x
        return self.ops.rotate(self.nodes, x, *self._rotary[rope], heads=heads, head_dim=self.spec.head_dim)

    def _mlp(self, index: int, x: ir.Value) -> ir.Value:
        """Add the MLP sub-layer to x; nothing when it was removed."""
        if not self.spec.layers[index].ffn:
            return x
        at = self.nodes.scope = f"layers.{index}.mlp"
        inner = self._norm(x, f"{at}_norm")
        read = ("gate", "up") if self.spec.gated else ("up",)
        parts = [self.weights.linear(inner, f"{at}.{part}") for part in read]
        active = self.ops.ACTIVATIONS[self.spec.activation](self.nodes, parts[0])
        if self.spec.gated:
            product = self.nodes("Mul", active, parts[1], name=f"{at}.inner")
        else:
            product = self.nodes("Identity", active, name=f"{at}.inner")
        return self._residual(x, self.weights.linear(product, f"{at}.down"), at)
