"""The encoder's bench: its rivals compute the original, its numbers are medians, its quality is the evaluator's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from jpq_export.bench import encoders
from jpq_export.bench.baselines import random_model
from jpq_export.bench.encoder_baselines import FP32, INT8, original_weights, write_encoder_baselines
from jpq_export.bench.encoder_report import encoder_page
from jpq_export.bench.encoders import EncoderSettings, EncoderSpeed, bench_encoder
from jpq_export.bench.energy import Meters
from jpq_export.cli import main
from jpq_export.errors import UsageError
from jpq_export.format.bundle import Manifest, write_manifest
from jpq_export.format.encoder_spec import EncoderSpec
from jpq_export.format.plan import Budget, LayerPlan, Plan, Predicted
from jpq_export.lower.export import export_onnx
from jpq_export.progress import Stages
from jpq_export.runtime.encoder import OrtEncoder
from jpq_export.runtime.session import open_session

PAIRS = "A man eats.,A man is eating.,4.8\nA dog runs.,The stock fell.,0.2\nRain falls.,It is raining.,4\n"
ROWS = [[5, 70, 71], [9, 10, 11, 12, 13, 14]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, save_encoder: Callable[..., Path]) -> Path:
    """A bundle of random codes whose manifest names a tiny BERT as its original."""
    from jpq_export.compress.load import load_model

    root = tmp_path_factory.mktemp("encoder-bench")
    loaded = load_model(str(save_encoder(root / "model", "bert")))
    spec, folder = loaded.spec, root / "tiny"
    folder.mkdir()
    export_onnx(random_model(spec), folder / "model.onnx", form="custom_op")
    layers = tuple(LayerPlan(i, tuple(range(x.kv_heads)), x.kv_heads, x.ffn, x.ffn) for i, x in enumerate(spec.layers))
    plan = Plan("tiny", "00", "cpu", "rtn", Budget("bits", 4.0, 1), layers, (), (), Predicted(0.0, 1, 1.0, 0.0), (), {})
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    (folder / "tokenizer.json").write_bytes(loaded.tokenizer_json)
    facts = {"name": "tiny", "source": str(root / "model"), "spec": json.loads(spec.to_json())}
    sizes = {"bits_per_weight": 4.5, "weight_bytes": 77, "original_bytes": 99}
    manifest = Manifest(model=facts, target={"name": "cpu"}, method="rtn", kind="encoder", **sizes)
    write_manifest(folder, manifest.with_contents(folder))
    return folder


def vectors(path: Path) -> np.ndarray:
    return OrtEncoder(path, open_session(path, threads=1, exact=True, device="cpu")[0]).embed(ROWS)


def test_the_rivals_compute_the_original(save_encoder: Callable[..., Path], tmp_path: Path) -> None:
    import torch

    from jpq_export.compress.load import load_model

    source = str(save_encoder(tmp_path / "model", "mpnet"))
    loaded = load_model(source)
    assert isinstance(loaded.spec, EncoderSpec)
    graphs = write_encoder_baselines(loaded.spec, tmp_path, weights=original_weights(source, loaded.spec))
    with torch.no_grad():
        expected = np.concatenate([loaded.model(torch.tensor([row])).numpy() for row in ROWS])
    np.testing.assert_allclose(vectors(graphs[FP32]), expected, atol=1e-5)  # fp32, two sums in another order
    assert 1e-4 < np.abs(vectors(graphs[INT8]) - expected).max() < 0.5  # 8 bits: near, and not the same
    (tmp_path / "twin").mkdir()
    twin = write_encoder_baselines(loaded.spec, tmp_path / "twin")  # random weights
    assert not np.allclose(vectors(twin[FP32]), expected, atol=1e-5)


def test_another_model_is_no_original(save_encoder: Callable[..., Path], bundle: Path, tmp_path: Path) -> None:
    source = str(save_encoder(tmp_path / "model", "mpnet", intermediate_size=32))
    spec = random_spec(bundle)
    with pytest.raises(UsageError, match="no longer the model"):
        original_weights(source, spec)


def random_spec(bundle: Path) -> EncoderSpec:
    from jpq_export.format.encoder_spec import spec_from_json

    spec = spec_from_json(json.dumps(json.loads((bundle / "manifest.json").read_text())["model"]["spec"]))
    assert isinstance(spec, EncoderSpec)
    return spec


def test_a_bundle_is_measured_with_its_quality(bundle: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "p.csv"
    pairs.write_text(PAIRS, encoding="utf-8")
    out, html = tmp_path / "out.json", tmp_path / "out.html"
    options = ["--rounds", "1", "--batch", "2", "--pairs", str(pairs), "--json", str(out), "--html", str(html)]
    done = CliRunner().invoke(main, ["bench", str(bundle), str(bundle), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    raw = json.loads(out.read_text())
    assert raw["format"] == encoders.FORMAT
    assert (set(raw["bundle"]), set(raw["compared"])) == ({"jpq", "jpq-fast"}, {"B: tiny", "B: tiny-fast"})
    assert set(raw["baselines"]) == {FP32, INT8}
    evaluated = CliRunner().invoke(main, ["eval", str(bundle), "--pairs", str(pairs)], catch_exceptions=False)
    spearman = json.loads(evaluated.output[evaluated.output.index("{") :])["spearman"]
    assert raw["bundle"]["jpq"]["spearman"] == pytest.approx(spearman, abs=1e-6)
    original = json.loads((bundle / "manifest.json").read_text())["model"]["source"]
    evaluated = CliRunner().invoke(main, ["eval", original, "--pairs", str(pairs)], catch_exceptions=False)
    expected = json.loads(evaluated.output[evaluated.output.index("{") :])["spearman"]
    assert raw["baselines"][FP32]["spearman"] == pytest.approx(expected, abs=1e-6)
    for row in (raw["bundle"] | raw["baselines"]).values():
        assert row["single_per_s"] > 1
        assert row["latency_p99_ms"] >= row["latency_p50_ms"] > 0
        assert row["peak_rss_bytes"] > 1e7
    assert "p.csv" in html.read_text()


def test_numbers_are_medians_over_turns(tmp_path: Path) -> None:
    class Known:
        file_bytes = 7

        def __init__(self, *seconds: float) -> None:
            self.turns = iter((1.0, *seconds))

        def ask(self, **job: Any) -> Any:
            if "memory" in job:
                return {"peak_rss_bytes": 5, "runs": "known"}
            if job["embed"][1] == 1:
                self.now = next(self.turns)
                return {"seconds": [self.now] * 3}
            return {"seconds": [self.now, self.now]}

    worker = Known(0.1, 0.2, 900.0)
    settings = EncoderSettings(rounds=3, batch=2)
    (times,) = encoders.take_turns(
        {"a": worker}, [[1]] * 3, tmp_path, settings, lambda done, total: None, meters=Meters()
    ).values()
    speed = encoders._speed(worker, times, 3, None)
    assert speed.single_per_s == pytest.approx(1 / 0.2)
    assert speed.batch_per_s == pytest.approx(3 / 0.4)
    assert speed.latency_p50_ms == pytest.approx(200)
    assert speed.latency_p99_ms > 8e5
    assert speed.spearman is None
    assert speed.joules_per_text is None


def test_texts_are_as_long_as_sentences(bundle: Path) -> None:
    spec = random_spec(bundle)
    rows = encoders.random_rows(spec)
    assert sorted({len(row) for row in rows}) == sorted(set(encoders.LENGTHS))
    assert all(token != spec.pad_id for row in rows for token in row)
    assert max(map(len, encoders.random_rows(replace(spec, max_positions=20)))) == 20
    assert [len(row) for row in encoders._spread([[0] * n for n in range(1, 9)], 4)] == [1, 3, 5, 7]


def test_what_does_not_fit_is_said(bundle: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["bench", str(bundle), "--widths", "4,3"])
    assert done.exit_code == 2
    assert "--widths: for a language model" in done.output
    other = tmp_path / "decoder"
    other.mkdir()
    write_manifest(
        other,
        Manifest(model={}, target={}, method="rtn", bits_per_weight=4, weight_bytes=1, original_bytes=1),
    )
    with pytest.raises(UsageError, match="bundles of one kind"):
        bench_encoder(bundle, EncoderSettings(other=other), Stages())
    done = CliRunner().invoke(main, ["bench", str(other), "--pairs", "x.csv"])
    assert "--pairs: for a sentence encoder" in done.output


def test_the_page_escapes_and_says_what_was_measured() -> None:
    speed = EncoderSpeed(10.0, 20.0, 1.0, 2.0, 10**8, 10**6, None, "x")
    result = encoders.EncoderBench(EncoderSettings(), "chip", 5, 12.0, {"jpq": speed}, {}, {FP32: speed})
    page = encoder_page([result], "a <b>")
    assert "a &lt;b&gt;" in page
    assert page.count(f">{FP32}<") == 5
    assert "Spearman" not in page
