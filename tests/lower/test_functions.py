"""The function bodies against `numerics/reference.py`, in onnxruntime, on awkward sizes."""

from itertools import product

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from jpq_export.lower import functions
from jpq_export.lower.functions import Variant
from jpq_export.lower.nodes import Nodes
from jpq_export.numerics.affine import store
from jpq_export.numerics.levels import NORMAL_WIDTHS, normal_bytes
from jpq_export.numerics.reference import low_bit_gather, low_bit_matmul
from jpq_export.numerics.scheme import ALL_WIDTHS, Scheme, kernel_bits

# fp32 sums of up to 96 products, in another order than numpy's; a wrong scale, zero or code is above 1e-2.
BOUND = 2e-6
KINDS = [*product(ALL_WIDTHS, (True, False)), *((bits, "normal") for bits in NORMAL_WIDTHS)]
SHAPES = [(64, 16), (96, 32), (60, 20), (33, 11), (36, 12), (5, 5), (48, 16), (96, 48), (80, 80)]  # K and group size


def random_weight(bits, k, group_size, symmetric, *, n=7, seed=0):
    rng = np.random.default_rng(seed)
    normal = symmetric == "normal"
    scheme = Scheme(bits, group_size, bool(symmetric), normal=normal)
    codes = rng.integers(0, scheme.max_code + 1, (n, k)).astype(np.uint8)
    codes[0] = np.resize(np.arange(scheme.max_code + 1), k)  # every code value
    scales = rng.uniform(0.01, 0.1, (n, k // group_size)).astype(np.float16)
    zeros = rng.integers(0, scheme.max_code + 1, scales.shape).astype(np.uint8)
    return store(normal_bytes(bits)[codes] if normal else codes, scales, zeros, scheme)


def model_of(op_type, weight, bias=None):
    """One operator with its weight as initializers."""
    nodes = Nodes()
    matmul = op_type == "LowBitMatMul"
    shape, dtype = (["b", "s", weight.shape[1]], ir.DataType.FLOAT) if matmul else (["b", "s"], ir.DataType.INT64)
    x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(dtype))
    arrays = {"packed": weight.packed, "scales": weight.scales, "zeros": weight.zeros, "bias": bias}
    stored = [nodes.initializer(name, ir.tensor(a)) for name, a in arrays.items() if a is not None]
    variant = Variant.of(op_type, weight.scheme, weight.shape[1], bias=bias is not None)
    scheme, (n, k) = weight.scheme, weight.shape
    y = nodes.many(
        op_type, x, *stored, names=["y"], domain="jpq", overload=variant.overload,
        bits=kernel_bits(scheme.bits, normal=scheme.normal),
        K=k, N=n, group_size=scheme.group_size, symmetric=int(scheme.symmetric),
        plugin_namespace="jpq", plugin_version="1",
    )[0]  # fmt: skip
    y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["b", "s", n if matmul else k])
    graph = ir.Graph([x], [y], nodes=nodes.nodes, initializers=list(nodes.initializers.values()),
                     opset_imports={"": 23, "jpq": 1}, name="one")  # fmt: skip
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=[functions.function(variant, 23)]))


