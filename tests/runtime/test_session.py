"""The onnxruntime session: cache, masks, positions, and files that are none of ours."""

import numpy as np
import onnx
import pytest

from jpq_export.errors import BundleError, UsageError
from jpq_export.runtime import native
from jpq_export.runtime.session import OrtModel

IDS = np.array([[3, 4, 5, 6, 7, 8]])


def same(got, expected):
    """Equal but for 8-bit rounding of activations, whose scale depends on the other tokens of a pass."""
    return np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.fixture(scope="module")
def exact(bundle_folder):
    return OrtModel(bundle_folder / "model.onnx", threads=1, exact=True)


def test_one_pass_equals_two_with_a_cache(exact):
    whole = exact.forward(IDS).logits
    first = exact.forward(IDS[:, :4])
    second = exact.forward(IDS[:, 4:], past=first.past)
    assert same(np.concatenate([first.logits, second.logits], 1), whole)
    assert second.past["0.key"].shape == (6, 1, 1, 16)
    forgotten = exact.forward(IDS[:, 4:]).logits
    assert not same(forgotten, whole[:, 4:])


def test_only_kept_attention_has_a_cache(exact):
    assert sorted(exact.forward(IDS).past) == ["0.key", "0.value", "2.key", "2.value"]


def test_decoding_step_by_step_equals_one_pass(exact):
    whole, decoding = exact.forward(IDS).logits[0], exact.start()
    assert same(decoding.step([3, 4, 5]), whole[2])
    for position in (3, 4, 5):
        assert same(decoding.step([int(IDS[0, position])]), whole[position])
    assert decoding.length == 6


def test_the_head_reads_what_is_asked_for(exact):
    past = {f"past.{name}": value for name, value in exact.cache.none(1).items()}
    feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "position_ids": np.arange(6)[None]} | past
    whole = exact.forward(IDS).logits
    assert same(exact.session.run(["logits"], feeds)[0], whole)
    for start in (0, 4, 5):
        got = exact.session.run(["logits"], feeds | {"logits_from": np.array([start])})[0]
        assert got.shape == (1, 6 - start, whole.shape[-1])
        assert same(got, whole[:, start:])


def test_sequences_do_not_share_a_cache(exact):
    first, second = exact.start(), exact.start()
    first.step([9, 9, 9])
    assert same(second.step([3, 4]), exact.forward(IDS).logits[0, 1])


def test_a_mask_sets_positions(exact):
    padded = np.array([[0, 0, 3, 4, 5]])
    mask = np.array([[0, 0, 1, 1, 1]])
    assert same(exact.forward(padded, mask).logits[:, 2:], exact.forward(IDS[:, :3]).logits)
    assert not same(exact.forward(padded).logits[:, 2:], exact.forward(IDS[:, :3]).logits)


@pytest.mark.parametrize("start", [0, 20])
def test_positions_beyond_the_last_are_refused(exact, start):
    ids = np.ones((1, 24 - start), np.int64)
    past = exact.forward(np.ones((1, start), np.int64)).past if start else None
    exact.forward(ids, past=past)
    with pytest.raises(UsageError, match="position 24 is beyond the model's 24 positions"):
        exact.forward(np.ones((1, 25 - start), np.int64), past=past)


def test_an_empty_prompt_is_refused(exact):
    with pytest.raises(UsageError, match="no tokens"):
        exact.start().step([])


def test_path_says_what_runs(model, exact, bundle_folder):
    assert model.path == exact.path == "onnxruntime CPU, MatMulNBits, activations in fp32"
    fast = OrtModel(bundle_folder / "model.onnx", threads=1, exact=False)
    assert fast.path == "onnxruntime CPU, MatMulNBits, activations rounded to 8 bits"
    assert exact.path.endswith("activations in fp32")


def test_a_file_that_is_no_graph(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(BundleError, match="onnxruntime cannot load it"):
        OrtModel(tmp_path / "model.onnx")


def test_a_missing_file(tmp_path):
    with pytest.raises(BundleError, match="onnxruntime cannot load it"):
        OrtModel(tmp_path / "model.onnx")


def test_missing_weights(bundle_folder, tmp_path):
    (tmp_path / "model.onnx").write_bytes((bundle_folder / "model.onnx").read_bytes())
    with pytest.raises(BundleError, match="onnxruntime cannot load it"):
        OrtModel(tmp_path / "model.onnx")


@pytest.mark.parametrize("text", [None, "", "{}", '{"layers": 3}', "[]"])
def test_a_graph_of_someone_else(tmp_path, text):
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [out])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    if text is not None:
        onnx.helper.set_model_props(proto, {"jpq.spec": text, "jpq.unfused": "[]"})
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(BundleError, match="not written by jpq-export"):
        OrtModel(tmp_path / "model.onnx")


@pytest.mark.parametrize(("asked", "rounded"), [(None, "int16"), ("16", "int16"), ("8", "int8")])
def test_fast_rounds_as_the_environment_asks(monkeypatch, asked, rounded):
    monkeypatch.delenv("JPQ_FAST_BITS", raising=False)
    if asked:
        monkeypatch.setenv("JPQ_FAST_BITS", asked)
    assert native.fast_activations() == rounded


def test_fast_with_other_bits_is_refused(monkeypatch):
    monkeypatch.setenv("JPQ_FAST_BITS", "4")
    with pytest.raises(UsageError, match="JPQ_FAST_BITS=4: expected 16 or 8"):
        native.fast_activations()
