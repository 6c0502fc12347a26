"""parity.html of a sentence encoder: the same pictures, its own words, and what the device does."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jpq_export.bench.baselines import random_model
from jpq_export.compress.load import load_model
from jpq_export.format.bundle import Manifest, check_hashes, read_manifest, write_manifest
from jpq_export.format.compressed import CompressedModel
from jpq_export.format.plan import Budget, Choice, FrontPoint, LayerPlan, Plan, Predicted
from jpq_export.lower.export import export_onnx
from jpq_export.parity.encoder import check_encoder
from jpq_export.parity.report import NAME, write_report

TEXTS = [[5, 70, 71], [9, 10, 11, 12, 13, 14], [6, 7, 8, 9]]


def plan_of(model: CompressedModel) -> Plan:
    choices = [
        Choice(name, w.scheme.bits, w.scheme.group_size, False, *w.shape, w.nbytes, 0.001, "why")
        for name, w in model.quantized.items()
    ]
    layers = [LayerPlan(i, (0, 1, 2, 3), 4, x.ffn, x.ffn) for i, x in enumerate(model.spec.layers)]
    front = tuple(FrontPoint(1000 * i, 0.1 * i, 0.2 * i, 10.0**-i) for i in range(1, 8))
    predicted, budget = Predicted(1e-4, 4000, 0.8, 0.001), Budget("size", 4.0, 4100)
    return Plan("tiny", "00", "cpu", "jpq", budget, tuple(layers), tuple(choices), (), predicted, front, {})


@pytest.fixture
def bundle(save_encoder: Callable[..., Path], tmp_path: Path) -> Path:
    spec, folder = load_model(str(save_encoder(tmp_path / "model", "bert"))).spec, tmp_path / "bundle"
    folder.mkdir()
    model = random_model(spec)
    export_onnx(model, folder / "model.onnx", form="custom_op")
    (folder / "plan.json").write_text(plan_of(model).to_json(), encoding="utf-8")
    parity = check_encoder(model, folder / "model.onnx", texts=TEXTS)
    (folder / "parity.json").write_text(parity.to_json(), encoding="utf-8")
    raw: dict[str, Any] = {"bits_per_weight": 4.5, "weight_bytes": 77, "original_bytes": 99, "kind": "encoder"}
    facts = {"name": "tiny", "source": "here", "sha256": "0" * 64, "parameters": 9, "spec": json.loads(spec.to_json())}
    manifest = Manifest(
        model=facts,
        target={"name": "jetson", "tensorrt": "10.3"},
        method="jpq",
        quality={"texts": 64, "distance_mean": 0.0123, "distance_p99": 0.0456},
        staircase=({"stage": "round", "heldout_kl": 0.1, "applied": True},),
        **raw,
    )
    write_manifest(folder, manifest.with_contents(folder))
    return folder


def shown(folder: Path) -> str:
    page = re.sub(r"<style.*?</style>", "", (folder / NAME).read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", page)))


def test_the_page_speaks_of_embeddings(bundle: Path) -> None:
    write_report(bundle)
    text = shown(bundle)
    for expected in ("parity passed", "padded batch", "largest distance", "0.0123", "layers.0.attn.q", "positions"):
        assert expected in text, expected
    for wrong in ("KL to", "nats", "greedy", "logits", "one token", "tied", "mlp.gate"):
        assert wrong not in text, wrong
    assert check_hashes(bundle, read_manifest(bundle)) == []
    assert (bundle / NAME).read_text().count("<svg") >= 5  # errors, widths, front, staircase, the legends


def test_it_says_what_the_device_does(bundle: Path) -> None:
    write_report(bundle)
    text = shown(bundle)
    assert "What the device does" in text
    assert "mean pooling and division by the length are inside the graph" in text
    assert "not run" not in text
    (bundle / "model.trt.onnx").write_bytes((bundle / "model.onnx").read_bytes())
    write_manifest(bundle, read_manifest(bundle).with_contents(bundle))
    write_report(bundle)
    assert "is the same network for TensorRT 10.3" in shown(bundle)


def test_twin_a_failure_is_in_the_headline(bundle: Path) -> None:
    raw = json.loads((bundle / "parity.json").read_text())
    raw["passed"] = raw["runtimes"][0]["passed"] = raw["runtimes"][0]["cases"][0]["passed"] = False
    raw["runtimes"][0]["cases"][0]["rel_rms"] = None
    place = {"sublayer": "layers.0.mlp", "place": "layers.0.mlp.up", "node": "n", "rel_rms": 0.5, "bound": 1e-5}
    raw["runtimes"][0]["first_diverging"] = place
    (bundle / "parity.json").write_text(json.dumps(raw))
    write_report(bundle)
    text = shown(bundle)
    assert "parity failed" in text
    assert "First wrong value: layers.0.mlp.up (sub-layer layers.0.mlp, node n)" in text


def test_without_parity_it_says_so(bundle: Path) -> None:
    (bundle / "parity.json").unlink()
    write_report(bundle)
    assert "parity not checked" in shown(bundle)
