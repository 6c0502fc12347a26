"""The signed form: exactly the stored numbers as INT4 and INT8, no operator of ours, fp16 where it says so."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, external_data_helper, numpy_helper

from jpq_export.errors import PlanError
from jpq_export.lower.export import export_onnx, weight_bytes
from jpq_export.lower.signed import signed
from jpq_export.numerics.affine import QuantizedWeight
from jpq_export.numerics.levels import NORMAL_WIDTHS
from jpq_export.numerics.scheme import TERNARY, Scheme
from jpq_export.parity.runners import OrtRunner, TorchRunner

SCHEMES = (
    Scheme(4, 16, integer_zero=True),
    Scheme(3, 16),
    Scheme(8, 16, integer_zero=True),
    Scheme(6, 16),
    Scheme(2, 16, symmetric=False),
    Scheme(4, 16),
    Scheme(5, 16, symmetric=False),
)


NORMAL = tuple(Scheme(bits, 16, normal=True) for bits in NORMAL_WIDTHS)  # bytes around 128: INT8
NARROW = tuple(Scheme(bits, 16, **kind) for bits in (1, TERNARY) for kind in ({}, {"symmetric": False}))


def mixed(name, index):
    del name
    return SCHEMES[index % len(SCHEMES)]


@pytest.fixture
def write(tiny, tmp_path):
    def do(family="llama", scheme_of=mixed, **options):
        model = tiny.model(tiny.specs[family], scheme_of)
        path = tmp_path / f"{family}.onnx"
        export_onnx(model, path, form="signed", **options)
        return model, path

    return do


@pytest.mark.parametrize(
    "scheme", [*SCHEMES, Scheme(2, 16), Scheme(5, 16), Scheme(3, 16, symmetric=False), *NORMAL, *NARROW]
)
def test_signed_codes_are_exactly_the_weight_in_the_narrowest_width(tiny, scheme):
    weight = tiny.round(np.random.default_rng(0).normal(size=(24, 64)).astype(np.float32), scheme)
    parts = signed("w", weight)
    wide = parts.codes.astype(np.float32) * parts.scales.astype(np.float32).repeat(16, axis=1)
    np.testing.assert_array_equal(wide, weight.dequantize())
    assert parts.bits == (4 if scheme.signed_bits <= 4 else 8)
    assert parts.codes.min() >= -(1 << (parts.bits - 1))
    assert parts.codes.max() < 1 << (parts.bits - 1)
    shifted = wide.reshape(24, 4, 16) / parts.scales.astype(np.float32)[..., None]
    shifted = (shifted * np.roll(parts.scales, 1, axis=1).astype(np.float32)[..., None]).reshape(24, 64)
    assert tiny.relative_rms(shifted, weight.dequantize()) > 0.01  # the twin: scales of the group beside


@pytest.mark.parametrize("scheme", [Scheme(8, 16), Scheme(8, 16, symmetric=False)])
def test_what_int8_cannot_hold_is_refused_by_name(tiny, scheme):
    weight = tiny.round(np.ones((2, 16), np.float32), scheme)
    with pytest.raises(PlanError, match=r"layers\.0\.attn\.q: 8-bit codes with .* do not fit INT8"):
        signed("layers.0.attn.q", weight)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "gpt2", "biases", "pruned"])
def test_onnxruntime_computes_the_model_in_fp16(write, tiny, family):
    model, path = write(family)
    ours, theirs = TorchRunner(model), OrtRunner(path, with_points=True)
    ids = np.random.default_rng(1).integers(0, 96, (1, 20))
    expected, got = ours.forward(ids, values=True), theirs.forward(ids, values=True)
    # fp16 rounds each product to 2^-12: five layers stay below 2e-3 of the logits; fp32 would be at 1e-6.
    assert 1e-5 < tiny.relative_rms(got.logits, expected.logits) < 2e-3
    for name, value in got.values.items():
        assert tiny.relative_rms(value, expected.values[name]) < 4e-3, name
    assert all(value.dtype == np.float16 for value in got.cache.values())
    step = np.array([[5]])
    expected, got = ours.forward(step, cache=expected.cache), theirs.forward(step, cache=got.cache)
    assert tiny.relative_rms(got.logits, expected.logits) < 2e-3


def test_twin_scales_of_the_group_beside_are_far_off(write, tiny):
    model, path = write()
    shifted = {
        name: QuantizedWeight(w.scheme, w.shape, w.packed, np.ascontiguousarray(np.roll(w.scales, 1, axis=1)), w.zeros)
        for name, w in model.quantized.items()
    }
    expected = TorchRunner(type(model)(model.spec, shifted, model.vectors))
    ids = np.random.default_rng(1).integers(0, 96, (1, 20))
    assert tiny.relative_rms(OrtRunner(path).forward(ids).logits, expected.forward(ids).logits) > 0.05


@pytest.mark.parametrize("family", ["llama", "biases"])
def test_the_file_is_standard_and_packed(write, family):
    model, path = write(family, scheme_of=lambda name, index: SCHEMES[2 * (index % 2)])
    proto = onnx.load(path)
    assert {node.domain for node in proto.graph.node} == {""}
    assert not proto.functions
    kinds = {tensor.data_type for tensor in proto.graph.initializer if tensor.name.endswith(".codes")}
    assert kinds == {TensorProto.INT4, TensorProto.INT8}
    assert weight_bytes(path) == model.weight_bytes  # a tied table is stored once
    for node in proto.graph.node:
        assert node.op_type != "Attention" or len(node.output) == 1  # TensorRT parses no other
    past = [value for value in proto.graph.input if value.name.startswith("past.")]
    assert {value.type.tensor_type.elem_type for value in past} == {TensorProto.FLOAT16}


def test_each_matrix_has_its_own_dequantization(write):
    """A tied table feeds look-up and head: one shared node would be computed whole for both."""
    _, path = write("llama")
    proto = onnx.load(path)
    readers = [node for node in proto.graph.node if "embed.codes" in node.input]
    assert [node.op_type for node in readers] == ["DequantizeLinear", "DequantizeLinear"]


def test_other_forms_store_integer_zeros(tiny, tmp_path):
    model = tiny.model(tiny.specs["llama"], lambda name, index: SCHEMES[2 * (index % 2)])
    ids = np.random.default_rng(1).integers(0, 96, (1, 20))
    expected = TorchRunner(model).forward(ids).logits
    for form in ("custom_op", "qdq"):
        path = tmp_path / f"{form}.onnx"
        export_onnx(model, path, form=form)
        assert tiny.relative_rms(OrtRunner(path).forward(ids).logits, expected) < 1e-5
        proto = onnx.load(path, load_external_data=False)
        external_data_helper.load_external_data_for_model(proto, str(tmp_path))
        zeros = [numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == "embed.zeros"]
        assert [set(z.ravel().tolist()) for z in zeros] == [{0x88}]  # two zero points of 8 a byte


def test_one_bit_and_ternary_are_stored_as_int4_and_computed(write, tiny):
    model, path = write(scheme_of=lambda name, index: NARROW[index % len(NARROW)])
    stored = {
        i.data_type for i in onnx.load(str(path), load_external_data=False).graph.initializer if ".codes" in i.name
    }
    assert stored == {TensorProto.INT4}
    ids = np.random.default_rng(1).integers(0, 96, (1, 20))
    expected, got = (
        TorchRunner(model).forward(ids, values=True),
        OrtRunner(path, with_points=True).forward(ids, values=True),
    )
    assert 1e-5 < tiny.relative_rms(got.logits, expected.logits) < 2e-3  # as above: fp16 products
