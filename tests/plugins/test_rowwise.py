"""Residual sum and norm, and gates, in C and as operators of onnxruntime, against their definitions in fp64."""

import ctypes
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from jpq_export.lower import rowwise
from jpq_export.lower.functions import DOMAIN
from jpq_export.lower.nodes import Nodes
from jpq_export.numerics import reference
from jpq_export.runtime import native

ort = pytest.importorskip("onnxruntime")
IMPLEMENTATIONS = ("avx512", "avx2", "neon", "scalar")
SHAPES = [(1, 576), (1, 1), (3, 15), (2, 33), (70, 640)]  # the last in several tasks
CLOSE = 2e-6  # relative to the largest: fp32 sums of some hundred squares, exponentials within 2 units of the last bit
EPSILON = 1e-5
GUARD = 16  # numbers behind an output that nobody may write
SILU, GELU = 0, 1
NAMES = {"silu": SILU, "gelu_tanh": GELU}


def expected_norm(a, b, weight):
    return reference.add_rms_norm(a.astype(np.float64), b, weight, EPSILON)


def expected_gate(gate, x, factor):
    return (reference.silu_mul if gate == SILU else reference.gelu_tanh_mul)(x.astype(np.float64), factor)


def distance(got, wanted):
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


@pytest.fixture(scope="module")
def library():
    return ctypes.CDLL(str(native.cpu_library().path))


def values(shape, seed=0):
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=shape, scale=4).astype(np.float32) for _ in range(2))
    return a, b, rng.normal(size=shape[-1]).astype(np.float32)


def outputs(count):
    return [np.full(count + GUARD, np.nan, np.float32) for _ in range(2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_sum_and_norm_are_the_definitions(library, name, shape):
    if name not in native.cpu_library().implementations:
        pytest.skip(f"no {name} on this processor")
    a, b, weight = values(shape)
    total, normed = outputs(a.size)
    sizes = [ctypes.c_int64(n) for n in shape]
    arrays = [pointer(x) for x in (a, b, weight)]
    got = [pointer(total), pointer(normed)]
    assert library.jpq_add_norm(*arrays, ctypes.c_float(EPSILON), *sizes, *got, name.encode()) == 0
    assert np.isnan(total[a.size :]).all()
    assert np.isnan(normed[a.size :]).all()
    total, normed = (x[: a.size].reshape(shape) for x in (total, normed))
    wanted = expected_norm(a, b, weight)
    assert np.array_equal(total, a + b)
    assert distance(normed, wanted[1]) < CLOSE
    assert distance(normed, expected_norm(a, b * np.float32(1.0001), weight)[1]) > CLOSE  # the twin


@pytest.mark.parametrize("gate", NAMES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_gates_are_the_definitions_from_end_to_end(library, name, gate):
    if name not in native.cpu_library().implementations:
        pytest.skip(f"no {name} on this processor")
    x = np.concatenate([np.linspace(-20, 20, 4001), [0, -0.0, 200, -200, 1e-30, 1e12, -1e12, -3e38]]).astype(np.float32)
    factor = np.random.default_rng(1).normal(size=x.size).astype(np.float32)
    y = outputs(x.size)[0]
    count, code = ctypes.c_int64(x.size), ctypes.c_int(NAMES[gate])
    assert library.jpq_gated(code, pointer(x), pointer(factor), count, pointer(y), name.encode()) == 0
    assert np.isnan(y[x.size :]).all()
    with np.errstate(over="ignore"):
        wanted = expected_gate(NAMES[gate], x, factor)
    np.testing.assert_allclose(y[: x.size], wanted, rtol=4e-6, atol=1e-6)
    other = expected_gate(1 - NAMES[gate], x, factor)
    assert not np.allclose(y[: x.size], other, rtol=4e-6, atol=1e-6)  # the twin


def test_an_implementation_nobody_has_is_refused(library):
    x = np.ones(4, np.float32)
    assert library.jpq_gated(SILU, pointer(x), pointer(x), ctypes.c_int64(4), pointer(x), b"mmx") == 4
    assert np.array_equal(x, np.ones(4))


def proto(activation, width, *, weight_shape=None):
    """A graph of both operators: a, b, weight -> a + b, its norm, gate(a) * b."""
    shapes = {"a": ["batch", "seq", width], "b": ["batch", "seq", width], "weight": weight_shape or [width]}
    kind = ir.TensorType(ir.DataType.FLOAT)
    a, b, weight = (ir.Value(name=name, shape=ir.Shape(shape), type=kind) for name, shape in shapes.items())
    nodes = Nodes()
    made_before = nodes("Neg", nodes("Neg", a))  # where a node made it, an empty tensor has no address
    made = [*rowwise.add_norm(nodes, made_before, b, weight, EPSILON, ("total", "normed"))]
    made.append(rowwise.gated(nodes, activation, made_before, b, "gated"))
    for value in made:
        value.type = kind
    opsets = {"": 23, DOMAIN: 1}
    graph = ir.Graph([a, b, weight], made, nodes=nodes.nodes, opset_imports=opsets, name="rowwise")
    bodies = [rowwise.norm_function(EPSILON, 23), rowwise.gate_function(activation, 23)]
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=bodies)).SerializeToString()


def open_session(model, *, ours, profile=None):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 2, 4
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if ours:
        options.register_custom_ops_library(str(native.cpu_library().path))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(model, feeds, *, ours):
    return open_session(model, ours=ours).run(None, feeds)


@pytest.mark.parametrize("ours", [True, False], ids=["operators", "bodies"])
@pytest.mark.parametrize("gate", NAMES)
def test_where_the_library_is_its_operators_run_and_not_the_bodies(gate, ours, tmp_path):
    session = open_session(proto(gate, 8), ours=ours, profile=tmp_path / "profile")
    session.run(None, {name: np.ones((1, 1, 8), np.float32) for name in "ab"} | {"weight": np.ones(8, np.float32)})
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = {event.get("args", {}).get("op_name") for event in events}
    both = {rowwise.ADD_NORM, rowwise.GATES[gate]}
    assert both & ran == (both if ours else set())


@pytest.mark.parametrize("ours", [True, False], ids=["operators", "bodies"])
@pytest.mark.parametrize("gate", NAMES)
@pytest.mark.parametrize("shape", [(1, 1, 576), (2, 40, 640), (1, 3, 5), (0, 1, 8)])
def test_operators_and_bodies_agree_with_the_definitions(shape, gate, ours):
    a, b, weight = values(shape)
    total, normed, gated = run(proto(gate, shape[-1]), {"a": a, "b": b, "weight": weight}, ours=ours)
    assert total.shape == normed.shape == gated.shape == shape
    if a.size:
        wanted = expected_norm(a, b, weight)
        assert distance(total, wanted[0]) < CLOSE
        assert distance(normed, wanted[1]) < CLOSE
        assert distance(gated, expected_gate(NAMES[gate], a, b)) < CLOSE


@pytest.mark.parametrize(
    ("change", "told"),
    [({"b": np.ones((1, 2, 8), np.float32)}, "of one shape"), ({"weight": np.ones(7, np.float32)}, "weight")],
)
def test_shapes_that_do_not_fit_are_named(change, told):
    feeds = {"a": np.ones((1, 1, 8), np.float32), "b": np.ones((1, 1, 8), np.float32), "weight": np.ones(8, np.float32)}
    with pytest.raises(Exception, match=told):
        run(proto("silu", "width", weight_shape=["other"]), feeds | change, ours=True)
