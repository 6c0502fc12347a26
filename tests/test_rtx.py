"""A whole export for a desktop GPU: the signed graph, its parity, the engine or why there is none, the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from jpq_export.cli import main
from jpq_export.compress import effort
from jpq_export.engine import rtx
from jpq_export.format.bundle import check_hashes, hash_file, read_manifest

SHORT = effort.Effort("quick", 4, 2, 64, 1, 6, 2, (("removal", (float("inf"),)),))


def installed() -> bool:
    try:
        return bool(metadata.version(rtx.PACKAGE))
    except metadata.PackageNotFoundError:
        return False


needs_rtx = pytest.mark.skipif(not installed(), reason="tensorrt-rtx is not installed: pip install '.[rtx]'")


@pytest.fixture
def export(tmp_path: Path, tmp_path_factory: Any, save_tiny: Callable[..., Path], monkeypatch: Any) -> Callable:
    """Run the command on a tiny model; gives click's result and the bundle folder."""
    monkeypatch.setitem(effort.EFFORTS, "quick", SHORT)
    monkeypatch.setenv("JPQ_CACHE", str(tmp_path_factory.getbasetemp() / "rtx-cache"))
    model = save_tiny(tmp_path / "model", "qwen3")

    def run(*options: str) -> tuple[Any, Path]:
        out = tmp_path / "bundle"
        command = [str(model), "--target", "rtx-4090", "--out", str(out), "--effort", "quick", *options]
        return CliRunner().invoke(main, command, catch_exceptions=False), out

    return run


def check_bundle(folder: Path) -> dict[str, Any]:
    """What holds with and without an engine; returns the manifest's engine section."""
    manifest = read_manifest(folder)
    assert check_hashes(folder, manifest) == []
    assert {"model.onnx", "model.rtx.onnx", "model.rtx.onnx.data"} <= manifest.files.keys()
    parity = json.loads((folder / "parity.json").read_text())
    assert parity["passed"]
    (half,) = [runtime for runtime in parity["runtimes"] if runtime["name"] == "onnxruntime-fp16"]
    assert 1e-6 < half["logits"]["rel_rms"] < 1e-2  # fp16 was really used
    plan = json.loads((folder / "plan.json").read_text())
    assert {choice["bits"] for choice in plan["choices"]} <= {4, 8}
    assert all(choice["integer_zero"] for choice in plan["choices"])
    graph = onnx.load(folder / "model.rtx.onnx", load_external_data=False)
    assert {node.domain for node in graph.graph.node} == {""}
    assert manifest.engine is not None
    assert manifest.engine["ran"] is False
    assert manifest.engine["weight_bytes"] == manifest.weight_bytes  # the search priced what is stored
    return manifest.engine


@needs_rtx
def test_the_engine_lands_in_the_bundle(export: Callable) -> None:
    result, folder = export()
    assert result.exit_code == 0, result.output
    engine = check_bundle(folder)
    path = folder / "model.rtx.engine"
    assert read_manifest(folder).files[path.name] == hash_file(path)
    assert engine["file"] == path.name
    assert engine["bytes"] == path.stat().st_size > engine["weight_bytes"]
    assert engine["seconds"] > 0
    assert engine["version"] == metadata.version(rtx.PACKAGE)
    assert "built, not run" in " ".join(result.output.split())
    assert "<b>built, not run</b>" in (folder / "parity.html").read_text()


def test_without_the_package_the_bundle_is_whole(export: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "PACKAGE", "tensorrt-rtx-not-there")
    result, folder = export()
    assert result.exit_code == 0, result.output
    engine = check_bundle(folder)
    assert engine["file"] is None
    assert not (folder / "model.rtx.engine").exists()
    assert "pip install 'jpq-export[rtx]'" in engine["reason"]
    assert "No engine:" in (folder / "parity.html").read_text()
    again = CliRunner().invoke(main, ["build", str(folder)])
    assert again.exit_code == 1
    assert "pip install 'jpq-export[rtx]'" in again.output
    monkeypatch.undo()
    if installed():
        assert CliRunner().invoke(main, ["build", str(folder)], catch_exceptions=False).exit_code == 0
        assert check_bundle(folder)["file"] == "model.rtx.engine"
        assert "<b>built, not run</b>" in (folder / "parity.html").read_text()
