"""Parity of an int8 cache: a right one passes with the bounds of a float one; each wrong one fails and is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from jpq_export.format.bundle import write_manifest
from jpq_export.format.compressed import CompressedModel
from jpq_export.format.spec import INT8_CACHE
from jpq_export.lower import int8_cache as graphs
from jpq_export.lower.export import export_onnx
from jpq_export.lower.nodes import Nodes
from jpq_export.parity import tolerance
from jpq_export.parity.check import check_parity
from jpq_export.parity.int8_cache import WHOLE_STEP, CacheTally, read_back
from jpq_export.parity.runners import OrtRunner, TorchRunner
from jpq_export.parity.vectors import Vectors, record_vectors
from jpq_export.parity.verify import verify_bundle

NAMES = ("llama", "pruned", "gemma")


@pytest.fixture(scope="module")
def int8_models(models: Any) -> dict[str, CompressedModel]:
    return {name: replace(m, spec=replace(m.spec, kv_cache=INT8_CACHE)) for name, m in models.items()}


@pytest.fixture(scope="module")
def pristine_int8(int8_models: Any, prompts: Any, tmp_path_factory: Any, conftest_of: Any) -> dict[str, Path]:
    folders = {}
    for name, model in int8_models.items():
        folder = folders[name] = tmp_path_factory.mktemp(f"int8-{name}")
        export_onnx(model, folder / "model.onnx", form="custom_op")
        record_vectors(model, folder / "vectors.safetensors", prompts=prompts, steps=12)
        write_manifest(folder, conftest_of("parity").manifest_of(model).with_contents(folder))
    return folders


@pytest.mark.parametrize("name", NAMES)
def test_a_right_cache_passes_with_the_bounds_of_a_float_one(
    int8_models: Any, pristine_int8: Any, prompts: Any, name: str
) -> None:
    report = check_parity(int8_models[name], pristine_int8[name] / "model.onnx", prompts=prompts, steps=64)
    (runtime,) = report.runtimes
    assert report.passed, report.first_diverging
    assert runtime.logits.rel_rms <= tolerance.LOGITS_REL_RMS
    assert runtime.greedy.equal == 64
    assert runtime.cache is not None
    assert runtime.cache.passed
    assert runtime.cache.codes > 10_000
    assert runtime.cache.flipped <= runtime.cache.most_flipped < runtime.cache.codes / 100
    assert json.loads(report.to_json())["runtimes"][0]["cache"]["place"] is None


def test_the_older_layout_passes_too(int8_models: Any, prompts: Any, tmp_path: Path, conftest_of: Any) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(int8_models["llama"], path, form="custom_op", plain=True)
    assert "Int8Attention" not in {node.op_type for node in OrtRunner(path).proto.graph.node}
    report = check_parity(int8_models["llama"], path, prompts=prompts, steps=16)
    assert report.passed, report.first_diverging
    record_vectors(int8_models["llama"], tmp_path / "vectors.safetensors", prompts=prompts, steps=12)
    write_manifest(tmp_path, conftest_of("parity").manifest_of(int8_models["llama"]).with_contents(tmp_path))
    assert verify_bundle(tmp_path).passed


def larger_scale(nodes: Nodes, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Codes and scales that fit each other, one percent off."""
    wide = nodes("Mul", x, nodes.const(1.0, np.float32))
    peak = nodes("ReduceMax", nodes("Abs", wide), nodes.ints(-1), keepdims=1)
    scale = nodes("Div", peak, nodes.const(127 * 1.01, np.float32))
    codes = nodes(
        "Clip", nodes("Round", nodes("Div", x, scale)), nodes.const(-127.0, np.float32), nodes.const(127.0, np.float32)
    )
    return nodes("Cast", codes, to=graphs.INT8), scale


