"""Bodies of `jpq::LowBitMatMul` and `jpq::LowBitGather` in standard ONNX, so that any onnxruntime runs the file.

A body unpacks codes as `numerics/packing.py` lays them out and hands integer codes to DequantizeLinear. onnxruntime
inlines it, folds the unpacking (its input is constant) and fuses DequantizeLinear + MatMul into its 4-bit MatMulNBits
kernel: 10x faster than the fp32 matrix that plain arithmetic folds to, and a third of the memory (71 M weights of 3
bits, one token, one core: 1.9 ms against 18.7 ms).

Wider codes are cut into fields of at most 4 bits, one product each:

    c = low + 2^l high,   X · [s (c - z)]ᵀ = X · [s (low - z_low)]ᵀ + X · [2^l s (high - z_high)]ᵀ

There is an 8-bit kernel, but with fp32 activations it dequantizes at every call: 13.8 ms where two fields take 1.7 ms.

A symmetric zero is half-integer. Where a field has room, codes are doubled and scales halved, which is exact:

    s (c - (2^b - 1) / 2) = (s / 2) (2 c - (2^b - 1))

At 4 and 8 bits it has none. There the zero is 2^(b-1) and the missing half is added:

    X · [s (c - 2^(b-1) + 1/2)]ᵀ = X · [s (c - 2^(b-1))]ᵀ + X · [s / 2]ᵀ

the last a product with the sums of X over groups. Ternary codes have an integer zero and need neither. Normal levels
(`numerics/levels.py`) are looked up and are codes of 8 bits from there on. Wide groups are handed over as several of
the kernel's blocks with one scale: a row of 576 as 9 of 64. Shapes and shifts depend on the variant, so every variant
is an overload of the function of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
import onnx_ir as ir

from jpq_export.lower import integer
from jpq_export.lower.nodes import Nodes
from jpq_export.lower.unpacking import pattern, points, shifted, unpack
from jpq_export.numerics.levels import MIDDLE
from jpq_export.numerics.scheme import TERNARY, Scheme, kernel_bits

DOMAIN = "jpq"
VERSION = "1"
# First bit and width of the fields a code is cut into, so that each fits the 4-bit kernel, doubled when symmetric.
FIELDS: dict[float, tuple[tuple[int, int], ...]] = {
    1: ((0, 1),),
    TERNARY: ((0, 2),),
    2: ((0, 2),),
    3: ((0, 3),),
    4: ((0, 4),),
    5: ((0, 3), (3, 2)),
    6: ((0, 3), (3, 3)),
    8: ((0, 4), (4, 4)),
}
FUSED_BLOCKS = (256, 128, 64, 32, 16)  # block sizes MatMulNBits takes
INT_ATTRIBUTES = ("bits", "K", "N", "group_size", "symmetric")
TEXT_ATTRIBUTES = ("plugin_namespace", "plugin_version")
FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32
UINT8, UINT4 = ir.DataType.UINT8, ir.DataType.UINT4


@dataclass(frozen=True, slots=True)
class Variant:
    """What a body depends on: the scheme, whether rows of codes or zeros end inside a byte pattern, a bias."""

    op_type: str
    scheme: Scheme
    columns: int  # K when rows need padding before they can be cut into patterns, else 0
    groups: int  # likewise K / g for the packed zeros
    bias: bool = False

    @staticmethod
    def of(op_type: str, scheme: Scheme, in_features: int, *, bias: bool = False) -> Variant:
        """The variant a weight with `in_features` columns needs."""
        codes = pattern(scheme.bits)[0]
        groups = scheme.groups(in_features)
        return Variant(
            op_type,
            scheme,
            in_features if in_features % codes else 0,
            groups if groups % codes and not scheme.symmetric else 0,
            bias,
        )

    @property
    def overload(self) -> str:
        """Name of the overload: "b3_g64_sym", "ternary_g64_k64_sym", "b3_g64_k60_z1_bias", ..."""
        width = "ternary" if self.scheme.bits == TERNARY else f"b{self.scheme.bits}"
        parts = [width, f"g{self.scheme.group_size}"]
        parts += ["normal"] if self.scheme.normal else ["sym"] if self.scheme.symmetric else []
        parts += [f"k{self.columns}"] if self.columns else []
        parts += [f"z{self.groups}"] if self.groups else []
        return "_".join(parts + (["bias"] if self.bias else []))

    @property
    def block(self) -> int:
        """Widest block of MatMulNBits that a group is a multiple of; 0 when it is of none."""
        return next((block for block in FUSED_BLOCKS if self.scheme.group_size % block == 0), 0)

    @property
    def fused(self) -> bool:
        """Whether onnxruntime's MatMulNBits can take it; otherwise onnxruntime folds the weight to fp32."""
        return self.block > 0

    @property
    def doubled(self) -> bool:
        """Whether the zero is half an integer and doubled codes fit 4 bits, field by field: all widths but 4 and 8."""
        return self.scheme.symmetric and not self.scheme.normal and self.scheme.bits not in (TERNARY, 4, 8)

    @property
    def lacks_half(self) -> bool:
        """Whether the zero is half an integer and doubled codes do not fit."""
        return self.scheme.symmetric and not self.scheme.normal and self.scheme.bits in (4, 8)

    @property
    def fields(self) -> tuple[tuple[int, int], ...]:
        """First bit and width of the fields that codes are cut into; normal levels are bytes."""
        return FIELDS[8 if self.scheme.normal else self.scheme.bits]

    @property
    def centre(self) -> list[int]:
        """Zero points of a symmetric scheme's fields."""
        if self.doubled:
            return [(1 << width) - 1 for _, width in self.fields]
        bits = self.scheme.bits
        middle = MIDDLE if self.scheme.normal else 1 if bits == TERNARY else 1 << (int(bits) - 1)
        return [(middle >> start) & ((1 << width) - 1) for start, width in self.fields]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Input names of the body, in order."""
        first = "indices" if self.op_type == "LowBitGather" else "X"
        return (first, "packed", "scales", *(() if self.scheme.symmetric else ("zeros",)), *(("bias",) * self.bias))


def function(variant: Variant, opset: int) -> ir.Function:
    """The ONNX function of a variant."""
    nodes = Nodes()
    inputs = {name: ir.Value(name=name) for name in variant.inputs}
    build = {"LowBitMatMul": matmul, "LowBitGather": _gather, integer.OP_TYPE: integer.matmul}[variant.op_type]
    output = build(nodes, variant, inputs)
    graph = ir.Graph(
        list(inputs.values()), [output], nodes=nodes.nodes, opset_imports={"": opset}, name=variant.op_type
    )
    attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in INT_ATTRIBUTES]
    attributes += [ir.Attr(name, ir.AttributeType.STRING, None) for name in TEXT_ATTRIBUTES]
    return ir.Function(DOMAIN, variant.op_type, variant.overload, graph=graph, attributes=attributes)


@dataclass(frozen=True, slots=True)
class Part:
    """A weight of an operator of several: its variant, shape, and initializers in the order the operator reads them."""

    variant: Variant
    out_features: int
    in_features: int
    inputs: tuple[ir.Value, ...]


@dataclass(frozen=True, slots=True)
class Several:
    """`jpq::LowBitMatMuls`: products of one X with several weights; the body holds that of a LowBitMatMul for each."""

    in_features: int
    parts: tuple[tuple[Variant, int], ...]  # and N
    op_type: str = "LowBitMatMuls"

    @property
    def overload(self) -> str:
        """Name of the overload: K, and those of the parts with their N, "k576__b4_g64_sym_n576__b3_g64_sym_n192"."""
        return "__".join([f"k{self.in_features}", *(f"{variant.overload}_n{n}" for variant, n in self.parts)])

    @property
    def attributes(self) -> dict[str, int]:
        """What a kernel is told: of part i "bits_i", "N_i", "group_size_i", "symmetric_i" and "bias_i"."""
        out = {"count": len(self.parts), "K": self.in_features}
        for i, (variant, n) in enumerate(self.parts):
            out |= {f"{name}_{i}": fact for name, fact in facts_of(variant, n).items()}
        return out

    def function(self, opset: int) -> ir.Function:
        """The ONNX function. It repeats the bodies of its parts: onnxruntime knows no overload inside a function."""
        nodes, x, inputs, outputs = Nodes(), ir.Value(name="X"), [], []
        for i, (variant, _) in enumerate(self.parts):
            mine = {name: ir.Value(name=f"{name}_{i}") for name in variant.inputs[1:]}
            inputs += mine.values()
            outputs.append(matmul(nodes, variant, {"X": x} | mine))
        graph = ir.Graph([x, *inputs], outputs, nodes=nodes.nodes, opset_imports={"": opset}, name=self.op_type)
        attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in self.attributes]
        return ir.Function(DOMAIN, self.op_type, self.overload, graph=graph, attributes=attributes)


def facts_of(variant: Variant, out_features: int) -> dict[str, int]:
    """What a kernel of several weights is told of each, beside its K."""
    scheme = variant.scheme
    return {
        "bits": kernel_bits(scheme.bits, normal=scheme.normal),
        "N": out_features,
        "group_size": scheme.group_size,
        "symmetric": int(scheme.symmetric),
        "bias": int(variant.bias),
    }


def stamp(scheme: Scheme, out_features: int, in_features: int) -> dict[str, int | str]:
    """Attributes of a LowBitMatMul, LowBitMatMulInteger or LowBitGather node."""
    return {
        "bits": kernel_bits(scheme.bits, normal=scheme.normal),
        "K": in_features,
        "N": out_features,
        "group_size": scheme.group_size,
        "symmetric": int(scheme.symmetric),
        "plugin_namespace": DOMAIN,
        "plugin_version": VERSION,
    }


def matmul(nodes: Nodes, variant: Variant, inputs: dict[str, ir.Value]) -> ir.Value:
    """Y = X · dequantize(W)ᵀ (+ bias)."""
    scheme = variant.scheme
    if variant.fused:
        y = _fused(nodes, variant, inputs)
    else:
        codes = unpack(nodes, inputs["packed"], scheme.bits, count=variant.columns)
        weight = _dequantize(nodes, variant, codes, inputs["scales"], inputs.get("zeros"))  # [N, K/g, g]
        weight = nodes("Transpose", nodes("Flatten", weight, axis=1), perm=[1, 0])
        y = nodes("MatMul", inputs["X"], weight)
    return nodes("Add", y, inputs["bias"]) if variant.bias else y


def _fused(nodes: Nodes, variant: Variant, inputs: dict[str, ir.Value]) -> ir.Value:
    """The product through DequantizeLinear on [K, N], in the form onnxruntime fuses; one for each field of a code."""
    scheme = variant.scheme
    of_groups = nodes("Transpose", nodes("Cast", inputs["scales"], to=FLOAT), perm=[1, 0])  # [K/g, N]
    blocks = scheme.group_size // variant.block  # of a group
    scales = _repeated(nodes, of_groups, blocks)
    codes = _fields(nodes, inputs["packed"], variant, count=variant.columns, doubled=variant.doubled)
    if scheme.symmetric:
        zeros = [nodes("Expand", nodes.const(zero, np.uint8), nodes("Shape", scales)) for zero in variant.centre]
    else:
        zeros = [_repeated(nodes, z, blocks) for z in _fields(nodes, inputs["zeros"], variant, count=variant.groups)]
    products = []
    for (start, _), code, zero in zip(variant.fields, codes, zeros, strict=True):
        step = _times(nodes, scales, 2.0 ** (start - variant.doubled))
        code, zero = nodes("Cast", code, to=UINT4), nodes("Cast", zero, to=UINT4)
        weight = nodes("DequantizeLinear", code, step, zero, axis=0, block_size=variant.block)
        products.append(nodes("MatMul", inputs["X"], weight))
    if variant.lacks_half:
        sums = group_sums(nodes, inputs["X"], scheme.group_size)
        products.append(nodes("MatMul", sums, _times(nodes, of_groups, 0.5)))
    return reduce(lambda total, product: nodes("Add", total, product), products)


def _repeated(nodes: Nodes, rows: ir.Value, times: int) -> ir.Value:
    """Every row of [K/g, N] `times` times, one after the other."""
    if times == 1:
        return rows
    each = nodes("Expand", nodes("Unsqueeze", rows, nodes.ints(1)), nodes.ints(1, times, 1))
    return nodes("Flatten", each, axis=2)


def _fields(nodes: Nodes, packed: ir.Value, variant: Variant, *, count: int, doubled: bool = False) -> list[ir.Value]:
    """Codes or zeros cut into their fields, times 2 when `doubled`: uint8 [K, N] or [K/g, N] each."""
    bits = variant.scheme.bits
    if len(variant.fields) == 1:
        return [unpack(nodes, packed, bits, count=count, transposed=True, doubled=doubled)]
    whole = points(nodes, variant.scheme, unpack(nodes, packed, bits, count=count, transposed=True))
    out = []
    for start, width in variant.fields:
        mask = nodes.const(((1 << width) - 1) << doubled, np.uint8)
        out.append(nodes("BitwiseAnd", shifted(nodes, whole, start - doubled), mask))
    return out


def _times(nodes: Nodes, scales: ir.Value, factor: float) -> ir.Value:
    return scales if factor == 1 else nodes("Mul", scales, nodes.const(factor, np.float32))


def _dequantize(
    nodes: Nodes, variant: Variant, codes: ir.Value, scales: ir.Value, packed_zeros: ir.Value | None
) -> ir.Value:
    """Compute scale * (code - zero) in fp32: [rows, K/g, g]."""
    scheme = variant.scheme
    codes = points(nodes, scheme, codes)
    wide = nodes("Cast", nodes("Reshape", codes, nodes.ints(0, -1, scheme.group_size)), to=FLOAT)
    if packed_zeros is None:
        zeros = nodes.const(scheme.centre, np.float32)
    else:
        zeros = nodes("Cast", unpack(nodes, packed_zeros, scheme.bits, count=variant.groups), to=FLOAT)
        zeros = nodes("Unsqueeze", zeros, nodes.ints(-1))
    return nodes("Mul", nodes("Sub", wide, zeros), nodes("Unsqueeze", nodes("Cast", scales, to=FLOAT), nodes.ints(-1)))


def group_sums(nodes: Nodes, x: ir.Value, group_size: int) -> ir.Value:
    """X [batch, seq, K] -> sums over each group [batch, seq, K/g]."""
    grouped = nodes("Reshape", x, nodes.ints(0, 0, -1, group_size))
    return nodes("ReduceSum", grouped, nodes.ints(-1), keepdims=0)


def _gather(nodes: Nodes, variant: Variant, inputs: dict[str, ir.Value]) -> ir.Value:
    """Rows of dequantize(W) at indices [batch, seq]: packed rows are gathered first, so only those are unpacked."""
    indices = inputs["indices"]
    rows = {name: nodes("Gather", inputs[name], indices, axis=0) for name in variant.inputs[1:]}
    flat = {name: nodes("Flatten", value, axis=2) for name, value in rows.items()}  # [batch * seq, ...]
    codes = unpack(nodes, flat["packed"], variant.scheme.bits, count=variant.columns)
    weight = _dequantize(nodes, variant, codes, flat["scales"], flat.get("zeros"))
    shape = nodes("Concat", nodes("Shape", indices), nodes.ints(-1), axis=0)
    return nodes("Reshape", weight, shape)
