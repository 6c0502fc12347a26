"""The written file: bytes, names, metadata, operators of each dialect, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import external_data_helper, numpy_helper

from jpq_export.errors import BundleError, StorageError, TargetError
from jpq_export.format.spec import ModelSpec
from jpq_export.lower.export import check_graph, dialect_for, export_onnx, share_data, weight_bytes
from jpq_export.lower.functions import FIELDS
from jpq_export.numerics.packing import unpack_codes
from jpq_export.numerics.scheme import Scheme, kernel_bits, row_bytes

# What TensorRT 10.3 parses (its operator list), as far as a decoder needs it.
BASIC = {
    "Add", "And", "Cast", "Concat", "Constant", "Cos", "Div", "Equal", "Greater", "LessOrEqual", "MatMul", "Mul", "Or",
    "Range", "ReduceMean", "Reshape", "Shape", "Sigmoid", "Sin", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tanh",
    "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


@pytest.fixture
def write(tiny, tmp_path):
    """Export a model and return it, the parsed file and its path."""

    def do(family="llama", form="custom_op", name="model.onnx", scheme_of=None, **options):
        model = tiny.model(tiny.specs[family], *([scheme_of] if scheme_of else []))
        path = tmp_path / name
        export_onnx(model, path, form=form, **options)
        return model, onnx.load(path, load_external_data=False), path

    return do


def stored(proto, path):
    """Initializers by name."""
    external_data_helper.load_external_data_for_model(proto, str(path.parent))
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


@pytest.mark.parametrize("family", ["llama", "biases", "gemma3", "gpt2", "pruned"])
def test_the_file_holds_exactly_the_weights(write, family):
    model, proto, path = write(family)
    assert weight_bytes(path) == model.weight_bytes
    assert path.with_name("model.onnx.data").stat().st_size == model.weight_bytes
    inside = [t.name for t in proto.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert inside == ["logits_from"]  # the default of an input
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_packed_weights_are_stored_as_they_are(write):
    model, proto, path = write("biases")
    got = stored(proto, path)
    for name, weight in model.quantized.items():
        np.testing.assert_array_equal(got.pop(f"{name}.packed"), weight.packed)
        np.testing.assert_array_equal(got.pop(f"{name}.scales"), weight.scales)
        if weight.zeros is not None:
            np.testing.assert_array_equal(got.pop(f"{name}.zeros"), weight.zeros)
    for name, vector in model.vectors.items():
        np.testing.assert_array_equal(got.pop(f"{name}.weight" if name.endswith("norm") else name), vector)
    assert got.pop("logits_from").tolist() == [0]
    assert not got


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_standard_form_costs_the_scheme_less_the_padding_of_zeros(write, bits, symmetric):
    model, proto, path = write("qwen3", "qdq", scheme_of=lambda name, index: Scheme(bits, 32, symmetric))
    padding = 0
    for name, (n, k) in model.spec.matrices().items():
        if not symmetric and name != "embed":
            padding += n * row_bytes(k // 32, bits) - row_bytes(n * k // 32, bits)
    assert weight_bytes(path) == model.weight_bytes - padding
    kinds = {t.data_type for t in proto.graph.initializer if t.name.endswith("attn.q.packed")}
    names = {(4, True): "INT4", (4, False): "UINT4", (8, True): "INT8", (8, False): "UINT8"}
    assert kinds == {onnx.TensorProto.DataType.Value(names[bits, symmetric])}


def test_scales_stay_fp16_in_the_standard_form(write):
    _, proto, _ = write("llama", "qdq")
    scales = [t for t in proto.graph.initializer if t.name.endswith(".scales")]
    assert {t.data_type for t in scales} == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize("form", ["custom_op", "qdq"])
def test_a_tied_embedding_is_stored_once_and_read_twice(write, form):
    _, proto, _ = write("llama", form)
    assert not any(t.name.startswith("head") for t in proto.graph.initializer)
    readers = [node.op_type for node in proto.graph.node if "embed.packed" in node.input]
    assert readers == ["LowBitGather", "LowBitMatMul"]


def facts_of(weight):
    """What a kernel is told of a weight."""
    (n, _), scheme = weight.shape, weight.scheme
    zeros = int(scheme.symmetric)
    return {"bits": kernel_bits(scheme.bits), "N": n, "group_size": scheme.group_size, "symmetric": zeros}


def stamped(node):
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def test_operators_are_stamped(write):
    model, proto, _ = write("biases")
    nodes = [node for node in proto.graph.node if node.op_type in ("LowBitMatMul", "LowBitGather")]
    for node in nodes:
        weight = model.quantized[node.input[1].removesuffix(".packed")]
        plugin = {"plugin_namespace": b"jpq", "plugin_version": b"1"}
        assert stamped(node) == facts_of(weight) | {"K": weight.shape[1]} | plugin
        assert len(node.input) == 3 + (not weight.scheme.symmetric) + (node.input[-1].endswith(".bias"))


def test_operators_of_several_products_are_stamped(write):
    model, proto, _ = write("biases")
    several = [node for node in proto.graph.node if node.op_type == "LowBitMatMuls"]
    single = [node for node in proto.graph.node if node.op_type == "LowBitMatMul"]
    assert several
    assert len(single) + sum(len(node.output) for node in several) == len(model.quantized) - 1  # but the embedding
    for node in several:
        weights = [model.quantized[name] for name in node.output]
        biased = [f"{name}.bias" in model.vectors for name in node.output]
        expected = {"count": len(weights), "K": weights[0].shape[1]}
        for i, (weight, bias) in enumerate(zip(weights, biased, strict=True)):
            expected |= {f"{name}_{i}": fact for name, fact in facts_of(weight).items()} | {f"bias_{i}": int(bias)}
        assert stamped(node) == expected
        inputs = [2 + (not weight.scheme.symmetric) + bias for weight, bias in zip(weights, biased, strict=True)]
        assert len(node.input) == 1 + sum(inputs)


def test_graph_interface(write):
    _, proto, _ = write("pruned")
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in [*proto.graph.input, *proto.graph.output]
    }
    cache = {
        f"{kind}.{i}.{part}": [length, "batch", heads, 16]
        for i, heads in ((0, 2), (2, 1), (4, 3))
        for part in ("key", "value")
        for kind, length in (("past", "past"), ("present", "total"))
    }
    tokens = {"input_ids": ["batch", "seq"], "attention_mask": ["batch", "total"], "position_ids": ["batch", "seq"]}
    assert shapes == tokens | cache | {"logits": ["batch", "seq", 96], "logits_from": [1]}


def test_metadata(write):
    model, proto, _ = write("pruned")
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert ModelSpec.from_json(metadata["jpq.spec"]) == model.spec
    assert metadata["jpq.format"] == "jpq-onnx/2"
    assert json.loads(metadata["jpq.unfused"]) == []
    assert (proto.ir_version, {o.domain: o.version for o in proto.opset_import}) == (10, {"": 23, "jpq": 1})


@pytest.mark.parametrize("form", ["custom_op", "qdq"])
def test_the_same_model_gives_the_same_bytes(write, form):
    contents = []
    for _ in range(2):
        path = write("pruned", form)[2]
        contents.append((path.read_bytes(), path.with_name("model.onnx.data").read_bytes()))
    assert contents[0] == contents[1]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "pruned"])
def test_old_tensorrt_gets_basic_operators_and_no_function(write, family):
    model, proto, path = write(family, tensorrt="10.3")
    known = BASIC | {"Gather"} | ({"LayerNormalization", "Identity"} if model.spec.layer_norm else set())
    assert {node.op_type for node in proto.graph.node if not node.domain} <= known
    assert {node.op_type for node in proto.graph.node if node.domain} == {"LowBitMatMul", "LowBitGather"}
    assert not proto.functions
    assert not any(node.overload for node in proto.graph.node)
    names = [node.name for node in proto.graph.node]
    assert len(set(names)) == len(names)
    assert weight_bytes(path) == model.weight_bytes


@pytest.mark.parametrize("how", [{"tensorrt": "10.3"}, {"tensorrt": "10.16"}])
def test_tensorrt_is_told_whose_logits_are_wanted(write, how):
    """By an input without a default, which TensorRT would take for a constant."""
    _, proto, _ = write("gemma3", **how)
    dims = {value.name: value.type.tensor_type.shape.dim for value in proto.graph.input}
    assert [d.dim_param for d in dims["logits_at"]] == ["wanted"]
    assert "logits_from" not in dims
    assert [d.dim_param for d in proto.graph.output[0].type.tensor_type.shape.dim[:2]] == ["batch", "wanted"]
    last = [node for node in proto.graph.node if "logits_at" in node.input]
    assert [node.op_type for node in last] == ["Gather"]


@pytest.mark.parametrize(
    ("version", "opset", "fused", "with_functions"),
    [("10.3", 20, False, False), ("10.7.0", 21, False, True), ("10.16", 23, True, True), ("11.4.1", 23, True, True)],
)
def test_dialects(version, opset, fused, with_functions):
    dialect = dialect_for(version)
    assert (dialect.opset, dialect.fused, dialect.functions) == (opset, fused, with_functions)


def test_onnxruntime_gets_the_operators_of_opset_23(write):
    _, proto, _ = write("gemma3")
    operators = {node.op_type for node in proto.graph.node}
    assert {"Attention", "RMSNormalization", "AddRMSNormalization", "GeluTanhMul"} <= operators


@pytest.mark.parametrize("case", ["gemma3", "gpt2", "pruned"])
def test_every_function_is_of_an_operator_that_is_there(write, case):
    _, proto, _ = write(case)
    assert len(proto.functions) == len({(f.name, f.overload) for f in proto.functions})
    used = {(node.op_type, node.overload) for node in proto.graph.node if node.domain == "jpq"}
    assert used == {(f.name, f.overload) for f in proto.functions}


def test_standard_form_keeps_other_widths_as_operators(write):
    model, proto, _ = write("qwen3", "qdq")
    standard = {
        node.input[0].removesuffix(".packed") for node in proto.graph.node if node.op_type == "DequantizeLinear"
    }
    expected = {name for name, weight in model.quantized.items() if weight.scheme.bits in (4, 8) and name != "embed"}
    assert standard == expected
    assert standard


def test_onnxruntime_fuses_the_standard_form(write, tmp_path):
    import onnxruntime

    model, _, path = write("qwen3", "qdq")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    bits = [weight.scheme.bits for name, weight in model.quantized.items() if name != "embed"]
    assert operators.count("MatMulNBits") == sum(len(FIELDS[b]) if b in (5, 6) else 1 for b in bits)
    assert "DequantizeLinear" not in operators


def test_codes_of_the_standard_form_are_the_transposed_ones(write):
    """INT4 and UINT4 nibbles in the file are the codes of [K, N], the first of a pair in the low half."""
    model, proto, path = write("qwen3", "qdq")
    weight = model.quantized["layers.0.attn.q"]
    assert (weight.scheme.bits, weight.scheme.symmetric) == (3, True)  # not standard: stays packed
    standard = [n for n, w in model.quantized.items() if w.scheme.bits in (4, 8) and n != "embed"]
    assert {model.quantized[n].scheme.symmetric for n in standard} == {True, False}
    for name in standard:
        weight, tensor = model.quantized[name], next(t for t in proto.graph.initializer if t.name == f"{name}.packed")
        location = {entry.key: entry.value for entry in tensor.external_data}
        with path.with_name(location["location"]).open("rb") as file:
            file.seek(int(location["offset"]))
            raw = np.frombuffer(file.read(int(location["length"])), np.uint8)
        n, k = weight.shape
        got = unpack_codes(raw[None], weight.scheme.bits, n * k).reshape(k, n)
        flip = 1 << (weight.scheme.bits - 1) if weight.scheme.symmetric else 0
        np.testing.assert_array_equal(got ^ flip, weight.codes().T)


@pytest.mark.parametrize("version", ["", "ten", "10.x"])
def test_a_version_that_is_none_is_refused(version):
    with pytest.raises(TargetError, match="expected a version"):
        dialect_for(version)


def test_a_broken_graph_is_refused(write):
    _, proto, path = write()
    proto.graph.node[-1].input[0] = "nowhere"
    onnx.save(proto, path)
    with pytest.raises(BundleError, match="not a valid ONNX graph"):
        check_graph(path)


def test_a_function_of_another_opset_is_refused(write):
    _, proto, path = write()
    proto.functions[0].opset_import[0].version = 13
    onnx.save(proto, path)
    with pytest.raises(BundleError, match="not a valid ONNX graph"):
        check_graph(path)


def test_a_wrong_width_in_a_function_is_refused(write):
    """Strict shape inference goes through the function bodies."""
    _, proto, path = write()
    tensor = next(t for t in proto.graph.initializer if t.name == "layers.0.attn.q.scales")
    tensor.dims[1] += 1
    onnx.save(proto, path)
    with pytest.raises(BundleError, match="not a valid ONNX graph"):
        check_graph(path)


def test_a_folder_that_cannot_be_written(tiny, tmp_path):
    model = tiny.model(tiny.specs["llama"])
    missing = tmp_path / "missing" / "model.onnx"
    with pytest.raises(StorageError, match="cannot write"):
        export_onnx(model, missing, form="custom_op")
    assert not missing.parent.exists()


def test_export_leaves_the_model_as_it_was(tiny, tmp_path):
    model = tiny.model(tiny.specs["biases"])
    before = {name: replace(weight, packed=weight.packed.copy()) for name, weight in model.quantized.items()}
    export_onnx(model, tmp_path / "model.onnx", form="qdq")
    for name, weight in before.items():
        np.testing.assert_array_equal(model.quantized[name].packed, weight.packed)


def test_two_graphs_of_the_same_weights_share_one_file(write, tmp_path) -> None:
    write(name="model.onnx")
    write(name="model.trt.onnx", tensorrt="10.7")
    before = onnx.load(tmp_path / "model.trt.onnx")
    assert share_data(tmp_path / "model.trt.onnx", tmp_path / "model.onnx")
    assert not (tmp_path / "model.trt.onnx.data").exists()
    after = onnx.load(tmp_path / "model.trt.onnx")
    assert [numpy_helper.to_array(t).tobytes() for t in after.graph.initializer] == [
        numpy_helper.to_array(t).tobytes() for t in before.graph.initializer
    ]
    check_graph(tmp_path / "model.trt.onnx")


def test_graphs_of_different_weights_keep_their_own_files(write, tmp_path) -> None:
    write(name="model.onnx")
    write(name="other.onnx", family="qwen3")
    assert not share_data(tmp_path / "other.onnx", tmp_path / "model.onnx")
    assert (tmp_path / "other.onnx.data").exists()
