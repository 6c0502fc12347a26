"""verify: a good bundle passes without torch; every damage is named, by hashes and by numbers."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jpq_export.errors import BundleError
from jpq_export.lower.export import export_onnx
from jpq_export.parity.vectors import Vectors, record_vectors
from jpq_export.parity.verify import verify_bundle


def test_a_good_bundle_passes(bundle: Path):
    calls = []
    report = verify_bundle(bundle, progress=lambda done, total: calls.append((done, total)))
    assert report.passed
    assert report.first_diverging is None
    assert report.files == 3
    assert report.greedy is not None
    assert report.greedy.equal == report.greedy.steps == 12
    assert report.logits_rel_rms is not None
    assert report.logits_rel_rms < 1e-5
    assert calls[-1] == (3, 3)


def test_verify_needs_no_torch(bundle: Path):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from pathlib import Path\n"
        "from jpq_export.parity.verify import verify_bundle\n"
        f"report = verify_bundle(Path({str(bundle)!r}))\n"
        "assert report.passed, report\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def flip(array: np.ndarray) -> np.ndarray:
    array[7, 3] ^= 0x40
    return array


def shift(array: np.ndarray) -> np.ndarray:
    return np.roll(array, 1, axis=1)


def swap_heads(array: np.ndarray) -> np.ndarray:
    half = len(array) // 2  # two KV heads of 16 rows
    return np.concatenate([array[half:], array[:half]])


DAMAGES = [
    ("layers.2.mlp.up.packed", flip, "layers.2.mlp.up"),
    ("layers.0.attn.o.packed", flip, "layers.0.attn.o"),
    ("layers.1.mlp.down.scales", shift, "layers.1.mlp.down"),
    ("layers.2.attn.q.scales", shift, "layers.2.attn.q"),
    ("layers.1.attn.k.packed", swap_heads, "layers.1.attn.k"),
    ("layers.0.attn.v.packed", swap_heads, "layers.0.attn.v"),
]


@pytest.mark.parametrize(("initializer", "change", "place"), DAMAGES)
def test_hashes_name_the_initializer_and_numbers_the_weight(bundle, damage, initializer, change, place):
    damage(bundle, initializer, change)
    report = verify_bundle(bundle)
    assert [problem.place for problem in report.problems] == [initializer, place]


@pytest.mark.parametrize(("initializer", "change", "place"), DAMAGES)
def test_numbers_alone_name_the_weight(bundle, damage, rehash, initializer, change, place):
    damage(bundle, initializer, change)
    rehash(bundle)
    report = verify_bundle(bundle)
    assert [problem.place for problem in report.problems] == [place]
    assert report.first_diverging is not None
    assert report.first_diverging.sublayer == place.rsplit(".", 1)[0]
    assert place in report.first_diverging.node


def test_a_wrong_row_of_the_tied_embedding_is_found_in_the_logits(bundle, damage, rehash):
    recorded = Vectors.load(bundle / "vectors.safetensors").tensors
    used = {*recorded["ids.prefill"].ravel(), *recorded["ids.padded"].ravel(), *recorded["greedy"]}
    row = min(set(range(96)) - used)

    def change(array: np.ndarray) -> np.ndarray:
        array[row] ^= 0x11
        return array

    damage(bundle, "embed.packed", change)
    rehash(bundle)
    (problem,) = verify_bundle(bundle).problems
    assert problem.place.startswith("logits")


def test_the_wrong_models_vectors_fail(bundle, models, prompts, rehash):
    from dataclasses import replace

    model = models["llama"]
    vectors = {**model.vectors, "layers.1.mlp_norm": model.vectors["layers.1.mlp_norm"] * np.float32(1.001)}
    record_vectors(replace(model, vectors=vectors), bundle / "vectors.safetensors", prompts=prompts, steps=12)
    rehash(bundle)
    (problem,) = verify_bundle(bundle).problems
    assert problem.place == "layers.1.mlp_norm"


@pytest.mark.parametrize("name", ["pruned", "gemma"])
@pytest.mark.parametrize("form", ["custom_op", "qdq"])
def test_every_shape_of_model_verifies(bundle, models, prompts, rehash, name, form):
    for path in bundle.glob("model.onnx*"):
        path.unlink()
    export_onnx(models[name], bundle / "model.onnx", form=form)
    record_vectors(models[name], bundle / "vectors.safetensors", prompts=prompts, steps=12)
    rehash(bundle)
    assert verify_bundle(bundle).problems == ()


@pytest.mark.parametrize("name", ["vectors.safetensors", "model.onnx", "model.onnx.data"])
def test_a_missing_or_cut_file_is_a_problem_not_a_traceback(bundle: Path, name: str):
    path = bundle / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert name in {problem.place for problem in verify_bundle(bundle).problems}
    path.unlink()
    problems = {problem.place: problem.message for problem in verify_bundle(bundle).problems}
    assert "missing" in problems[name]
    assert all("\n" not in message for message in problems.values())


def test_no_manifest_is_an_error(tmp_path: Path):
    with pytest.raises(BundleError, match="not a bundle"):
        verify_bundle(tmp_path)


def test_vectors_are_reproducible_and_small(models, prompts, tmp_path: Path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        record_vectors(models["llama"], path, prompts=prompts, steps=8)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].stat().st_size < 300_000


def test_a_read_only_bundle_can_be_verified(bundle: Path, tmp_path: Path):
    before = {path.name: path.stat().st_mtime_ns for path in bundle.iterdir()}
    assert verify_bundle(bundle).passed
    assert {path.name: path.stat().st_mtime_ns for path in bundle.iterdir()} == before
    moved = Path(shutil.move(bundle, tmp_path / "elsewhere"))
    assert verify_bundle(moved).passed