def cut_off(nodes: Nodes, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Towards zero instead of to the nearest."""
    peak = nodes("ReduceMax", nodes("Abs", x), nodes.ints(-1), keepdims=1)
    scale = nodes("Div", peak, nodes.const(127, np.float32))
    return nodes("Cast", nodes("Div", x, scale), to=graphs.INT8), scale


def shared_scale(nodes: Nodes, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """One scale for all heads of a position."""
    peak = nodes("ReduceMax", nodes("Abs", x), nodes.ints(2, -1), keepdims=1)
    scale = nodes("Div", peak, nodes.const(127, np.float32))
    shape = nodes("Shape", nodes("ReduceMax", x, nodes.ints(-1), keepdims=1))
    return nodes("Cast", nodes("Round", nodes("Div", x, scale)), to=graphs.INT8), nodes("Expand", scale, shape)


@pytest.mark.parametrize("wrong", [larger_scale, cut_off, shared_scale])
def test_a_wrong_code_or_scale_is_named(
    int8_models: Any, prompts: Any, tmp_path: Path, monkeypatch: Any, wrong: Callable[..., Any]
) -> None:
    monkeypatch.setattr(graphs, "to_codes", wrong)
    export_onnx(int8_models["llama"], tmp_path / "model.onnx", form="custom_op")
    report = check_parity(int8_models["llama"], tmp_path / "model.onnx", prompts=prompts, steps=4)
    found = report.first_diverging
    assert not report.passed
    assert found is not None
    assert found.place == "layers.0.attn int8 cache (key)"
    assert found.node == "Int8Attention 'layers.0.attn.core', output 'present.0.key'"
    # What attention reads is what was written, so all else is right: only the comparison of codes can see it.
    assert report.runtimes[0].logits.rel_rms <= tolerance.LOGITS_REL_RMS


def read_wrongly(model: CompressedModel, path: Path, *, plain: bool) -> None:
    """The graph with attention reading values one percent too large: in layer 1, or where layers share it in all."""
    import onnx

    export_onnx(model, path, form="custom_op", plain=plain)
    proto = onnx.load(path, load_external_data=False)
    graph, name = proto.graph, "present.1.value_scale"
    if not plain:
        graph = next(each for each in proto.functions if each.name == "Int8Attention")
        name = next(node.output[0] for node in graph.node if [*node.input][:1] == ["present_value_scale"])
    at = next(i for i, node in enumerate(graph.node) if node.input[1:2] == [name])
    constant = onnx.helper.make_node("Constant", [], ["factor"], value_float=1.01)
    scaled = onnx.helper.make_node("Mul", [name, "factor"], ["scaled"])
    graph.node[at].input[1] = "scaled"
    graph.node.insert(at, scaled)
    graph.node.insert(at, constant)
    onnx.save(proto, path)


@pytest.mark.parametrize(("plain", "place"), [(True, "layers.1.attn.core"), (False, "layers.0.attn.core")])
def test_reading_with_another_scale_is_named(
    int8_models: Any, prompts: Any, tmp_path: Path, plain: bool, place: str
) -> None:
    read_wrongly(int8_models["llama"], tmp_path / "model.onnx", plain=plain)
    report = check_parity(int8_models["llama"], tmp_path / "model.onnx", prompts=prompts, steps=4)
    assert not report.passed
    assert report.first_diverging is not None
    assert report.first_diverging.place.startswith(place)


def test_a_float_graph_is_not_the_int8_model(models: Any, int8_models: Any, prompts: Any, tmp_path: Path) -> None:
    export_onnx(int8_models["llama"], tmp_path / "model.onnx", form="custom_op")
    report = check_parity(models["llama"], tmp_path / "model.onnx", prompts=prompts, steps=4)
    assert not report.passed
    assert report.runtimes[0].logits.rel_rms > 10 * tolerance.LOGITS_REL_RMS


@pytest.mark.parametrize("name", NAMES)
def test_recorded_vectors_verify(pristine_int8: Any, name: str) -> None:
    report = verify_bundle(pristine_int8[name])
    assert report.passed, report.problems
    assert report.logits_rel_rms is not None
    assert report.logits_rel_rms <= tolerance.LOGITS_REL_RMS
    assert report.greedy is not None
    assert report.greedy.equal == 12


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("written.prefill.0.key_scale", lambda v: v * np.float32(1.01)),
        ("written.padded.2.value", lambda v: np.roll(v, 1, -1)),
        ("written.decode.1.value", lambda v: v + (np.arange(v.size).reshape(v.shape) % 3 == 0).astype(np.int8)),
    ],
    ids=["scale", "other channels", "too many codes"],
)
def test_other_records_do_not_verify(
    pristine_int8: Any, tmp_path: Path, rehash: Any, part: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    folder = Path(shutil.copytree(pristine_int8["llama"], tmp_path / "bundle"))
    vectors = Vectors.load(folder / "vectors.safetensors")
    vectors.tensors[part] = change(vectors.tensors[part])
    vectors.save(folder / "vectors.safetensors")
    rehash(folder)
    report = verify_bundle(folder)
    assert not report.passed
    assert report.first_diverging is not None


def test_records_of_another_cache_are_refused(bundle: Path, pristine_int8: Any, tmp_path: Path, rehash: Any) -> None:
    mixed = Path(shutil.copytree(pristine_int8["llama"], tmp_path / "mixed"))
    shutil.copy(bundle / "vectors.safetensors", mixed)
    shutil.copy(pristine_int8["llama"] / "vectors.safetensors", bundle)
    for folder in (mixed, bundle):
        rehash(folder)
        (problem,) = verify_bundle(folder).problems
        assert problem.place == "vectors.safetensors"
        assert "export the bundle again" in problem.message


def keys(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(2, 2, 30, 16))


def written(x: np.ndarray) -> dict[str, np.ndarray]:
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return {"0.key": np.rint(x / np.maximum(scale, 1e-38)).astype(np.int8), "0.key_scale": scale.astype(np.float32)}


def test_codes_may_flip_where_a_key_lies_between_two(int8_models: Any) -> None:
    spec, x = int8_models["llama"].spec, keys(np.random.default_rng(0))
    step = np.abs(x).max(-1, keepdims=True) / 127
    inner = np.abs(x) < np.abs(x).max(-1, keepdims=True) * 0.99
    x = np.where(inner, (np.floor(x / step) + 0.5) * step * (1 + 1e-9), x)  # every key half-way
    noise = np.random.default_rng(1).normal(size=x.shape) * 1e-8
    near, far = CacheTally(spec), CacheTally(spec)
    near.add({"0.key": x}, written(x + noise))
    assert near.result().flipped > 500
    assert near.result().worst <= 1  # each of them is a rounding
    assert near.result().place == "all"  # but such keys do not come by chance
    far.add({"0.key": x}, written(x + noise * 1e5))
    assert far.result().place == "0.key"
    chance = CacheTally(spec)
    for seed in range(40):
        y = keys(np.random.default_rng(seed))
        chance.add({"0.key": y}, written(y + np.random.default_rng(1000 + seed).normal(size=y.shape) * 3e-6))
    assert chance.result().passed
    assert 0 < chance.result().flipped <= chance.result().most_flipped


def test_rows_of_zeros_and_numbers_that_are_none(int8_models: Any) -> None:
    spec, x = int8_models["llama"].spec, keys(np.random.default_rng(0))
    x[:, 1, :4] = 0
    tally = CacheTally(spec)
    tally.add({"0.key": x}, written(x))
    assert tally.result().passed
    bad = written(x)
    bad["0.key_scale"][0, 0, 0] = np.nan
    tally.add({"0.key": x}, bad)
    assert tally.result().place == "0.key"
    once = CacheTally(spec, slack=WHOLE_STEP)
    once.add(read_back(written(x)), written(x))
    assert once.result().flipped == 0


def test_the_reference_reads_what_it_is_given(int8_models: Any, pristine_int8: Any) -> None:
    ids = np.arange(12, dtype=np.int64)[None]
    reference = TorchRunner(int8_models["llama"])
    free = reference.forward(ids)
    other = {name: np.roll(value, 1, 2) for name, value in free.written.items()}
    assert np.array_equal(reference.forward(ids, given=free.written).logits, free.logits)
    moved = reference.forward(ids, given=other)
    assert not np.allclose(moved.logits, free.logits, rtol=1e-2)
    runner = OrtRunner(pristine_int8["llama"] / "model.onnx", open_cache=True)
    theirs = runner.forward(ids, given=other)
    np.testing.assert_allclose(theirs.logits, moved.logits, rtol=0, atol=1e-4 * np.abs(moved.logits).max())
