"""`jpq::LowBitChain` inside onnxruntime, and its body, against the definition; the crew against threads one by one."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from jpq_export.lower import chain
from jpq_export.lower.chain import Chain
from jpq_export.lower.functions import DOMAIN, Part, Variant
from jpq_export.lower.nodes import Nodes
from jpq_export.numerics import reference
from jpq_export.numerics.reference import ChainLink
from jpq_export.numerics.scheme import TERNARY

ort = pytest.importorskip("onnxruntime")
HIDDEN, FFN, CORE, EPSILON = 64, 96, 48, 1e-5
CLOSE = 3e-6  # relative RMS: fp32 sums of some hundred terms, through four products
FLOAT = ir.TensorType(ir.DataType.FLOAT)


def make_links(random, rng, *, activation="silu", post=False, biased=False, last="give"):
    """Output product, MLP, then query, key and value, or (`last` "norm", "sum") what lies before something else."""
    bits = iter((4, 3, TERNARY, 8, 2, 5, 1))

    def weight(n, k, symmetric=True):
        bias = rng.normal(size=n).astype(np.float32) if biased else None
        return random(n, k, next(bits), 16, symmetric, rng), bias

    def vector():
        return rng.normal(size=HIDDEN).astype(np.float32)

    def total(k, norm=True):
        return ChainLink((weight(HIDDEN, k),), "sum", vector() if post else None, vector() if norm else None)

    links = [total(CORE), ChainLink((weight(FFN, HIDDEN), weight(FFN, HIDDEN, False)), activation)]
    links.append(total(FFN, norm=last != "sum"))
    if last == "give":
        links.append(ChainLink((weight(HIDDEN, HIDDEN), weight(16, HIDDEN, False), weight(24, HIDDEN)), "give"))
    return links


def write(links):
    """A model of one chain: X, stream -> sums, then what the last link gives."""
    x, stream = (
        ir.Value(name=n, shape=ir.Shape(["b", "s", w]), type=FLOAT) for n, w in (("X", CORE), ("stream", HIDDEN))
    )
    nodes, made, given = Nodes(), Chain(x, stream, EPSILON), ()
    for i, link in enumerate(links):
        parts = [part(nodes, f"w{i}_{j}", *weight) for j, weight in enumerate(link.weights)]
        if link.then == "give":
            given = made.give(parts, [f"y{j}" for j in range(len(parts))], nodes)
        elif link.then == "sum":
            factors = (link.norm, link.post)
            norms = [None if a is None else nodes.initializer(f"n{i}_{j}", ir.tensor(a)) for j, a in enumerate(factors)]
            made.sum(parts[0], f"sum{i}", *norms)
        else:
            made.gate(parts, link.then)
    if links[-1].then != "give":
        normed = made.close(nodes, "normed")
        given = (normed,) if normed else ()
    outputs = [*made.sums, *given]
    for value in outputs:
        value.type = FLOAT
    graph = ir.Graph([x, stream], outputs, nodes=nodes.nodes, initializers=list(nodes.initializers.values()),
                     opset_imports={"": 23, DOMAIN: 1}, name="one")  # fmt: skip
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=[made.function(23)]))


def part(nodes, name, stored, bias):
    arrays = {"packed": stored.packed, "scales": stored.scales, "zeros": stored.zeros, "bias": bias}
    inputs = [nodes.initializer(f"{name}.{key}", ir.tensor(a)) for key, a in arrays.items() if a is not None]
    variant = Variant.of("LowBitMatMul", stored.scheme, stored.shape[1], bias=bias is not None)
    return Part(variant, *stored.shape, tuple(inputs))


def open_session(proto, library=None, *, threads=1, activations=None, profile=None):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if library:
        options.add_session_config_entry("jpq.activations", activations or "fp32")
        options.register_custom_ops_library(str(library.path))
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def inputs(shape, seed=1):
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=(*shape, w)).astype(np.float32) for n, w in (("X", CORE), ("stream", HIDDEN))}


def expected(links, feeds):
    sums, given = reference.low_bit_chain(*(feeds[n].astype(np.float64) for n in ("X", "stream")), links, EPSILON)
    return [*sums, *given]


def distance(got, wanted):
    return float(np.sqrt(np.mean(np.square(got - wanted)) / np.mean(np.square(wanted))))


KINDS = {
    "llama": {},
    "gemma": {"activation": "gelu_tanh", "post": True},
    "biases": {"biased": True},
    "before something else": {"last": "norm", "post": True},
    "before a rotation": {"last": "sum"},
}


@pytest.fixture(params=KINDS)
def links(request, random):
    return make_links(random, np.random.default_rng(5), **KINDS[request.param])


@pytest.fixture
def wide(random, monkeypatch):
    """Links of 640 and 1,408 numbers, which `write` and `inputs` then have too."""
    for name, value in (("HIDDEN", 640), ("FFN", 1408), ("CORE", 384)):
        monkeypatch.setitem(globals(), name, value)
    return make_links(random, np.random.default_rng(3))


@pytest.mark.parametrize("ours", [True, False], ids=["operator", "body"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 4), (1, 9), (2, 300), (0, 1)])  # few up to 8, many, none
def test_operator_and_body_are_the_definition(links, library, shape, ours):
    if not (ours or shape[0]):
        pytest.skip("a body's Reshape does not take nothing")
    feeds = inputs(shape)
    got = open_session(write(links), library if ours else None, threads=2).run(None, feeds)
    wanted = expected(links, feeds)
    assert [value.shape for value in got] == [value.shape for value in wanted]
    if feeds["X"].size:
        assert max(distance(*pair) for pair in zip(got, wanted, strict=True)) < CLOSE


def test_twins_one_weight_one_norm_one_bias(random, library):
    links = make_links(random, np.random.default_rng(5), biased=True, post=True)
    feeds = inputs((1, 1))
    got = open_session(write(links), library).run(None, feeds)
    for i, link in enumerate(links):
        stored, bias = link.weights[-1]
        moved = bias.copy()
        moved[3] += 1
        wrong = [replace(link, weights=(*link.weights[:-1], (stored, moved)))]
        wrong += [
            replace(link, **{n: getattr(link, n) * 1.01}) for n in ("norm", "post") if getattr(link, n) is not None
        ]
        for other in wrong:
            changed = expected([*links[:i], other, *links[i + 1 :]], feeds)
            assert max(distance(*pair) for pair in zip(got, changed, strict=True)) > 100 * CLOSE


@pytest.mark.parametrize("activations", ["fp32", "int16", "int8"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (1, 300)])
def test_threads_do_not_change_a_bit(wide, library, shape, activations):
    """Several tasks a product; a session of three threads on fewer cores, again and again."""
    proto, feeds = write(wide), inputs(shape)
    alone = open_session(proto, library, activations=activations).run(None, feeds)
    crew = open_session(proto, library, threads=3, activations=activations)
    for _ in range(50):
        for got, one in zip(crew.run(None, feeds), alone, strict=True):
            assert np.array_equal(got, one)


def test_so_many_rows_that_they_pass_in_blocks(wide, library):
    feeds = inputs((1, 1700))  # a block is 1,489 of them
    got = open_session(write(wide), library, threads=2).run(None, feeds)
    assert max(distance(*pair) for pair in zip(got, expected(wide, feeds), strict=True)) < CLOSE


def test_where_the_library_is_the_operator_runs_and_not_the_body(random, library, tmp_path):
    proto = write(make_links(random, np.random.default_rng(5)))
    for ours in (library, None):
        session = open_session(proto, ours, profile=tmp_path / "profile")
        session.run(None, inputs((1, 1)))
        events = json.loads(Path(session.end_profiling()).read_text())
        ran = {event.get("args", {}).get("op_name") for event in events}
        assert (chain.OP_TYPE in ran) == (ours is not None)


def attribute(proto, name, value):
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    next(a for a in changed.graph.node[0].attribute if a.name == name).i = value
    del changed.functions[:]
    return changed


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("links", 9, "must be 1 to 8"),
        ("then_0", 0, "may not stand here"),
        ("then_1", 1, "a sum has one weight"),
        ("then_3", 2, "may not stand here"),
        ("count_3", 5, "a link at most 4"),
        ("K_1", 32, "is not what the link before gives"),
        ("N_1", 95, "must be uint8"),
        ("N_2", 95, "must be uint8"),
        ("bits_0", 9, "bits must be 1 to 8"),
        ("group_size_0", 7, "K must be a multiple of group_size"),
        ("symmetric_0", 0, "zeros"),
        ("post_0", 1, "norm"),
    ],
)
def test_what_does_not_fit_is_an_error_not_a_crash(random, library, name, value, told):
    proto = attribute(write(make_links(random, np.random.default_rng(5))), name, value)
    with pytest.raises(Exception, match=told):
        open_session(proto, library)


def test_a_vector_too_many_is_refused_and_not_taken_for_another(random, library):
    """Without its "post_2" the post norm of the last link would be read as its norm."""
    proto = write(make_links(random, np.random.default_rng(5), post=True, last="norm"))
    session = open_session(attribute(proto, "post_2", 0), library)
    with pytest.raises(Exception, match="more inputs than the attributes say"):
        session.run(None, inputs((1, 1)))


def test_outputs_without_a_name_change_nothing(wide, library):
    """As the exporter leaves sums that nobody reads; in one block of rows, and in two."""
    proto = write(wide)
    hidden = onnx.ModelProto()
    hidden.CopyFrom(proto)
    shown = [i for i, name in enumerate(hidden.graph.node[0].output) if not name.startswith("sum")]
    for i in range(len(hidden.graph.output) - 1, -1, -1):
        if i not in shown:
            hidden.graph.node[0].output[i] = ""
            del hidden.graph.output[i]
    for shape in ((1, 1), (1, 1700)):
        feeds = inputs(shape)
        whole = open_session(proto, library, threads=2).run(None, feeds)
        part = open_session(hidden, library, threads=2).run(None, feeds)
        for got, wanted in zip(part, [whole[i] for i in shown], strict=True):
            assert np.array_equal(got, wanted)


def test_weights_that_are_no_constants_and_inputs_of_other_shapes_are_refused(random, library):
    proto = write(make_links(random, np.random.default_rng(5)))
    session = open_session(proto, library)
    good = inputs((1, 2))
    with pytest.raises(Exception, match="of the rows of X"):
        session.run(None, good | {"stream": good["stream"][:, :1]})
    del proto.functions[:]
    moved = proto.graph.initializer.pop(0)
    proto.graph.input.append(onnx.helper.make_tensor_value_info(moved.name, moved.data_type, list(moved.dims)))
    with pytest.raises(Exception, match="packed"):
        open_session(proto, library)
