"""The ONNX graph of a sentence encoder, node by node from `EncoderSpec`; pooling and normalisation are inside.

Basic operators only, but for LayerNormalization (opset 17): every onnxruntime and TensorRT that bundles name reads
them, so there is one form for all dialects.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
import onnx_ir as ir

from jpq_export.format.compressed import CompressedModel
from jpq_export.format.encoder_spec import EncoderSpec
from jpq_export.lower.basic import BLOCKED, gelu_tanh
from jpq_export.lower.decoder import Dialect
from jpq_export.lower.nodes import Nodes
from jpq_export.lower.signed import SignedWeights
from jpq_export.lower.weights import Form, Weights
from jpq_export.numerics.reference import distance_bucket

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
SHORTEST = 1e-9  # as the PyTorch encoder's


class EncoderGraph:
    """Builds one graph. Afterwards `inputs` and `taps` (the stream after each sub-layer) hold its values in order."""

    def __init__(self, model: CompressedModel, form: Form, dialect: Dialect) -> None:
        """Start with an empty graph."""
        assert isinstance(model.spec, EncoderSpec)
        self.spec: EncoderSpec = model.spec
        self.nodes = Nodes()
        if form == "signed":
            self.weights = SignedWeights(model, self.nodes)
        else:
            self.weights = Weights(model, form, self.nodes, with_overloads=dialect.functions)
        self.inputs: list[ir.Value] = []
        self.presents: list[ir.Value] = []  # an encoder has no cache
        self.taps: list[ir.Value] = []
        self._model, self._opset = model, dialect.opset
        self._bias: ir.Value | None = None
        self._distances: ir.Value | None = None

    def build(self) -> ir.Value:
        """All nodes; returns the embeddings [batch, hidden]."""
        ids, mask = (self._input(name) for name in ("input_ids", "attention_mask"))
        nodes = self.nodes
        nodes.scope = "mask"
        real = nodes("Cast", mask, to=FLOAT)  # [batch, seq]
        missing = nodes("Sub", nodes.const(1, np.float32), nodes("Unsqueeze", real, nodes.ints(1, 2)))
        self._bias = nodes("Mul", missing, nodes.const(BLOCKED, np.float32))  # [batch, 1, 1, seq]
        x = self._embed(ids)
        for i in range(len(self.spec.layers)):
            x = self._attention(i, x)
            x = self._mlp(i, x)
        return self._pool(x, real)

    def functions(self) -> list[ir.Function]:
        """Bodies of all our operators used so far, sorted."""
        return self.weights.functions(self._opset)

    def _input(self, name: str) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(["batch", "seq"]), type=ir.TensorType(INT64))
        self.inputs.append(value)
        return value

    def _embed(self, ids: ir.Value) -> ir.Value:
        """[batch, seq] -> [batch, seq, hidden]."""
        nodes = self.nodes
        nodes.scope = "embed"
        length = nodes("Squeeze", nodes("Shape", ids, start=1, end=2), nodes.ints(0))
        at = nodes("Range", nodes.const(0, np.int64), length, nodes.const(1, np.int64))
        places = nodes("Unsqueeze", at, nodes.ints(0))  # [1, seq]
        if self.spec.buckets:
            self._distances = self._buckets(places)
        words = self.weights.rows(ids, "embed", name=None)
        total = nodes("Add", words, self.weights.rows(places, "positions", name=None))
        x = self._norm(total, "embed_norm", "embed")
        self.taps.append(x)
        return x

    def _buckets(self, places: ir.Value) -> ir.Value:
        """Bucket of every pair of places: int64 [seq, seq], looked up by key place minus query place."""
        nodes, most = self.nodes, self.spec.max_positions
        table = [distance_bucket(d, self.spec.buckets) for d in range(1 - most, most)]
        apart = nodes("Sub", places, nodes("Transpose", places, perm=[1, 0]))
        return nodes("Gather", nodes.ints(*table), nodes("Add", apart, nodes.const(most - 1, np.int64)))

    def _norm(self, x: ir.Value, weight: str, name: str) -> ir.Value:
        factor, shift = self.weights.norm(weight), self.weights.vector(f"{weight}.bias")
        return self.nodes("LayerNormalization", x, factor, shift, name=name, axis=-1, epsilon=self.spec.norm_eps)

    def _after(self, x: ir.Value, y: ir.Value | None, at: str) -> ir.Value:
        """The norm after a sub-layer that gave y, or None when it was removed: value `at`, a tap."""
        total = x if y is None else self.nodes("Add", x, y)
        out = self._norm(total, f"{at}_norm", at)
        self.taps.append(out)
        return out

    def _attention(self, index: int, x: ir.Value) -> ir.Value:
        at = self.nodes.scope = f"layers.{index}.attn"
        heads, nodes = self.spec.layers[index].kv_heads, self.nodes
        if not heads:
            return self._after(x, None, at)

        def split(y: ir.Value, perm: list[int]) -> ir.Value:
            return nodes("Transpose", nodes("Reshape", y, nodes.ints(0, 0, heads, self.spec.head_dim)), perm=perm)

        query, key, value = (self.weights.linear(x, f"{at}.{part}") for part in "qkv")
        query = nodes("Mul", split(query, [0, 2, 1, 3]), nodes.const(self.spec.attention_scale, np.float32))
        scores = nodes("MatMul", query, split(key, [0, 2, 3, 1]))
        if self._distances is not None:
            table = nodes("Reshape", self.weights.vector(f"{at}.distance"), nodes.ints(heads, self.spec.buckets))
            scores = nodes("Add", scores, nodes("Gather", table, self._distances, axis=1))  # [heads, seq, seq]
        shares = nodes("Softmax", nodes("Add", scores, self._bias), axis=-1)
        mixed = nodes("Transpose", nodes("MatMul", shares, split(value, [0, 2, 1, 3])), perm=[0, 2, 1, 3])
        core = nodes("Reshape", mixed, nodes.ints(0, 0, -1), name=f"{at}.core")
        return self._after(x, self.weights.linear(core, f"{at}.o"), at)

    def _mlp(self, index: int, x: ir.Value) -> ir.Value:
        at = self.nodes.scope = f"layers.{index}.mlp"
        if not self.spec.layers[index].ffn:
            return self._after(x, None, at)
        up = self.weights.linear(x, f"{at}.up")
        inner = self.nodes("Identity", ACTIVATIONS[self.spec.activation](self.nodes, up), name=f"{at}.inner")
        return self._after(x, self.weights.linear(inner, f"{at}.down"), at)

    def _pool(self, x: ir.Value, real: ir.Value) -> ir.Value:
        """Token states [batch, seq, hidden] -> the output `embedding` [batch, hidden]."""
        nodes, spec = self.nodes, self.spec
        nodes.scope = "pool"
        name = None if spec.normalize else "embedding"
        if spec.pooling == "cls":
            out = nodes("Gather", x, nodes.const(0, np.int64), axis=1, name=name)
        else:
            weight = nodes("Unsqueeze", real, nodes.ints(2))
            total = nodes("ReduceSum", nodes("Mul", x, weight), nodes.ints(1), keepdims=0)
            count = nodes("ReduceSum", real, nodes.ints(1), keepdims=1)
            out = nodes("Div", total, nodes("Max", count, nodes.const(SHORTEST, np.float32)), name=name)
        if not spec.normalize:
            return out
        length = nodes("Sqrt", nodes("ReduceSum", nodes("Mul", out, out), nodes.ints(-1), keepdims=1))
        return nodes("Div", out, nodes("Max", length, nodes.const(SHORTEST, np.float32)), name="embedding")


def gelu(nodes: Nodes, x: ir.Value) -> ir.Value:
    """GELU with the error function."""
    bent = nodes("Add", nodes("Erf", nodes("Div", x, nodes.const(sqrt(2), np.float32))), nodes.const(1, np.float32))
    return nodes("Mul", nodes("Mul", x, nodes.const(0.5, np.float32)), bent)


def relu(nodes: Nodes, x: ir.Value) -> ir.Value:
    """The positive part."""
    return nodes("Relu", x)


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu}
