"""Stored weights in a graph: initializers, and the nodes that multiply with them or look rows up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from jpq_export.format.compressed import DOWN, UP, CompressedModel, stored_blocks
from jpq_export.lower import functions, integer
from jpq_export.lower.functions import Part, Several, Variant
from jpq_export.lower.nodes import Nodes
from jpq_export.numerics.affine import QuantizedWeight, with_stored_zeros
from jpq_export.numerics.row_blocks import RowBlocks

Form = Literal["custom_op", "qdq", "fp32", "signed"]  # the last is written by `signed.SignedWeights`
# 2 bits have a standard type too, but only from opset 25, and its kernel is no faster than the 4-bit one the function
# body uses (35 M weights, one token: both 0.9 ms; with fp32 activations 190 ms against 2.8 ms).
STANDARD_BITS = (4, 8)


class Weights:
    """The weights of one model while its graph is built.

    Initializers are `<name>.packed`, `.scales` and `.zeros` for a matrix, `<name>.weight` for a norm (the plain name is
    the value that norm computes), and the canonical name for a bias.
    """

    def __init__(
        self,
        model: CompressedModel,
        form: Form,
        nodes: Nodes,
        *,
        with_overloads: bool,
        together: bool = False,
        integer_inputs: bool = False,
    ) -> None:
        """Start with no weight stored. `together`: products of one X may be one operator.

        `integer_inputs`: the linears of the layers round X to 8 bits and multiply integers.
        """
        self.variants: dict[tuple[str, str], Variant] = {}
        self.unfused: set[str] = set()
        self._model, self._form, self._nodes, self._with_overloads = model, form, nodes, with_overloads
        self._together, self._integer_inputs = together, integer_inputs
        self._several: dict[str, Several] = {}
        self._sums: dict[tuple[str | None, int], ir.Value] = {}

    def norm(self, name: str) -> ir.Value:
        """The factor of a norm."""
        return self._store(f"{name}.weight", ir.tensor(self._model.vectors[name]))

    def vector(self, name: str) -> ir.Value:
        """A bias or table by its canonical name."""
        return self._store(name, ir.tensor(self._model.vectors[name]))

    def linear(self, x: ir.Value, name: str, *, weight: str | None = None) -> ir.Value:
        """X [batch, seq, K] times matrix `weight` (by default the one called `name`), plus its bias: value `name`."""
        weight = weight or name
        bias = self._bias(f"{weight}.bias")
        if self._form != "fp32" and weight in self._model.adapters:
            return self._nodes("Add", self._stored_product(x, None, weight, bias), self._branch(x, weight), name=name)
        if self._form == "fp32":
            matrix = self._store(f"{weight}.transposed", ir.tensor(np.ascontiguousarray(self._model.weight(weight).T)))
            y = self._nodes("MatMul", x, matrix, name=None if bias else name)
            return self._nodes("Add", y, bias, name=name) if bias else y
        return self._stored_product(x, name, weight, bias)

    def _stored_product(self, x: ir.Value, name: str | None, weight: str, bias: ir.Value | None) -> ir.Value:
        """X times the codes of a matrix."""
        stored = self._model.quantized[weight]
        if isinstance(stored, RowBlocks):
            return self._row_blocks(x, name, weight, bias)
        return self._product(x, name, weight, with_stored_zeros(stored), bias)

    def _branch(self, x: ir.Value, weight: str) -> ir.Value:
        """The low-rank branch: two small products."""
        adapter = self._model.adapters[weight]
        for part, values in ((DOWN, adapter.down), (UP, adapter.up)):
            factor = self._store(f"{weight}{part}", ir.tensor(values))
            x = self._nodes("MatMul", x, self._nodes("Cast", factor, to=ir.DataType.FLOAT))  # folded at load
        return x

    def _product(
        self, x: ir.Value, name: str | None, weight: str, stored: QuantizedWeight, bias: ir.Value | None
    ) -> ir.Value:
        """X times one stored block whose initializers are called `weight`."""
        if self._integer_inputs and self._form != "fp32" and weight.startswith("layers."):
            inputs = [x, *self._packed(weight, stored), *([bias] if bias else [])]
            variant = Variant.of(integer.OP_TYPE, stored.scheme, stored.shape[1], bias=bias is not None)
            return self._custom(variant, inputs, name, stored)
        shared = weight == "embed" and self._model.spec.tied  # rows are looked up too: keep rows together
        if self._form == "qdq" and not shared and _has_standard_form(stored):
            return self._standard(x, name, weight, stored, bias)
        inputs = [x, *self._packed(weight, stored), *([bias] if bias else [])]
        variant = Variant.of("LowBitMatMul", stored.scheme, stored.shape[1], bias=bias is not None)
        if not variant.fused:
            self.unfused.add(weight)
        return self._custom(variant, inputs, name, stored)

    def _row_blocks(self, x: ir.Value, name: str | None, weight: str, bias: ir.Value | None) -> ir.Value:
        """A product for every block of rows, one after the other, then each output at its place."""
        nodes, whole = self._nodes, self._model.quantized[weight]
        assert isinstance(whole, RowBlocks)
        blocks = stored_blocks(weight, whole)
        parts = [self._product(x, None, part, with_stored_zeros(block), None) for part, block in blocks]
        if self.unfused.issuperset(part for part, _ in blocks):
            self.unfused.add(weight)
        self.unfused.difference_update(part for part, _ in blocks)
        ordered = whole.positions is None
        y = nodes("Concat", *parts, axis=-1, name=name if ordered and bias is None else None)
        if whole.positions is not None:
            places = self._store(f"{weight}.positions", ir.tensor(whole.positions))
            y = nodes("Gather", y, places, axis=-1, name=None if bias else name)
        return nodes("Add", y, bias, name=name) if bias else y

    def linears(self, x: ir.Value, names: Sequence[str]) -> tuple[ir.Value, ...]:
        """`linear` of every name, as one operator where all of them may be."""
        parts = self.parts(names) if len(names) > 1 else None
        if parts is None:
            return tuple(self.linear(x, name) for name in names)
        several = Several(parts[0].in_features, tuple((part.variant, part.out_features) for part in parts))
        self._several[several.overload] = several
        inputs, facts = [value for part in parts for value in part.inputs], several.attributes
        options: dict[str, Any] = {"domain": functions.DOMAIN, "overload": several.overload, **facts}
        return self._nodes.many(several.op_type, x, *inputs, names=names, **options)

    def parts(self, names: Sequence[str]) -> list[Part] | None:
        """The matrices of these names for an operator of several; None where one of them may not be part of such."""
        model = self._model
        mixed = any(name in model.adapters or isinstance(model.quantized[name], RowBlocks) for name in names)
        if mixed or self._integer_inputs or not self._together or self._form != "custom_op":
            return None
        out = []
        for name in names:
            stored, bias = self._stored(name), self._bias(f"{name}.bias")
            variant = Variant.of("LowBitMatMul", stored.scheme, stored.shape[1], bias=bias is not None)
            if not variant.fused:
                self.unfused.add(name)
            inputs = (*self._packed(name, stored), *([bias] if bias else []))
            out.append(Part(variant, *stored.shape, inputs))
        return out

    def rows(self, indices: ir.Value, weight: str, *, name: str | None) -> ir.Value:
        """Rows of matrix `weight` at `indices` [batch, seq]."""
        stored = self._stored(weight)
        if self._form == "fp32":
            return self._nodes(
                "Gather", self._store(f"{weight}.rows", ir.tensor(stored.dequantize())), indices, name=name
            )
        variant = Variant.of("LowBitGather", stored.scheme, stored.shape[1])
        return self._custom(variant, [indices, *self._packed(weight, stored)], name, stored)

    def functions(self, opset: int) -> list[ir.Function]:
        """Bodies of all operators used so far, sorted."""
        found = [functions.function(self.variants[key], opset) for key in sorted(self.variants)]
        return found + [self._several[key].function(opset) for key in sorted(self._several)]

    def _custom(self, variant: Variant, inputs: list[ir.Value], name: str | None, stored: QuantizedWeight) -> ir.Value:
        self.variants[variant.op_type, variant.overload] = variant
        return self._nodes.many(
            variant.op_type,
            *inputs,
            names=[name],
            domain=functions.DOMAIN,
            overload=variant.overload if self._with_overloads else "",
            **functions.stamp(stored.scheme, *stored.shape),
        )[0]

    def _packed(self, name: str, stored: QuantizedWeight) -> list[ir.Value]:
        parts = {"packed": stored.packed, "scales": stored.scales, "zeros": stored.zeros}
        return [self._store(f"{name}.{part}", ir.tensor(a)) for part, a in parts.items() if a is not None]

    def _stored(self, name: str) -> QuantizedWeight:
        """As these operators read it; every row has one width."""
        weight = self._model.quantized[name]
        assert isinstance(weight, QuantizedWeight), name
        return with_stored_zeros(weight)

    def _bias(self, name: str) -> ir.Value | None:
        return self._store(name, ir.tensor(self._model.vectors[name])) if name in self._model.vectors else None

    def _store(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        return self._nodes.initializers.get(name) or self._nodes.initializer(name, tensor)

    def _standard(
        self, x: ir.Value, name: str | None, weight: str, stored: QuantizedWeight, bias: ir.Value | None
    ) -> ir.Value:
        """MatMul with a blocked DequantizeLinear over axis 0 of [K, N]: onnxruntime fuses it into MatMulNBits.

        A symmetric zero is 2^(b-1) - 1/2: signed codes take the integer part, `half_correction` adds the half.
        """
        nodes, scheme = self._nodes, stored.scheme
        scales = self._store(f"{weight}.scales", ir.tensor(np.ascontiguousarray(stored.scales.T)))
        scales = nodes("Cast", scales, to=ir.DataType.FLOAT)  # fp16 in the file, folded at load
        inputs = [self._store(f"{weight}.packed", _codes_tensor(stored)), scales]
        if not scheme.symmetric:
            zeros = stored.zero_points().astype(np.uint8).T
            inputs.append(self._store(f"{weight}.zeros", _narrow(zeros, int(scheme.bits), signed=False)))
        matrix = nodes("DequantizeLinear", *inputs, axis=0, block_size=scheme.group_size)
        y = nodes("MatMul", x, matrix, name=None if scheme.symmetric or bias else name)
        if scheme.symmetric:
            half = nodes("Mul", scales, nodes.const(0.5, np.float32))
            missing = nodes("MatMul", self._group_sums(x, scheme.group_size), half)
            y = nodes("Add", y, missing, name=None if bias else name)
        return nodes("Add", y, bias, name=name) if bias else y

    def _group_sums(self, x: ir.Value, group_size: int) -> ir.Value:
        """Sums of X over groups, computed once for all matrices that read it."""
        key = (x.name, group_size)
        if key not in self._sums:
            self._sums[key] = functions.group_sums(self._nodes, x, group_size)
        return self._sums[key]


def _has_standard_form(stored: QuantizedWeight) -> bool:
    scheme = stored.scheme
    return scheme.bits in STANDARD_BITS and not scheme.normal and scheme.group_size in functions.FUSED_BLOCKS


def _codes_tensor(stored: QuantizedWeight) -> ir.TensorProtocol:
    """Codes as [K, N]; signed around 2^(b-1) when symmetric."""
    codes = np.ascontiguousarray(stored.codes().T)
    return _narrow(codes, int(stored.scheme.bits), signed=stored.scheme.symmetric)


def _narrow(codes: np.ndarray, bits: int, *, signed: bool) -> ir.TensorProtocol:
    """Codes uint8 [K, N] as an ONNX tensor of 4 or 8 bits; `signed` subtracts 2^(bits-1)."""
    if signed:
        codes = codes ^ (1 << (bits - 1))  # flipping the top bit subtracts 2^(b-1) in two's complement
    if bits == 8:
        return ir.tensor(codes.view(np.int8) if signed else np.ascontiguousarray(codes))
    flat = codes.reshape(-1)
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    packed = flat[0::2] | (flat[1::2] << 4)  # the first of a pair in the low half
    return ir.PackedTensor(packed, ir.DataType.INT4 if signed else ir.DataType.UINT4, shape=codes.shape)
