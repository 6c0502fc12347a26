"""The custom operators inside onnxruntime: they replace the function bodies and compute the same."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from jpq_export.lower.export import export_onnx
from jpq_export.numerics.reference import low_bit_matmul
from jpq_export.runtime.cache import CacheLayout
from jpq_export.runtime.session import OrtModel

ort = pytest.importorskip("onnxruntime")
PRODUCTS = {"LowBitMatMul", "LowBitMatMuls"}
IDS = np.array([[3, 14, 15, 92, 65], [35, 89, 79, 3, 2]])


def session(path, library=None, *, activations=None, threads=1, profile=None):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if activations:
        options.add_session_config_entry("jpq.activations", activations)
    if library:
        options.register_custom_ops_library(str(library.path))
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def logits(run):
    feeds = {
        "input_ids": IDS,
        "attention_mask": np.ones_like(IDS),
        "position_ids": np.broadcast_to(np.arange(IDS.shape[1]), IDS.shape).copy(),
    }
    feeds |= {f"past.{name}": value for name, value in CacheLayout.of(run).none(len(IDS)).items()}
    return run.run(["logits"], feeds)[0]


def distance(got, expected):
    return float(np.sqrt(np.mean(np.square(got - expected)) / np.mean(np.square(expected))))


@pytest.fixture(scope="module", params=["llama", "biases", "gemma3", "gpt2"])
def exported(request, tmp_path_factory, conftest_of):
    """All widths, both kinds of zero, with and without bias: (path, number of matrices)."""
    tiny = conftest_of("lower")
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    model = tiny.random_model(tiny.SPECS[request.param])
    export_onnx(model, path, form="custom_op")
    return path, len(model.quantized)


def test_logits_with_and_without_the_library(exported, library):
    path, _ = exported
    expected = logits(session(path))
    assert distance(logits(session(path, library)), expected) < 1e-5
    assert distance(logits(session(path, library, activations="int16")), expected) < 1e-3
    assert distance(logits(session(path, library, activations="int8")), expected) < 0.1


def test_twin_rounded_activations_differ_so_the_kernels_do_run(exported, library):
    path, _ = exported
    if library.implementations[0] != "avx512-vnni":
        pytest.skip("only avx512-vnni rounds")
    assert distance(logits(session(path, library, activations="int8")), logits(session(path))) > 1e-4


def test_a_registered_kernel_wins_over_the_function_body(exported, library, tmp_path):
    path, matrices = exported
    products = [node for node in onnx.load(path, load_external_data=False).graph.node if node.op_type in PRODUCTS]
    assert {node.op_type for node in products} == PRODUCTS
    assert sum(len(node.output) for node in products) >= matrices - 1  # an untied embedding is only looked up
    for loaded, expected in ((library, {node.name for node in products}), (None, set())):
        run = session(path, loaded, profile=tmp_path / "profile")
        logits(run)
        events = json.loads(Path(run.end_profiling()).read_text())
        ran = {event["name"] for event in events if event.get("args", {}).get("op_name") in PRODUCTS}
        assert {name.removesuffix("_kernel_time") for name in ran} == expected


def test_the_bits_of_fast_reach_the_kernels(exported, library, monkeypatch):
    monkeypatch.setenv("JPQ_KERNELS", "cpu")
    ids, found = np.arange(1, 9)[None], {}
    for mode in ("fp32", "16", "8"):
        if mode != "fp32":
            monkeypatch.setenv("JPQ_FAST_BITS", mode)
        model = OrtModel(exported[0], threads=1, exact=mode == "fp32", device="cpu")
        assert model.path.endswith("fp32" if mode == "fp32" else f"{mode} bits")
        found[mode] = model.forward(ids).logits
    far = {mode: distance(found[mode], found["fp32"]) for mode in ("16", "8")}
    assert 0 < far["16"] < far["8"] / 20
    assert far["8"] < 0.1


def test_threads_do_not_change_a_bit(exported, library):
    path, _ = exported
    assert np.array_equal(logits(session(path, library, threads=3)), logits(session(path, library)))


def test_an_unknown_mode_is_refused(exported, library):
    with pytest.raises(Exception, match=r"jpq.activations must be fp32, int16 or int8 \(half\)"):
        session(exported[0], library, activations="half")


def one_node(stored, bias=None, **changes):
    """A model of one LowBitMatMul, its attributes changed at will."""
    arrays = {"packed": stored.packed, "scales": stored.scales, "zeros": stored.zeros, "bias": bias}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    scheme = stored.scheme
    attributes = {"bits": scheme.bits, "K": stored.shape[1], "N": stored.shape[0], "group_size": scheme.group_size}
    attributes |= {"symmetric": int(scheme.symmetric), "plugin_namespace": "jpq", "plugin_version": "1"} | changes
    graph = helper.make_graph(
        [helper.make_node("LowBitMatMul", ["X", *arrays], ["Y"], domain="jpq", **attributes)],
        "one",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("jpq", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 0, 64), (2, 3, 64)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_node_at_any_rank(library, random, shape, symmetric):
    rng = np.random.default_rng(8)
    stored, bias = random(50, 64, 3, 32, symmetric, rng), rng.normal(size=50).astype(np.float32)
    x = rng.normal(size=shape).astype(np.float32)
    y = session(one_node(stored, bias), library).run(None, {"X": x})[0]
    expected = low_bit_matmul(x, stored, bias)
    assert y.shape == expected.shape
    assert not y.size or distance(y, expected) < 1e-5
    other = low_bit_matmul(x, stored)
    assert not y.size or distance(y, other) > 1e-2


@pytest.mark.parametrize(
    ("changes", "x", "message"),
    [
        ({"K": 60}, 64, "K must be a multiple of group_size"),
        ({"bits": 9}, 64, "bits must be 1 to 8"),
        ({"bits": 4}, 64, "must be .*packed"),
        ({"N": 49}, 64, "must be .*packed"),
        ({"group_size": 16}, 64, "must be .*scales"),
        ({"symmetric": 0}, 64, "must be .*zeros"),
        ({}, 32, "last dimension of X must be K"),
    ],
)
def test_what_does_not_fit_is_an_error_not_a_crash(library, random, changes, x, message):
    stored = random(50, 64, 3, 32, True, np.random.default_rng(9))
    with pytest.raises(Exception, match=message):
        session(one_node(stored, **changes), library).run(None, {"X": np.ones((1, x), np.float32)})
