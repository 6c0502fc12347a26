"""check_parity: passes on a right graph of every shape, and fails, naming the place, on each kind of wrong one."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jpq_export.errors import BundleError
from jpq_export.format.compressed import CompressedModel
from jpq_export.lower.export import export_onnx
from jpq_export.lower.weights import Form
from jpq_export.numerics.affine import QuantizedWeight, store
from jpq_export.parity import check, tolerance
from jpq_export.parity.cases import make_cases
from jpq_export.parity.check import check_parity
from jpq_export.parity.compare import LogitsError
from jpq_export.parity.result import GreedyResult


@pytest.mark.parametrize(("form", "chained"), [("custom_op", False), ("qdq", False), ("custom_op", True)])
@pytest.mark.parametrize("name", ["llama", "pruned", "gemma"])
def test_a_right_graph_passes(models, prompts, tmp_path: Path, name: str, form: Form, chained: bool):
    export_onnx(models[name], tmp_path / "model.onnx", form=form, chained=chained)
    calls = []
    report = check_parity(
        models[name],
        tmp_path / "model.onnx",
        prompts=prompts,
        steps=64,
        form=form,
        progress=lambda done, total: calls.append((done, total)),
    )
    (runtime,) = report.runtimes
    assert report.passed
    assert runtime.logits.rel_rms <= tolerance.LOGITS_REL_RMS
    assert runtime.greedy == GreedyResult(64, 64)
    assert runtime.first_diverging is None
    expected = ["prefill", "padded batch", *(["sliding window"] if name == "gemma" else []), "decode"]
    assert [case.name for case in runtime.cases] == expected
    spec = models[name].spec
    sublayers = sum((layer.kv_heads > 0) + (layer.ffn > 0) for layer in spec.layers)
    assert len(runtime.layers) == sublayers + 3  # embed, norm and logits
    assert calls[-1][0] <= calls[-1][1]
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_json_is_complete_and_reproducible(models, prompts, tmp_path: Path):
    export_onnx(models["llama"], tmp_path / "model.onnx", form="custom_op")
    texts = [check_parity(models["llama"], tmp_path / "model.onnx", prompts=prompts, steps=8).to_json() for _ in "ab"]
    assert texts[0] == texts[1]
    raw = json.loads(texts[0])
    runtime = raw["runtimes"][0]
    assert raw["passed"] is True
    assert {"name", "logits", "greedy_tokens_equal", "first_diverging", "layers", "cases"} <= runtime.keys()
    assert {"rel_rms", "max_abs", "kl_mean", "top1_agreement"} <= runtime["logits"].keys()
    assert runtime["greedy_tokens_equal"] is True
    assert raw["as_run"]["judged_by"] == "effect"  # 8-bit activations: a price beside the proof


def with_weight(model: CompressedModel, name: str, **changes: np.ndarray) -> CompressedModel:
    return replace(model, quantized={**model.quantized, name: replace(model.quantized[name], **changes)})


def flipped(weight: QuantizedWeight) -> np.ndarray:
    packed = weight.packed.copy()
    packed[3, 5] ^= 0x10
    return packed


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layers.1.mlp.up", lambda w: {"packed": flipped(w)}),
        ("layers.2.attn.v", lambda w: {"packed": flipped(w)}),
        ("layers.0.mlp.down", lambda w: {"packed": flipped(w)}),
        ("layers.1.mlp.gate", lambda w: {"scales": np.roll(w.scales, 1, axis=1)}),
        ("layers.0.attn.k", lambda w: {"packed": np.roll(w.packed, 16, 0), "scales": np.roll(w.scales, 16, 0)}),
    ],
    ids=["flip up", "flip v", "flip down", "shifted scales", "swapped heads"],
)
def test_a_wrong_weight_is_named(models, prompts, tmp_path: Path, name: str, change):
    model = models["llama"]
    export_onnx(with_weight(model, name, **change(model.quantized[name])), tmp_path / "model.onnx", form="custom_op")
    report = check_parity(model, tmp_path / "model.onnx", prompts=prompts, steps=8)
    assert not report.passed
    found = report.runtimes[0].first_diverging
    assert found is not None
    assert found.place == name
    assert found.sublayer == name.rsplit(".", 1)[0]
    assert name in found.node
    assert json.loads(report.to_json())["runtimes"][0]["first_diverging"] == name


@pytest.mark.parametrize("name", ["layers.0.mlp.up", "layers.0.attn.o", "layers.1.mlp.down", "layers.1.attn.k"])
def test_one_wrong_code_inside_a_chain_is_found_in_its_sublayer(models, prompts, tmp_path: Path, name: str):
    model = models["llama"]
    wrong = with_weight(model, name, packed=flipped(model.quantized[name]))
    export_onnx(wrong, tmp_path / "model.onnx", form="custom_op", chained=True)
    report = check_parity(model, tmp_path / "model.onnx", prompts=prompts, steps=8)
    assert not report.passed
    found = report.runtimes[0].first_diverging
    assert found is not None
    assert found.sublayer == name.rsplit(".", 1)[0]
    assert "LowBitChain" in found.node


@pytest.mark.parametrize(
    ("vector", "place"),
    [
        ("layers.0.attn.q_norm", "layers.0.attn.q_norm"),
        ("layers.1.attn_norm", "layers.1.attn_norm"),
        ("layers.1.mlp_post_norm", "layers.1.mlp_post_norm"),
        ("norm", "norm"),
    ],
)
def test_a_wrong_norm_is_named(models, prompts, tmp_path: Path, vector: str, place: str):
    model = models["gemma"]
    wrong = replace(model, vectors={**model.vectors, vector: np.roll(model.vectors[vector], 1)})
    export_onnx(wrong, tmp_path / "model.onnx", form="custom_op")
    report = check_parity(model, tmp_path / "model.onnx", prompts=prompts, steps=4)
    assert report.first_diverging is not None
    assert report.first_diverging.place == place


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: replace(spec, attention_scale=spec.attention_scale * 1.01),
        lambda spec: replace(spec, ropes=(replace(spec.ropes[0], scaling=1.01),)),
    ],
    ids=["scale", "rope"],
)
def test_wrong_attention_is_named(models, prompts, tmp_path: Path, change):
    model = models["llama"]
    export_onnx(replace(model, spec=change(model.spec)), tmp_path / "model.onnx", form="custom_op")
    report = check_parity(model, tmp_path / "model.onnx", prompts=prompts, steps=4)
    assert report.first_diverging is not None
    assert report.first_diverging.place.startswith("layers.0.attn.core")


def test_a_forgotten_window_fails_in_the_long_case_only(models, prompts, tmp_path: Path):
    model = models["gemma"]
    wide = replace(model.spec, layers=tuple(replace(layer, window=60) for layer in model.spec.layers))
    narrow = replace(model, spec=replace(wide, layers=(replace(wide.layers[0], window=61), *wide.layers[1:])))
    export_onnx(narrow, tmp_path / "model.onnx", form="custom_op")
    report = check_parity(replace(model, spec=wide), tmp_path / "model.onnx", prompts=prompts, steps=4)
    assert {c.name: c.passed for c in report.runtimes[0].cases} == {
        "prefill": True,
        "padded batch": True,
        "sliding window": False,
        "decode": True,
    }
    assert not report.passed


def test_wrong_head_is_named(models, prompts, tmp_path: Path):
    model = models["pruned"]
    head = model.quantized["head"]
    wrong = with_weight(model, "head", scales=np.roll(head.scales, 1, axis=1))
    export_onnx(wrong, tmp_path / "model.onnx", form="custom_op")
    report = check_parity(model, tmp_path / "model.onnx", prompts=prompts, steps=4)
    assert report.first_diverging is not None
    assert report.first_diverging.place.startswith("logits")


@pytest.fixture
def rounding_model(models):
    """One whose linears round what they read to 8 bits."""
    model = models["pruned"]
    return replace(model, spec=replace(model.spec, activations="int8"))


def test_a_model_that_rounds_activations_passes(rounding_model, prompts, tmp_path: Path):
    export_onnx(rounding_model, tmp_path / "model.onnx", form="custom_op")
    report = check_parity(rounding_model, tmp_path / "model.onnx", prompts=prompts, steps=16)
    (runtime,) = report.runtimes
    assert report.passed
    assert runtime.first_diverging is None
    assert runtime.logits.rel_rms <= tolerance.logits(rounding_model.spec)


@pytest.mark.parametrize("name", ["layers.0.attn.k", "layers.1.mlp.down", "head"])
def test_one_wrong_code_of_it_is_named(rounding_model, prompts, tmp_path: Path, name: str):
    """Its logits may differ by 10%; what a single code does to them is far below that."""
    weight = rounding_model.quantized[name]
    codes = weight.codes()
    codes[3, 5] ^= 1
    wrong = store(codes, weight.scales, None, weight.scheme)
    damaged = replace(rounding_model, quantized=rounding_model.quantized | {name: wrong})
    export_onnx(damaged, tmp_path / "model.onnx", form="custom_op")
    report = check_parity(rounding_model, tmp_path / "model.onnx", prompts=prompts, steps=4)
    assert not report.passed
    assert report.first_diverging is not None
    assert report.first_diverging.place.startswith("logits" if name == "head" else name)


def test_a_tie_is_what_rounding_explains():
    assert GreedyResult(64, 10, margin=1e-5, rounding=2e-4).tie
    assert not GreedyResult(64, 10, margin=1e-3, rounding=2e-4).tie
    assert not GreedyResult(64, 64).tie


def test_bounds_of_logits(models):
    spec = models["llama"].spec
    good = LogitsError(1e-5, 1e-3, 1e-10, 1e-9, 1.0)
    assert check.within(good, spec, judge="rounding")
    assert not check.within(replace(good, rel_rms=2e-4), spec, judge="rounding")
    assert not check.within(replace(good, kl_mean=2e-6), spec, judge="rounding")
    assert check.within(replace(good, rel_rms=0.05), spec, judge="effect")
    assert not check.within(replace(good, rel_rms=1.0), spec, judge="effect")


def test_not_one_of_ours(models, prompts, tmp_path: Path):
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 64)
    with pytest.raises(BundleError, match="not a readable ONNX file"):
        check_parity(models["llama"], tmp_path / "model.onnx", prompts=prompts)


def test_cases_pad_on_the_left_and_refuse_foreign_tokens(models):
    spec = models["gemma"].spec
    cases = make_cases([[1, 2, 3], [4] * 30, [5]], spec)
    assert cases.mask.sum(-1).tolist() == [9, 15, 21]
    assert (np.diff(cases.mask, axis=-1) >= 0).all()
    assert cases.long is not None
    assert cases.long.shape == (1, 8 + check.CHUNK)
    for wrong in ([], [[]], [[96]], [[-1]]):
        with pytest.raises(ValueError, match="token ids"):
            make_cases(wrong, spec)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_half_precision_graph_is_judged_by_bounds_of_its_own(whole_models, prompts, tmp_path: Path, name: str):
    model = whole_models[name]
    export_onnx(model, tmp_path / "model.onnx", form="custom_op")
    export_onnx(model, tmp_path / "half.onnx", form="signed")
    options = {"prompts": prompts, "steps": 12, "half_path": tmp_path / "half.onnx"}
    exact, half = check_parity(model, tmp_path / "model.onnx", **options).runtimes
    assert exact.passed
    assert half.passed
    assert half.judged_by == "half"
    assert tolerance.LOGITS_REL_RMS < half.logits.rel_rms <= tolerance.half(model.spec)
    assert [case.name for case in half.cases] == [case.name for case in exact.cases]
    wrong = dict(model.quantized)
    weight = wrong["layers.1.mlp.down"]
    shifted = np.ascontiguousarray(np.roll(weight.scales, 1, axis=1))  # the twin: one matrix with its scales shifted
    wrong["layers.1.mlp.down"] = QuantizedWeight(weight.scheme, weight.shape, weight.packed, shifted)
    export_onnx(CompressedModel(model.spec, wrong, model.vectors), tmp_path / "half.onnx", form="signed")
    report = check_parity(model, tmp_path / "model.onnx", **options)
    assert [runtime.passed for runtime in report.runtimes] == [True, False]
    assert not report.passed
