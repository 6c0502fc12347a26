"""Weights as INT4 and INT8 around zero with fp16 scales, the form TensorRT-RTX keeps packed; products in fp16.

TensorRT-RTX 1.7 knows no unsigned codes, no stored zero points and no other widths, and its INT4 may feed nothing but
DequantizeLinear. So codes become integers around zero, exactly:

    zero an integer (`Scheme.integer_zero`, or stored):   s (c - z),                     signed = c - z
    zero half an integer, (2^b - 1) / 2:                  (s / 2) (2 c - (2^b - 1)),     signed = 2 c - (2^b - 1)

in the narrowest of both widths that holds every value the scheme can have: ternary and 1 to 3 bits in INT4, 4 bits
there only with `integer_zero`, 5 to 7 and 8 with `integer_zero` in INT8. Halving an fp16 scale is exact but for
subnormal ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from jpq_export.errors import PlanError, TargetError
from jpq_export.format.compressed import DOWN, UP, CompressedModel
from jpq_export.format.target import SIGNED_BITS
from jpq_export.lower.nodes import Nodes
from jpq_export.numerics.affine import QuantizedWeight

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16


@dataclass(frozen=True, slots=True, eq=False)
class SignedCodes:
    """A weight [N, K] = scale * code: codes int8 [N, K] within `bits` signed bits, scales float16 [N, K/g]."""

    bits: int
    codes: np.ndarray
    scales: np.ndarray


def signed(name: str, weight: QuantizedWeight) -> SignedCodes:
    """Codes around zero; PlanError when no signed width holds the scheme."""
    scheme = weight.scheme
    bits = next((bits for bits in SIGNED_BITS if bits >= scheme.signed_bits), None)
    if bits is None:
        raise PlanError(
            f"{name}: {scheme.bits}-bit codes with {_zero(weight)} do not fit INT8; make the plan for this target again"
        )
    n, k = weight.shape
    twice = 2 * weight.points().astype(np.int16).reshape(n, -1, scheme.group_size)  # [N, K/g, g]
    twice -= (2 * weight.zero_points()).astype(np.int16)[:, :, None]
    half = scheme.symmetric and scheme.centre % 1
    codes = (twice if half else twice // 2).reshape(n, k).astype(np.int8)
    return SignedCodes(bits, codes, (weight.scales / 2).astype(np.float16) if half else weight.scales)


def _zero(weight: QuantizedWeight) -> str:
    return f"zero {weight.scheme.centre:g}" if weight.scheme.symmetric else "stored zero points"


class SignedWeights:
    """The weights of one model while its graph is built: stands in for `Weights`, without one operator of our own.

    Initializers: `<name>.codes` and `.scales`, [K, N] and [K/g, N] as DequantizeLinear fuses best; a tied table is
    [N, K], for rows are looked up in it too. Norms and biases as in `Weights`.
    """

    def __init__(self, model: CompressedModel, nodes: Nodes) -> None:
        """Start with no weight stored."""
        self.unfused: set[str] = set()
        self._model, self._nodes = model, nodes
        self._casts: dict[str | None, ir.Value] = {}
        self._tables: dict[str, tuple[ir.Value, ir.Value]] = {}

    def norm(self, name: str) -> ir.Value:
        """The factor of a norm."""
        return self._store(f"{name}.weight", ir.tensor(self._model.vectors[name]))

    def vector(self, name: str) -> ir.Value:
        """A bias or table by its canonical name."""
        return self._store(name, ir.tensor(self._model.vectors[name]))

    def linear(self, x: ir.Value, name: str, *, weight: str | None = None) -> ir.Value:
        """X [batch, seq, K] float32 times matrix `weight` in fp16, plus its bias in fp32: value `name`, float32."""
        nodes, weight = self._nodes, weight or name
        by_row = weight == "embed"
        matrix = self._matrix(weight, by_row=by_row)
        if by_row:
            matrix = nodes("Transpose", matrix, perm=[1, 0])
        biased = f"{weight}.bias" in self._model.vectors
        y = nodes("MatMul", self._half(x), matrix)
        if weight in self._model.adapters:
            y = nodes("Add", y, self._branch(self._half(x), weight))
        y = nodes("Cast", y, to=FLOAT, name=None if biased else name)
        if not biased:
            return y
        return nodes(
            "Add", y, self._store(f"{weight}.bias", ir.tensor(self._model.vectors[f"{weight}.bias"])), name=name
        )

    def linears(self, x: ir.Value, names: Sequence[str]) -> tuple[ir.Value, ...]:
        """`linear` of every name."""
        return tuple(self.linear(x, name) for name in names)

    def parts(self, names: Sequence[str]) -> None:
        """No operator of several is made of these."""

    def rows(self, indices: ir.Value, weight: str, *, name: str | None) -> ir.Value:
        """Rows of matrix `weight` at `indices` [batch, seq], float32.

        A DequantizeLinear of its own: one that also feeds the head would be computed whole for both.
        """
        rows = self._nodes("Gather", self._matrix(weight, by_row=True), indices, axis=0)
        return self._nodes("Cast", rows, to=FLOAT, name=name)

    def functions(self, opset: int) -> list[ir.Function]:
        """None: every operator is standard."""
        del opset
        return []

    def _branch(self, x: ir.Value, weight: str) -> ir.Value:
        """The low-rank branch of x in fp16: two small products."""
        adapter = self._model.adapters[weight]
        for part, values in ((DOWN, adapter.down), (UP, adapter.up)):
            x = self._nodes("MatMul", x, self._store(f"{weight}{part}", ir.tensor(values)))
        return x

    def _half(self, x: ir.Value) -> ir.Value:
        """X in fp16, cast once for all matrices that read it."""
        if x.name not in self._casts:
            self._casts[x.name] = self._nodes("Cast", x, to=FLOAT16)
        return self._casts[x.name]

    def _matrix(self, name: str, *, by_row: bool) -> ir.Value:
        """The matrix in fp16, [N, K] when `by_row`, else [K, N]."""
        if name not in self._tables:
            parts = signed(name, self._whole(name))
            codes, scales = (parts.codes, parts.scales) if by_row else (parts.codes.T, parts.scales.T)
            self._tables[name] = (
                self._store(f"{name}.codes", _codes_tensor(np.ascontiguousarray(codes), parts.bits)),
                self._store(f"{name}.scales", ir.tensor(np.ascontiguousarray(scales))),
            )
        size = self._whole(name).scheme.group_size
        return self._nodes("DequantizeLinear", *self._tables[name], axis=1 if by_row else 0, block_size=size)

    def _whole(self, name: str) -> QuantizedWeight:
        weight = self._model.quantized[name]
        if not isinstance(weight, QuantizedWeight):
            raise TargetError(
                f"{name}: rows of several widths cannot be written for TensorRT-RTX; export for another target or with "
                "another --method"
            )
        return weight

    def _store(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        return self._nodes.initializers.get(name) or self._nodes.initializer(name, tensor)


def _codes_tensor(codes: np.ndarray, bits: int) -> ir.TensorProtocol:
    """Codes int8 of any shape as an ONNX tensor of 4 or 8 bits."""
    if bits == 8:
        return ir.tensor(codes)
    flat = codes.reshape(-1).view(np.uint8) & 15
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    packed = flat[0::2] | (flat[1::2] << 4)  # the first of a pair in the low half
    return ir.PackedTensor(packed, ir.DataType.INT4, shape=codes.shape)
