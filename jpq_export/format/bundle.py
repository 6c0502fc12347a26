"""The bundle: manifest.json as a record, hashes of every file, and the last rename that makes a bundle visible."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Container, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

from jpq_export.errors import BundleError, StorageError

FORMAT = "jpq-bundle/1"
MANIFEST = "manifest.json"
CHUNK_BYTES = 1 << 20
TENSOR_DIGITS = 16  # 64 bits of sha256 a tensor: enough to tell damage from none in a few thousand tensors


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """manifest.json: what the bundle is, how it was made, how good it is, and the hash of every file.

    `tensors` holds, by ONNX file name, the first 16 hex digits of the sha256 of every externally stored initializer, so
    that `verify` can say which weight is damaged. `quality` is None and lists are empty when a stage was not run.
    `device`: for TensorRT targets, what `jpq-export build` needs to know on the board (see engine/contents.py).
    `kind`: "decoder", or "encoder" for a graph that gives embeddings.
    `kv_cache`: of a decoder, its `type` ("float" or "int8"), `bytes_per_token` in model.onnx, those of a float one, and
    what int8 costs on the held-out text of `quality`: `kl_to_float` to the same model with a float cache, and
    `without`, that model's own `kl_mean` and `perplexity`.
    `activations`: where linears round what they read, its `bits`, `kl_mean`, `perplexity` and `top1_agreement` on the
    held-out text, and those of the same model `without` rounding.
    `fallback`: of a model that torch.onnx.export wrote, its architecture, the line that says so and what it `lacks`.
    `engine`: for targets whose engine is built by the export, that engine or why there is none (see engine/rtx.py).
    """

    model: dict[str, Any]
    target: dict[str, Any]
    method: str
    bits_per_weight: float
    weight_bytes: int
    original_bytes: int
    effort: str = "standard"
    seed: int = 0
    budget: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None
    staircase: tuple[dict[str, Any], ...] = ()
    stages: tuple[dict[str, Any], ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    tensors: dict[str, dict[str, str]] = field(default_factory=dict)
    device: dict[str, Any] | None = None
    engine: dict[str, Any] | None = None
    kind: str = "decoder"
    kv_cache: dict[str, Any] | None = None
    activations: dict[str, Any] | None = None
    fallback: dict[str, Any] | None = None

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    def with_contents(self, folder: Path, *, names: Container[str] | None = None) -> Manifest:
        """The same manifest with `files` and `tensors` read from what lies in `folder` now, or from `names` there."""
        files = {name: entry for name, entry in hash_files(folder).items() if names is None or name in names}
        tensors = {name: tensor_digests(folder / name) for name in files if name.endswith(".onnx")}
        return replace(self, files=files, tensors=tensors)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a bundle: `place` is the file, or the initializer inside it when that is known."""

    place: str
    message: str


def hash_file(path: Path) -> FileEntry:
    """sha256 and size, read in chunks."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(digest.hexdigest(), size)


def hash_files(folder: Path) -> dict[str, FileEntry]:
    """Every file below `folder` except the manifest itself, by POSIX name relative to it, sorted."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: hash_file(path) for name, path in names.items() if name != MANIFEST}


