"""A whole export of a sentence encoder by the command line: bundle, verify, eval; and what it refuses."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

from jpq_export.cli import main
from jpq_export.compress import effort
from jpq_export.format.bundle import check_hashes, read_manifest

SHORT = effort.Effort("quick", 2, 2, 64, 1, 4, 2, (("removal", (float("inf"),)),))
PAIRS = "A man eats.,A man is eating.,4.8\nA dog runs.,The stock fell.,0.2\nRain falls.,It is raining.,4\n"


def command(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, save_encoder: Callable[..., Path]) -> Callable[..., Any]:
    """Run the command on a tiny MPNet; gives click's result and the bundle folder."""
    root = tmp_path_factory.mktemp("encoder-export")
    model = save_encoder(root / "model", "mpnet")

    def run(target: str, *options: str) -> tuple[Any, Path]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(effort.EFFORTS, "quick", SHORT)
            patch.setenv("JPQ_CACHE", str(root / "cache"))
            out = root / f"bundle-{target}"
            done = command(str(model), "--target", target, "--out", str(out), "--effort", "quick", "--force", *options)
        return done, out

    return run


def test_a_bundle_of_an_encoder(export: Callable[..., Any], tmp_path: Path) -> None:
    done, out = export("cpu", "--bits", "6")
    assert done.exit_code == 0, done.output
    manifest = read_manifest(out)
    assert check_hashes(out, manifest) == []
    assert manifest.kind == "encoder"
    assert manifest.bits_per_weight <= 6
    assert manifest.quality is not None
    assert 0 < manifest.quality["distance_mean"] < 0.5
    assert json.loads((out / "parity.json").read_text())["passed"]
    page = (out / "parity.html").read_text()
    assert "parity passed" in page
    assert command("report", str(out)).exit_code == 0
    assert (out / "parity.html").read_text() == page
    assert check_hashes(out, read_manifest(out)) == []
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    assert [(i.name, i.type) for i in session.get_inputs()] == [
        ("input_ids", "tensor(int64)"),
        ("attention_mask", "tensor(int64)"),
    ]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("embedding", ["batch", 64])]
    ids = np.array([[256, 70, 71, 72]], np.int64)
    (vector,) = session.run(["embedding"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    assert np.linalg.norm(np.asarray(vector)) == pytest.approx(1, abs=1e-5)

    assert "are as exported" in command("verify", str(out)).output
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(PAIRS, encoding="utf-8")
    measured = command("eval", str(out), "--pairs", str(pairs), "--json", str(tmp_path / "found.json"))
    assert measured.exit_code == 0, measured.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["pairs"], found["queries"], found["corpus"]) == (3, 2, 3)
    assert -1 <= found["spearman"] <= 1

    data = out / "model.onnx.data"
    damaged = bytearray(data.read_bytes())
    damaged[len(damaged) // 2] ^= 0x55
    data.write_bytes(bytes(damaged))
    assert command("verify", str(out)).exit_code == 1


def test_a_stopped_export_has_the_quality_of_its_bundle(export: Callable[..., Any], tmp_path: Path) -> None:
    pairs, found = tmp_path / "pairs.csv", tmp_path / "found.json"
    words = ["man", "dog", "cat", "rain", "stock", "tree", "boat", "king", "song", "road"]
    rows = [f"A {a} is here.,The {b} was there.,{3 * i % 7}" for i, (a, b) in enumerate(itertools.pairwise(words))]
    pairs.write_text("\n".join(rows) + "\n", encoding="utf-8")

    def quality(out: Path, *options: str) -> dict[str, float]:
        measured = command("eval", str(out), "--pairs", str(pairs), "--json", str(found), *options)
        assert measured.exit_code == 0, measured.output
        values = json.loads(found.read_text())
        return {name: values[name] for name in ("spearman", "recall_at_1", "recall_at_10")}

    done, out = export("cpu-x86", "--bits", "6", "--until", "compress")
    assert done.exit_code == 0, done.output
    assert re.search(r"predicted distance +│ 0\.\d+ \(1 - cosine\) a text", done.output), done.output
    assert "decode" not in done.output
    assert "nats" not in done.output + (out / "plan.json").read_text()
    refused = command("eval", str(out), "--pairs", str(pairs))
    assert refused.exit_code == 2
    assert "--teacher" in refused.output
    stopped = quality(out, "--teacher", str(out.parent / "model"))
    compared = json.loads(found.read_text())
    assert 0 < compared["cosine_distance"] < 0.1
    assert (
        compared["spearman_difference_95"][0]
        <= compared["spearman_difference"]
        <= compared["spearman_difference_95"][1]
    )
    done, out = export("cpu-x86", "--bits", "6")
    assert done.exit_code == 0, done.output
    assert quality(out) == pytest.approx(stopped)
    ignored = command("run", str(out), "A man", "--max-new-tokens", "4")
    assert ignored.exit_code == 2
    assert "--max-new-tokens" in ignored.output
    data = out / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    changed = command("eval", str(out), "--pairs", str(pairs))
    assert changed.exit_code == 1
    assert "copy or export the bundle again" in changed.output


def test_for_a_board_the_tensorrt_graph_is_written(export: Callable[..., Any]) -> None:
    done, out = export("jetson", "--bits", "6", "--method", "gptq")
    assert done.exit_code == 0, done.output
    assert {"model.trt.onnx", "vectors.safetensors", "tokenizer.json"} <= read_manifest(out).files.keys()
    refused = command("build", str(out))
    assert refused.exit_code == 1
    assert "a sentence encoder, `build` makes engines of language models only" in refused.output


def test_what_does_not_go_is_said(export: Callable[..., Any], tmp_path: Path) -> None:
    done, out = export("rtx-4090", "--bits", "6")
    assert done.exit_code == 2
    assert "TensorRT-RTX engines of encoders are not built yet" in done.output
    assert not out.exists()
    assert "give --text or --tasks for a language model, or --pairs" in command("eval", str(out)).output
    text = tmp_path / "a.txt"
    text.write_text("words", encoding="utf-8")
    both = command("eval", str(out), "--text", str(text), "--pairs", str(text))
    assert both.exit_code == 2
