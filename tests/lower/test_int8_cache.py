"""The int8 cache of the graph: codes and scales bit for bit as in PyTorch, and nothing depends on how a text is cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from jpq_export.compress import int8_cache as pytorch
from jpq_export.compress.decoder import KVCache
from jpq_export.compress.student import dequantized
from jpq_export.errors import TargetError
from jpq_export.format.compressed import CompressedModel
from jpq_export.format.spec import INT8_CACHE, ModelSpec
from jpq_export.lower import int8_cache
from jpq_export.lower.export import export_onnx
from jpq_export.lower.nodes import Nodes
from jpq_export.numerics import reference
from jpq_export.runtime.session import OrtModel

IDS = np.random.default_rng(5).integers(0, 96, (1, 23))
CLOSE = 1e-4  # the product's promise for logits, relative RMS; far below what one wrong scale does (0.5%)


def rel_rms(expected: np.ndarray, got: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "gemma3", "gpt2", "pruned"])
def model(request: Any, conftest_of: Any) -> CompressedModel:
    tiny = conftest_of("lower")
    return tiny.random_model(replace(tiny.SPECS[request.param], kv_cache=INT8_CACHE))


@pytest.fixture(scope="module", params=["growing", "standard", "body"])
def runtime(request: Any, model: CompressedModel, tmp_path_factory: Any) -> OrtModel:
    """In place, in the older layout of standard operators, and in place without our kernels."""
    path = tmp_path_factory.mktemp("int8") / "model.onnx"
    export_onnx(model, path, form="qdq", plain=request.param == "standard")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "body":
            patch.setenv("JPQ_KERNELS", "off")
        runtime = OrtModel(path, threads=1)
    assert runtime.cache.time_first == (request.param != "standard")
    return runtime


def test_logits_and_cache_are_pytorchs(model: CompressedModel, runtime: OrtModel) -> None:
    decoder, cache = dequantized(model), KVCache()
    with torch.no_grad():
        expected = decoder(torch.from_numpy(IDS), cache=cache).numpy()
    out = runtime.forward(IDS)
    assert rel_rms(expected, out.logits) < CLOSE
    for layer, pair in cache.layers.items():
        for part, kept in zip(("key", "value"), pair, strict=True):
            stored = (out.past[f"{layer}.{name}"] for name in (part, f"{part}_scale"))
            codes, scales = (runtime.cache.rows(tensor).swapaxes(1, 2) for tensor in stored)
            assert codes.dtype == np.int8
            assert np.abs(codes).max() == 127  # every row uses the whole range
            np.testing.assert_allclose(codes * scales, kept.numpy(), rtol=0, atol=CLOSE * float(kept.abs().max()))
    decoder.stored = None  # the twin: a float cache is another model
    with torch.no_grad():
        floating = decoder(torch.from_numpy(IDS)).numpy()
    assert rel_rms(floating, out.logits) > 5 * CLOSE


def test_a_text_may_be_read_in_any_parts(runtime: OrtModel) -> None:
    whole = runtime.forward(IDS)
    past, rows = None, []
    for part in np.split(IDS, [1, 2, 9, 22], axis=1):
        out = runtime.forward(part, past=past)
        past = out.past
        rows.append(out.logits)
    assert rel_rms(whole.logits, np.concatenate(rows, 1)) < CLOSE
    assert past is not None
    assert past.keys() == whole.past.keys()
    wrong = {name: value * np.float32(1.01) if "scale" in name else value for name, value in past.items()}
    step = np.full((1, 1), 7)
    assert rel_rms(runtime.forward(step, past=past).logits, runtime.forward(step, past=wrong).logits) > CLOSE


def test_padding_on_the_left_changes_nothing(runtime: OrtModel) -> None:
    ids, mask = np.zeros((2, 13), np.int64), np.ones((2, 13), np.int64)
    ids[0], ids[1, 5:], mask[1, :5] = IDS[0, :13], IDS[0, :8], 0
    first = runtime.forward(ids[:, :11], mask[:, :11])
    second = runtime.forward(ids[:, 11:], mask, past=first.past)
    alone = runtime.forward(IDS[:, :8]).logits[0, 6:]
    assert rel_rms(alone, second.logits[1]) < CLOSE
    assert rel_rms(alone, second.logits[0]) > CLOSE


def run(build: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import onnxruntime

    nodes, value = Nodes(), ir.Value(name="x", shape=ir.Shape(x.shape), type=ir.TensorType(ir.DataType.FLOAT))
    codes, scale = build(nodes, value)
    codes.type, scale.type = ir.TensorType(ir.DataType.INT8), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([value], [codes, scale], nodes=nodes.nodes, opset_imports={"": 23}, name="codes")
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    got, steps = session.run(None, {"x": x})
    return np.asarray(got), np.asarray(steps)


def test_codes_are_pytorchs_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4, 3, 50, 64)) * np.exp(rng.normal(size=(4, 3, 50, 1)) * 8)).astype(np.float32)
    expected, scales = (part.numpy() for part in pytorch.to_codes(torch.from_numpy(x)))
    codes, steps = run(int8_cache.to_codes, x)
    assert np.array_equal(codes, expected)
    assert np.array_equal(steps, scales)
    for got, wanted in zip(reference.int8_codes(x), (codes, steps), strict=True):
        assert np.array_equal(got, wanted)
    assert np.abs(codes.astype(int)).max() == 127
    assert not np.array_equal(run(int8_cache.to_codes, x * np.float32(1.001))[1], scales)


def test_ties_go_to_even_and_zeros_stay_zero() -> None:
    x = np.zeros((1, 1, 3, 8), np.float32)
    x[0, 0, 0] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 3]
    x[0, 0, 2] = np.float32(1e-44)  # below the smallest normal number
    codes, scales = run(int8_cache.to_codes, x)
    expected, _ = pytorch.to_codes(torch.from_numpy(x))
    assert codes[0, 0, 0].tolist() == [127, 0, 2, 2, 0, -2, -126, 3]  # half up: 1, 2, 3, ...
    assert np.array_equal(codes[0, 0, :2], expected[0, 0, :2].numpy())
    assert not codes[0, 0, 1:].any()
    assert scales[0, 0, 1] == 0
    assert np.isfinite(codes * scales).all()


@pytest.mark.parametrize(("form", "tensorrt"), [("signed", None), ("custom_op", "10.3"), ("custom_op", "10.15")])
def test_graphs_for_tensorrt_refuse_it(model: CompressedModel, tmp_path: Path, form: Any, tensorrt: Any) -> None:
    with pytest.raises(TargetError, match=r"graph\.onnx: TensorRT's graphs keep a float cache; .*--kv-cache float"):
        export_onnx(model, tmp_path / "graph.onnx", form=form, tensorrt=tensorrt)
    assert not list(tmp_path.iterdir())


def test_the_record_of_a_model_names_an_int8_cache_only(model: CompressedModel) -> None:
    spec = model.spec
    assert isinstance(spec, ModelSpec)
    assert ModelSpec.from_json(spec.to_json()) == spec
    plain = replace(spec, kv_cache="float")
    assert "kv_cache" not in plain.to_json()
    assert ModelSpec.from_json(plain.to_json()) == plain
    with pytest.raises(ValueError, match="kv_cache: expected one of float, int8, got 'int4'"):
        replace(spec, kv_cache="int4")
