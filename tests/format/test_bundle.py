"""The manifest, the hashes, and the rename that finishes a bundle."""

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from jpq_export.errors import BundleError, StorageError
from jpq_export.format import bundle
from jpq_export.format.bundle import Manifest, check_hashes, publish, read_manifest, write_manifest


def manifest() -> Manifest:
    return Manifest(
        model={"name": "tiny", "source": "test", "sha256": "0" * 64, "parameters": 10, "spec": {}},
        target={"name": "jetson"},
        method="jpq",
        bits_per_weight=3.01,
        weight_bytes=1000,
        original_bytes=4000,
        quality={"kl_mean": 0.1},
        staircase=({"stage": "round", "heldout_kl": 1.2, "applied": True},),
        stages=({"name": "load", "seconds": 1.0, "peak_rss_bytes": 1},),
        versions={"onnx": "1"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle whose model.onnx keeps two tensors in model.onnx.data."""
    arrays = {"layers.0.mlp.up.packed": np.arange(4096, dtype=np.uint8), "norm": np.ones(1024, np.float32)}
    graph = helper.make_graph(
        [helper.make_node("Identity", ["norm"], ["y"])],
        "g",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1024])],
        [numpy_helper.from_array(value, name) for name, value in arrays.items()],
    )
    folder = tmp_path / "bundle"
    folder.mkdir()
    onnx.save(
        helper.make_model(graph),
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    (folder / "tokenizer.json").write_text("{}")
    write_manifest(folder, manifest().with_contents(folder))
    return folder


def test_round_trip(folder: Path):
    read = read_manifest(folder)
    assert read == manifest().with_contents(folder)
    assert sorted(read.files) == ["model.onnx", "model.onnx.data", "tokenizer.json"]
    assert sorted(read.tensors["model.onnx"]) == ["layers.0.mlp.up.packed", "norm"]
    assert check_hashes(folder, read) == []
    assert [p.name for p in folder.glob("*.part")] == []


def test_same_contents_same_bytes(folder: Path, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    for path in sorted(folder.iterdir(), reverse=True):
        (other / path.name).write_bytes(path.read_bytes())
    write_manifest(other, manifest().with_contents(other))
    assert (other / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()


@pytest.mark.parametrize(("offset", "name"), [(5, "layers.0.mlp.up.packed"), (4096 + 7, "norm")])
def test_flipped_byte_names_the_initializer(folder: Path, offset: int, name: str):
    data = folder / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[offset] ^= 1
    data.write_bytes(content)
    assert [problem.place for problem in check_hashes(folder, read_manifest(folder))] == [name]


def test_cut_data_names_file_and_lost_tensor(folder: Path):
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    assert [p.place for p in check_hashes(folder, read_manifest(folder))] == ["model.onnx.data", "norm"]


def test_missing_and_changed_files(folder: Path):
    (folder / "tokenizer.json").write_text("[]")
    (folder / "model.onnx.data").unlink()
    problems = {problem.place: problem.message for problem in check_hashes(folder, read_manifest(folder))}
    assert set(problems) == {"tokenizer.json", "model.onnx.data"}
    assert "missing" in problems["model.onnx.data"]
    assert "sha256" in problems["tokenizer.json"]


def test_damaged_graph_and_data_are_both_reported(folder: Path):
    (folder / "model.onnx").write_bytes(b"\xff" * 100)
    data = folder / "model.onnx.data"
    data.write_bytes(b"x" + data.read_bytes()[1:])
    assert [p.place for p in check_hashes(folder, read_manifest(folder))] == ["model.onnx", "model.onnx.data"]


def broken(change) -> str:
    raw = json.loads(manifest().to_json())
    change(raw)
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", "not readable JSON"),
        ("[]", "jpq-bundle/1"),
        (broken(lambda raw: raw.update(format="jpq-bundle/9")), "jpq-bundle/9"),
        (broken(lambda raw: raw.pop("files")), "malformed"),
        (broken(lambda raw: raw.pop("model")), "malformed"),
        (broken(lambda raw: raw.update(files={"a": {"bytes": 1}})), "malformed"),
        (broken(lambda raw: raw.update(files={"../a": {"sha256": "0", "bytes": 1}})), "outside"),
        (broken(lambda raw: raw.update(files={"/etc/passwd": {"sha256": "0", "bytes": 1}})), "outside"),
        (broken(lambda raw: raw.update(files={"a/../../b": {"sha256": "0", "bytes": 1}})), "outside"),
        (broken(lambda raw: raw.update(files={"C:\\x": {"sha256": "0", "bytes": 1}})), "outside"),
    ],
)
def test_bad_manifests_are_one_line(tmp_path: Path, text: str, line: str):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=line) as error:
        read_manifest(tmp_path)
    assert "\n" not in str(error.value)


def test_no_manifest(tmp_path: Path):
    with pytest.raises(BundleError, match="not a bundle"):
        read_manifest(tmp_path)


def test_publish_replaces_an_older_bundle(folder: Path, tmp_path: Path):
    final = tmp_path / "out"
    final.mkdir()
    (final / "old").write_text("old")
    publish(folder, final)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert (final / "manifest.json").exists()
    assert not (final / "old").exists()


def test_publish_puts_the_old_bundle_back_when_the_rename_fails(folder: Path, tmp_path: Path, monkeypatch):
    final = tmp_path / "out"
    final.mkdir()
    (final / "old").write_text("old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self == folder:
            raise OSError(28, os.strerror(28))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(StorageError, match="No space left"):
        publish(folder, final)
    assert (final / "old").read_text() == "old"


def test_full_disk_leaves_the_old_manifest(folder: Path, monkeypatch):
    before = (folder / "manifest.json").read_bytes()

    def fail(self: Path, *_args, **_kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(StorageError, match="No space left"):
        write_manifest(folder, manifest())
    assert (folder / "manifest.json").read_bytes() == before
    assert list(folder.glob("*.part")) == []


def test_newer_fields_are_ignored(folder: Path):
    path = folder / bundle.MANIFEST
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "added_later": 1}))
    assert read_manifest(folder).weight_bytes == 1000