def tensor_digests(onnx_path: Path) -> dict[str, str]:
    """Digests of the external initializers of an ONNX file by name; one cut short digests what is left."""
    import onnx

    model = onnx.load(onnx_path, load_external_data=False)
    digests = {}
    for tensor in sorted(model.graph.initializer, key=lambda t: t.name):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        where = {entry.key: entry.value for entry in tensor.external_data}
        data = onnx_path.parent / safe_name(where["location"], onnx_path)
        with data.open("rb") as file:
            file.seek(int(where.get("offset", 0)))
            content = file.read(int(where["length"])) if "length" in where else file.read()
        digests[tensor.name] = hashlib.sha256(content).hexdigest()[:TENSOR_DIGITS]
    return digests


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json by renaming a finished file over it."""
    path = folder / MANIFEST
    temporary = path.with_suffix(".json.part")
    try:
        temporary.write_text(manifest.to_json(), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"{path}: cannot write ({error.strerror}); free some space or choose another --out"
        ) from error


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json; BundleError when it is missing, not JSON, of another version, or names files outside."""
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        why = "a file" if folder.is_file() else f"it has no {MANIFEST}"
        raise BundleError(f"{folder}: not a bundle, {why}; give the folder jpq-export wrote") from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: not readable JSON ({error}); export the bundle again") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        raise BundleError(f'{path}: expected "format": "{FORMAT}", got {found!r}; export it again with this version')
    try:
        return _from_raw(raw, path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{path}: malformed manifest ({error}); export the bundle again") from error


def _from_raw(raw: dict[str, Any], path: Path) -> Manifest:
    """The record of parsed JSON; fields this version does not know are ignored, required ones are not."""
    values = {f.name: raw[f.name] for f in fields(Manifest) if f.name in raw}
    files = raw["files"].items()
    values["files"] = {safe_name(k, path): FileEntry(str(v["sha256"]), int(v["bytes"])) for k, v in files}
    values["staircase"] = tuple(raw.get("staircase", ()))
    values["stages"] = tuple(raw.get("stages", ()))
    return Manifest(**values)


def safe_name(name: str, source: Path) -> str:
    """`name` when it stays inside its folder; BundleError otherwise (a bundle may come from anywhere)."""
    pure = PurePosixPath(name)
    if not name or "\\" in name or ":" in name or pure.is_absolute() or ".." in pure.parts or pure.as_posix() != name:
        raise BundleError(f"{source}: file name {name!r} points outside the bundle; do not use this bundle")
    return name


def check_hashes(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> list[Problem]:
    """Compare files (all, or those of `names` the manifest lists) with it; damage is traced to initializers."""
    problems = []
    for name in manifest.files if names is None else [name for name in names if name in manifest.files]:
        expected = manifest.files[name]
        path = folder / name
        if not path.is_file():
            problems.append(Problem(name, f"missing, expected {expected.bytes} bytes"))
            continue
        got = hash_file(path)
        if got == expected:
            continue
        traced = _damaged_tensors(folder, name, manifest) if name.endswith(".onnx.data") else []
        if got.bytes != expected.bytes:
            problems.append(Problem(name, f"expected {expected.bytes} bytes, got {got.bytes}"))
        elif not traced:
            problems.append(Problem(name, f"expected sha256 {expected.sha256[:12]}…, got {got.sha256[:12]}…"))
        problems += traced
    return problems


def _damaged_tensors(folder: Path, data_name: str, manifest: Manifest) -> list[Problem]:
    """The initializers of `<x>.onnx` whose bytes in `<x>.onnx.data` changed."""
    try:
        from google.protobuf.message import DecodeError
    except ImportError:
        return []  # a board has no onnx: the damaged file is named, the initializer is not

    onnx_name = data_name.removesuffix(".data")
    expected = manifest.tensors.get(onnx_name, {})
    try:
        got = tensor_digests(folder / onnx_name)
    except (OSError, DecodeError, KeyError, ValueError, ImportError):
        return []  # the graph is damaged too and reported on its own line
    changed = [name for name, digest in expected.items() if got.get(name) != digest]
    return [Problem(name, f"the stored bytes of this initializer changed (in {data_name})") for name in changed]


def publish(temporary: Path, folder: Path) -> None:
    """Make a finished temporary folder visible as `folder`, replacing an older bundle there.

    The new folder is complete on disk before any rename, so `folder` never holds half a bundle; an older one waits
    beside it as `.<name>.old` until the new one stands. Both paths must be on one file system.
    """
    aside = folder.with_name(f".{folder.name}.old")
    try:
        _sync(temporary)
        if aside.exists():
            shutil.rmtree(aside)
        if folder.exists():
            folder.rename(aside)
        temporary.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        if aside.exists() and not folder.exists():
            aside.rename(folder)
        raise StorageError(f"{folder}: cannot finish the bundle ({error.strerror}); choose another --out") from error


def _sync(folder: Path) -> None:
    """Flush every file to the disk, so that a rename never makes an empty file visible after a power cut."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
