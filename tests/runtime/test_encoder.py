"""Sentence encoders: order, batches, padding, what is refused; `run` prints vectors and similarities."""

import json
import shutil

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

from jpq_export.cli import main
from jpq_export.errors import BundleError, CapacityError, UsageError
from jpq_export.runtime import load

TEXTS = ["w3 w4", "w9", "w1 w2 w3 w4 w5 w6", "w30 w31", "w3 w4"]


@pytest.fixture(scope="module")
def encoder(encoder_folder):
    return load(encoder_folder, threads=1)


def table_mean(folder, ids):
    """The same in numpy."""
    graph = onnx.load(folder / "model.onnx").graph
    table = next(onnx.numpy_helper.to_array(each) for each in graph.initializer if each.name == "table")
    mean = table[ids].sum(0)
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_embeddings_stand_in_the_order_given(encoder, encoder_folder, batch_size):
    got = encoder.embed(TEXTS, batch_size=batch_size)
    assert (got.shape, got.dtype) == ((5, 8), np.float32)
    expected = [table_mean(encoder_folder, [int(word[1:]) + 2 for word in text.split()]) for text in TEXTS]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert np.abs(got - np.roll(expected, 1, axis=0)).max() > 0.1  # twin: another order


def test_no_texts(encoder):
    assert encoder.embed([]).shape == (0, 8)


@pytest.mark.parametrize(
    ("texts", "error", "says"),
    [
        (["w3", ""], UsageError, "text 1 has no tokens"),
        (["w3", "w3 " * 17], CapacityError, "text 1 has 17 tokens, expected at most 16"),
        (["\ud800"], UsageError, "not valid Unicode"),
        ("w3", UsageError, r"got one string, expected a list of texts; give \[text\]"),
    ],
)
def test_refused_texts(encoder, texts, error, says):
    with pytest.raises(error, match=says):
        encoder.embed(texts)
    assert encoder.embed(["w3 " * 16]).shape == (1, 8)


def test_a_smaller_capacity_holds(encoder):
    with pytest.raises(CapacityError, match="3 tokens, expected at most 2"):
        encoder.with_capacity(2).embed(["w1 w2 w3"])
    assert encoder.with_capacity(2).embed(["w1 w2"]).shape == (1, 8)


def test_a_batch_size_of_nothing(encoder):
    with pytest.raises(UsageError, match="batch_size: got 0"):
        encoder.embed(["w3"], batch_size=0)


def test_each_kind_refuses_what_it_cannot_do(encoder, bundle_folder):
    with pytest.raises(UsageError, match=r"sentence encoder, it generates no text; use embed\(\)"):
        encoder.generate("w3")
    with pytest.raises(UsageError, match="it has no embeddings"):
        load(bundle_folder).embed(["w3"])


def test_run_prints_a_vector_or_a_similarity(encoder, encoder_folder):
    one = CliRunner().invoke(main, ["run", str(encoder_folder), "w3 w4"])
    np.testing.assert_allclose(json.loads(one.stdout), encoder.embed(["w3 w4"])[0], atol=1e-6)
    two = CliRunner().invoke(main, ["run", str(encoder_folder), "w3 w4", "w9"])
    vectors = encoder.embed(["w3 w4", "w9"])
    assert float(two.stdout) == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-5)
    three = CliRunner().invoke(main, ["run", str(encoder_folder), "w1", "w2", "w3"])
    assert three.exit_code == 2
    assert "got 3 prompts" in three.stderr


def test_run_takes_one_prompt_of_a_generator(bundle_folder):
    done = CliRunner().invoke(main, ["run", str(bundle_folder), "w1", "w2"])
    assert done.exit_code == 2
    assert "got 2 prompts; put one into quotes" in done.stderr


def test_a_tokenizer_neither_cuts_nor_fills_up(encoder, encoder_folder, tmp_path):
    """As sentence-transformers stores them."""
    own = shutil.copytree(encoder_folder, tmp_path / "own")
    stored = json.loads((own / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    stored["padding"] = {
        "strategy": {"Fixed": 6}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 9, "pad_type_id": 0,
        "pad_token": "w7",
    }  # fmt: skip
    (own / "tokenizer.json").write_text(json.dumps(stored))
    np.testing.assert_array_equal(load(own, threads=1).embed(TEXTS), encoder.embed(TEXTS))
    assert len(Tokenizer.from_file(str(own / "tokenizer.json")).encode("w3").ids) == 6  # twin: stored, it does


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda proto: proto.ClearField("metadata_props"), "not written by jpq-export"),
        (lambda proto: onnx.helper.set_model_props(proto, {"jpq.spec": "[]"}), "not written by jpq-export"),
        (lambda proto: proto.graph.input.add().CopyFrom(extra_input()), "no sentence encoder; expected inputs"),
    ],
)
def test_a_graph_of_someone_else(encoder_folder, tmp_path, change, says):
    from jpq_export.runtime.encoder import OrtEncoder
    from jpq_export.runtime.session import open_session

    proto = onnx.load(encoder_folder / "model.onnx")
    change(proto)
    onnx.save(proto, tmp_path / "model.onnx")
    session, _ = open_session(tmp_path / "model.onnx", threads=1, exact=True)
    with pytest.raises(BundleError, match=says):
        OrtEncoder(tmp_path / "model.onnx", session)


def extra_input():
    return onnx.helper.make_tensor_value_info("token_type_ids", onnx.TensorProto.INT64, ["B", "T"])
