"""An encoder's file computes its model: embeddings, every sub-layer, recorded vectors; and a wrong weight is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jpq_export.compress.apply import Compressor, LayerChoice, Recipe, all_kept, prune
from jpq_export.compress.encoder import Encoder
from jpq_export.compress.encoder_statistics import plain_statistics
from jpq_export.compress.load import load_model
from jpq_export.compress.student import to_compressed
from jpq_export.format.compressed import CompressedModel
from jpq_export.lower.export import export_onnx
from jpq_export.numerics.scheme import Scheme
from jpq_export.parity.encoder import check_encoder, compare_recorded, load_recorded, record_vectors
from jpq_export.parity.runners import OrtRunner

NAMES = ("bert", "bge", "xlm_roberta", "mpnet")
BITS = (2, 3, 4, 5, 8)
FORMS = ("custom_op", "qdq")
Save = Callable[..., Path]


def texts(pad: int) -> list[list[int]]:
    """Five texts of 3 to 40 tokens, filled up with padding."""
    generator = np.random.default_rng(0)
    rows = np.full((5, 40), pad, np.int64)
    for row, length in zip(rows, (3, 40, 9, 17, 25), strict=True):
        row[:length] = generator.integers(3, 300, length)
    return rows.tolist()


def compressed(folder: Path, *, layers: tuple[LayerChoice, ...] | None = None) -> CompressedModel:
    """Mixed widths with and without zero points; `layers` prunes first."""
    teacher = load_model(str(folder)).model
    assert isinstance(teacher, Encoder)
    if layers:
        pruned = prune(teacher, layers)
        assert isinstance(pruned, Encoder)
        teacher = pruned
    schemes = {
        name: Scheme(BITS[i % len(BITS)], 32 if shape[1] % 32 == 0 else 16, symmetric=i % 2 == 0)
        for i, (name, shape) in enumerate(teacher.spec.matrices().items())
    }
    ids = np.array(texts(teacher.spec.pad_id))
    recipe = Recipe(all_kept(teacher.spec), schemes, "rtn")
    return to_compressed(Compressor(teacher, recipe, plain_statistics(teacher, ids), ids).run(), schemes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_the_graph_computes_the_model(name: str, form: str, save_encoder: Save, tmp_path: Path) -> None:
    model = compressed(save_encoder(tmp_path, name))
    export_onnx(model, tmp_path / "model.onnx", form=form)  # pyright: ignore[reportArgumentType] one of Form
    report = check_encoder(model, tmp_path / "model.onnx", texts=texts(model.spec.pad_id), form=form)  # pyright: ignore[reportAttributeAccessIssue] an encoder's
    assert report.passed, report.to_json()
    assert {layer.name for layer in report.runtimes[0].layers} >= {
        "embed",
        "layers.0.attn",
        "layers.1.mlp",
        "embedding",
    }
    assert max(case.rel_rms for case in report.runtimes[0].cases) < 1e-4


def test_pruned_layers_of_different_widths(save_encoder: Save, tmp_path: Path) -> None:
    channels = tuple(range(96))
    layers = (LayerChoice((0, 3), channels[:32]), LayerChoice((), channels))
    model = compressed(save_encoder(tmp_path, "mpnet"), layers=layers)
    export_onnx(model, tmp_path / "model.onnx", form="custom_op")
    report = check_encoder(model, tmp_path / "model.onnx", texts=texts(1))
    assert report.passed, report.to_json()


@pytest.mark.parametrize("wrong", ["layers.1.attn.k", "layers.0.mlp.down", "layers.1.mlp_norm.bias", "positions"])
def test_twin_a_wrong_weight_is_named(wrong: str, save_encoder: Save, tmp_path: Path) -> None:
    model = compressed(save_encoder(tmp_path, "bert"))
    export_onnx(model, tmp_path / "model.onnx", form="custom_op")
    if wrong in model.quantized:
        scales = model.quantized[wrong].scales.copy()
        scales[:8] *= np.float16(1.25)
        other = replace(model, quantized=model.quantized | {wrong: replace(model.quantized[wrong], scales=scales)})
    else:
        other = replace(model, vectors=model.vectors | {wrong: model.vectors[wrong] + 0.1})
    report = check_encoder(other, tmp_path / "model.onnx", texts=texts(0))
    assert not report.passed
    assert report.first_diverging is not None
    named = {"layers.1.mlp_norm.bias": "layers.1.mlp", "positions": "embed"}.get(wrong, wrong)
    assert report.first_diverging.place.split(" ")[0] == named


def test_recorded_vectors(save_encoder: Save, tmp_path: Path) -> None:
    model = compressed(save_encoder(tmp_path, "mpnet"))
    export_onnx(model, tmp_path / "model.onnx", form="custom_op")
    record_vectors(model, tmp_path / "vectors.safetensors", texts=texts(1))
    runner = OrtRunner(tmp_path / "model.onnx", with_points=True)
    recorded = load_recorded(tmp_path / "vectors.safetensors")
    error, place = compare_recorded(recorded, runner)
    assert error < 1e-4
    assert place is None
    for name in ("embedding", "point.layers.0.mlp"):
        wrong = recorded | {name: recorded[name] * np.float32(1.01)}
        assert compare_recorded(wrong, runner)[1] == name.removeprefix("point.")


@pytest.mark.usefixtures("kernels")
def test_our_kernels_compute_the_model(save_encoder: Save, tmp_path: Path) -> None:
    model = compressed(save_encoder(tmp_path, "mpnet"))
    export_onnx(model, tmp_path / "model.onnx", form="custom_op")
    report = check_encoder(model, tmp_path / "model.onnx", texts=texts(1))
    assert [runtime.name for runtime in report.runtimes] == ["onnxruntime", "onnxruntime-jpq-kernels"]
    assert report.passed, report.to_json()