def run(proto, x, optimized=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if optimized:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def error(got, expected):
    return float(np.abs(got - expected).max() / np.sqrt(np.mean(expected**2)))


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@pytest.mark.parametrize(("k", "group_size"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_matmul_body_means_the_reference(bits, k, group_size, symmetric, biased):
    weight = random_weight(bits, k, group_size, symmetric)
    x = np.random.default_rng(1).normal(size=(2, 3, k)).astype(np.float32)
    bias = np.arange(7, dtype=np.float32) if biased else None
    proto = model_of("LowBitMatMul", weight, bias)
    onnx.checker.check_model(proto, full_check=True)
    assert error(run(proto, x), low_bit_matmul(x, weight, bias)) < BOUND


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@pytest.mark.parametrize(("k", "group_size"), SHAPES)
def test_gather_body_means_the_reference(bits, k, group_size, symmetric):
    weight = random_weight(bits, k, group_size, symmetric)
    ids = np.array([[6, 0, 3], [1, 1, 5]])
    proto = model_of("LowBitGather", weight)
    onnx.checker.check_model(proto, full_check=True)
    np.testing.assert_allclose(run(proto, ids), low_bit_gather(ids, weight), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bits", ALL_WIDTHS)
def test_every_code_of_a_one_hot_row_comes_back(bits):
    """A unit vector reads one column: the weight itself, to the last bit when one product makes it."""
    weight = random_weight(bits, 48, 16, symmetric=False)
    y = run(model_of("LowBitMatMul", weight), np.eye(48, dtype=np.float32)[None])
    np.testing.assert_allclose(
        y[0].T, weight.dequantize(), rtol=0 if bits <= 4 else 1e-6, atol=0 if bits <= 4 else 1e-6
    )


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@pytest.mark.parametrize("fault", ["scales shifted by a group", "a code off by one", "rows swapped"])
def test_a_wrong_weight_is_seen(bits, symmetric, fault):
    """Twin: the bound is far below what a damaged weight does."""
    weight = random_weight(bits, 64, 16, symmetric)
    codes, scales, zeros = weight.codes(), weight.scales, weight.zero_points().astype(np.uint8)
    if fault == "scales shifted by a group":
        scales = np.roll(scales, 1, axis=1)
    elif fault == "a code off by one":
        codes[3, 5] = 1 - codes[3, 5] if codes[3, 5] < 2 else codes[3, 5] - 1
    else:
        codes = codes[[1, 0, *range(2, 7)]]
    x = np.random.default_rng(1).normal(size=(1, 3, 64)).astype(np.float32)
    codes = normal_bytes(bits)[codes] if weight.scheme.normal else codes
    damaged = model_of("LowBitMatMul", store(codes, scales, zeros, weight.scheme))
    assert error(run(damaged, x), low_bit_matmul(x, weight)) > 100 * BOUND


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@pytest.mark.parametrize(("k", "group_size", "block"), [(64, 16, 16), (96, 48, 16), (576, 576, 64), (1024, 512, 256)])
def test_onnxruntime_fuses_the_body(bits, symmetric, k, group_size, block, tmp_path):
    path = tmp_path / "optimized.onnx"
    run(model_of("LowBitMatMul", random_weight(bits, k, group_size, symmetric)), np.ones((1, 1, k), np.float32), path)
    nodes = onnx.load(path).graph.node
    fused = [node for node in nodes if node.op_type == "MatMulNBits"]
    assert len(fused) == len(functions.FIELDS[8 if symmetric == "normal" else bits])
    assert {a.i for node in fused for a in node.attribute if a.name == "block_size"} == {block}
    assert "DequantizeLinear" not in [node.op_type for node in nodes]


def test_the_widest_block_of_a_group():
    blocks = {576: 64, 512: 256, 384: 128, 128: 128, 48: 16, 20: 0}
    assert {g: Variant.of("LowBitMatMul", Scheme(3, g), g).block for g in blocks} == blocks


def test_a_group_size_without_a_kernel_is_folded_to_fp32(tmp_path):
    path = tmp_path / "optimized.onnx"
    weight = random_weight(3, 60, 20, symmetric=True)
    assert not Variant.of("LowBitMatMul", weight.scheme, 60).fused
    run(model_of("LowBitMatMul", weight), np.ones((1, 1, 60), np.float32), path)
    assert [node.op_type for node in onnx.load(path).graph.node] == ["MatMul"]


def test_variants_that_need_other_bodies_have_other_names():
    schemes = [Scheme(b, g, s) for b in ALL_WIDTHS for g in (5, 16) for s in (True, False)]
    variants = {
        Variant.of(op, scheme, k, bias=bias)
        for op in ("LowBitMatMul", "LowBitGather")
        for scheme in schemes
        for k in (80, 560, 5 * 16 * 3)
        for bias in (True, False)
    }
    assert len({(v.op_type, v.overload) for v in variants}) == len(variants)
