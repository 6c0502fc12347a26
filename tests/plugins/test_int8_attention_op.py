"""`jpq::CacheCodes` and `jpq::Int8Attention` inside onnxruntime: the function bodies' results, written in place."""

import numpy as np
import onnx_ir as ir
import pytest

from jpq_export.lower import growing_int8
from jpq_export.lower.functions import DOMAIN
from jpq_export.lower.growing import cache_shape
from jpq_export.lower.nodes import Nodes

ort = pytest.importorskip("onnxruntime")
HEADS, KV_HEADS, DIM, SCALE = 6, 2, 16, 0.25
BATCH, SEQ, PAST, ROOM = 2, 3, 5, 4
TOTAL = PAST + SEQ
CLOSE = 1e-5  # fp32 sums of a hundred terms in another order
FLOAT = ir.DataType.FLOAT
WIDTHS = {part: 1 if part.endswith("_scale") else DIM for part in growing_int8.CACHED}


def model(*, rotary):
    """The two operators as the decoder's graph has them."""
    names = ["query", "key", "value", "mask", *(f"past.{part}" for part in WIDTHS), *(["cos", "sin"] if rotary else [])]
    shapes = {name: ["batch", "seq", KV_HEADS * DIM] for name in ("key", "value")}
    shapes |= {"query": ["batch", "seq", HEADS * DIM], "mask": ["batch", 1, "seq", "total"]}
    shapes |= {name: ["batch", "seq", DIM // 2] for name in ("cos", "sin")}
    shapes |= {f"past.{part}": cache_shape("past", kv_heads=KV_HEADS, width=width) for part, width in WIDTHS.items()}
    types = {f"past.{part}": kind for part, kind in growing_int8.CACHED.items()} | {"mask": ir.DataType.BOOL}
    values = {n: ir.Value(name=n, shape=ir.Shape(shapes[n]), type=ir.TensorType(types.get(n, FLOAT))) for n in names}
    given = [values[n] for n in names[: 4 + len(WIDTHS)]]
    nodes, facts = Nodes(), {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "scale": SCALE}
    tables = (values["cos"], values["sin"]) if rotary else None
    outputs = ("output", *(f"present.{part}" for part in WIDTHS))
    made = growing_int8.attention(nodes, tuple(given), tables, names=outputs, **facts)
    for value, kind in zip(made, (FLOAT, *growing_int8.CACHED.values()), strict=True):
        value.type = ir.TensorType(kind)
    opsets = {"": 23, DOMAIN: 1}
    graph = ir.Graph([values[n] for n in names], made, nodes=nodes.nodes, opset_imports=opsets, name="attention")
    bodies = growing_int8.functions(HEADS, KV_HEADS, DIM, rotary=rotary, scale=SCALE, opset=23)
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=bodies)).SerializeToString()


def session(proto, library=None, *, threads=1):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if library:
        options.register_custom_ops_library(str(library.path))
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def feeds_of(*, rotary, room=ROOM, seed=0):
    rng = np.random.default_rng(seed)
    width = {"query": HEADS, "key": KV_HEADS, "value": KV_HEADS}
    feeds = {name: rng.normal(size=(BATCH, SEQ, n * DIM)).astype(np.float32) for name, n in width.items()}
    feeds["mask"] = np.broadcast_to(np.tril(np.ones((SEQ, TOTAL), bool), PAST), (BATCH, 1, SEQ, TOTAL)).copy()
    feeds["mask"][1, ..., :2] = False  # padding on the left
    shape = PAST + SEQ + room, BATCH, KV_HEADS
    for part, last in WIDTHS.items():
        scales = rng.random((*shape, 1)).astype(np.float32)
        codes = rng.integers(-127, 128, (*shape, DIM)).astype(np.int8)
        feeds[f"past.{part}"] = (scales if last == 1 else codes)[: None if room else PAST]
    angle = rng.random((BATCH, SEQ, DIM // 2)).astype(np.float32)
    return feeds | ({"cos": np.cos(angle), "sin": np.sin(angle)} if rotary else {})


def assert_same(got, expected):
    output, *present = got
    assert np.sqrt(np.mean((output - expected[0]) ** 2) / np.mean(expected[0] ** 2)) < CLOSE
    keys, values, *scales = present
    assert np.array_equal(values, expected[2])
    assert np.abs(keys.astype(int) - expected[1]).max() <= 1  # a key in the middle between two codes
    assert np.mean(keys != expected[1]) < 0.01
    for mine, theirs in zip(scales, expected[3:], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("room", [0, ROOM])
@pytest.mark.parametrize("rotary", [True, False])
def test_the_operators_give_what_their_bodies_give(library, rotary, room, threads):
    proto, feeds = model(rotary=rotary), feeds_of(rotary=rotary, room=room)
    expected = session(proto).run(None, feeds)
    got = session(proto, library, threads=threads).run(None, feeds)
    assert expected[1].shape[0] == TOTAL + room
    assert_same(got, expected)
    other = session(proto).run(None, feeds | {"value": feeds["value"] * np.float32(1.01)})
    with pytest.raises(AssertionError):
        assert_same(got, other)  # the twin


@pytest.mark.parametrize("kernels", [True, False])
def test_a_cache_bound_to_both_sides_is_written_in_place(library, kernels):
    run, feeds = session(model(rotary=True), library if kernels else None), feeds_of(rotary=True)
    expected = run.run(None, feeds)
    binding, own = run.io_binding(), {}
    for name, value in feeds.items():
        if not name.startswith("past."):
            binding.bind_cpu_input(name, value)
            continue
        own[name] = value.copy()
        bound = ort.OrtValue.ortvalue_from_numpy(own[name])
        binding.bind_ortvalue_input(name, bound)
        binding.bind_ortvalue_output(name.replace("past", "present"), bound)
    binding.bind_output("output")
    run.run_with_iobinding(binding)
    for value, present in zip(own.values(), expected[1:], strict=True):
        assert np.array_equal(value, present)
    assert np.array_equal(binding.get_outputs()[-1].numpy(), expected[0])
    assert not np.array_equal(own["past.value"], feeds["past.value"])


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("mask", lambda x: x[..., :2], "mask"),
        ("past.key_scale", lambda x: x[:2], "past"),
        ("past.value", lambda x: x[:, :1], "past"),
        ("value", lambda x: x[:, :2], "key and value"),
        ("cos", lambda x: x[:1], "cos and sin"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(library, name, change, said):
    feeds = feeds_of(rotary=True)
    feeds[name] = np.ascontiguousarray(change(feeds[name]))
    with pytest.raises(Exception, match=rf"jpq \w+: .*{said}"):
        session(model(rotary=True), library).run(None, feeds)
