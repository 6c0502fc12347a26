"""A TensorRT-RTX engine for a desktop GPU, built on any machine of that platform, GPU or not; built, never run here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from jpq_export.engine.settings import spec_of
from jpq_export.errors import BundleError, JpqError
from jpq_export.format.bundle import check_hashes, hash_file, read_manifest, write_manifest
from jpq_export.format.spec import ModelSpec

PACKAGE = "tensorrt_rtx"
GRAPH, ENGINE = "model.rtx.onnx", "model.rtx.engine"
MAX_PROMPT = 512
BUILD_SECONDS = 3600


class RtxError(JpqError):
    """TensorRT-RTX is not installed, or builds no engine."""


@dataclass(frozen=True, slots=True)
class RtxEngine:
    """The manifest's `engine` section of a built engine, or of a missing one (`file` None, `reason` says why).

    bytes: of the engine file; weight_bytes: of the graph's weights, INT4 and INT8 as stored. The same inputs give an
    engine of the same size, not of the same bytes: the library writes something new into each.
    """

    sm: int
    max_prompt: int
    max_tokens: int
    weight_bytes: int
    name: str = "tensorrt-rtx"
    graph: str = GRAPH
    file: str | None = None
    version: str | None = None
    bytes: int | None = None
    seconds: float | None = None
    peak_rss_bytes: int | None = None
    ran: bool = False
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)

    @property
    def line(self) -> str:
        """One line for people."""
        if self.file is None:
            return f"no engine: {self.reason}"
        size = f"{(self.bytes or 0) / 1e6:.1f} MB in {self.seconds} s"
        return f"{self.file} for sm_{self.sm}, {size}, TensorRT-RTX {self.version}: built, not run"


def installed() -> str | None:
    """Version of the package, None when there is none. It is not imported: that alone maps 230 MB."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return None


def lengths(spec: ModelSpec, context: int) -> tuple[int, int]:
    """(longest prompt, most tokens) of the engine's profiles."""
    tokens = max(2, min(context, spec.max_positions))
    return min(MAX_PROMPT, tokens // 2), tokens


def try_build(folder: Path, spec: ModelSpec, *, sm: int, context: int, weight_bytes: int) -> RtxEngine:
    """Build `folder`/model.rtx.engine from model.rtx.onnx; a failure is recorded, for the bundle is whole without."""
    prompt, tokens = lengths(spec, context)
    plain = RtxEngine(sm, prompt, tokens, weight_bytes)
    try:
        result = build(folder / GRAPH, folder / ENGINE, spec, sm=sm, max_prompt=prompt, max_tokens=tokens)
    except RtxError as error:
        return RtxEngine(**{**plain.to_dict(), "reason": str(error), "version": installed()})
    return RtxEngine(**{**plain.to_dict(), **result, "file": ENGINE})


def rebuild(bundle: Path, *, context: int) -> RtxEngine:
    """Build the engine of an exported bundle, again or for the first time, and write it into its manifest.

    Raises:
        BundleError: the bundle is damaged, or for no desktop GPU.
        RtxError: the package is missing, or builds no engine.
    """
    manifest = read_manifest(bundle)
    if not manifest.engine:
        raise BundleError(f"{bundle}: made for {manifest.target.get('name')}, not for TensorRT-RTX; export it again")
    if problems := [p for p in check_hashes(bundle, manifest) if p.place.startswith(GRAPH)]:
        raise BundleError(f"{bundle}: {problems[0].place}: {problems[0].message}; export it again")
    spec, sm = spec_of(manifest, bundle), int(manifest.engine["sm"])
    prompt, tokens = lengths(spec, context)
    result = build(bundle / GRAPH, bundle / ENGINE, spec, sm=sm, max_prompt=prompt, max_tokens=tokens)
    size = int(manifest.engine["weight_bytes"])
    engine = RtxEngine(sm, prompt, tokens, size, file=ENGINE, **result)
    files = dict(sorted({**manifest.files, ENGINE: hash_file(bundle / ENGINE)}.items()))
    write_manifest(bundle, replace(manifest, engine=engine.to_dict(), files=files))
    return engine


def build(graph: Path, out: Path, spec: ModelSpec, *, sm: int, max_prompt: int, max_tokens: int) -> dict[str, Any]:
    """Build in a process of its own; returns version, seconds, bytes and peak_rss_bytes. RtxError says what failed."""
    if installed() is None:
        raise RtxError(
            "the package tensorrt-rtx is not installed; pip install 'jpq-export[rtx]', then jpq-export build BUNDLE"
        )
    part = out.with_name(f".{out.name}.part")
    job = {"graph": str(graph.resolve()), "out": str(part.resolve()), "sm": sm, "spec": spec.to_json()}
    job |= {"max_prompt": max_prompt, "max_tokens": max_tokens}
    try:
        result = _run(job, graph)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return result


def _run(job: dict[str, Any], graph: Path) -> dict[str, Any]:
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", "jpq_export.engine.rtx_worker", name]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=BUILD_SECONDS,
                env=os.environ | {"PYTHONPATH": paths},
            )
        except subprocess.TimeoutExpired as error:
            raise RtxError(f"{graph.name}: TensorRT-RTX did not finish in {BUILD_SECONDS} s") from error
        path = folder / "result.json"
        if not path.is_file():
            raise RtxError(f"{graph.name}: TensorRT-RTX {_end(done.returncode)}: {_last(done.stderr)}")
        result = json.loads(path.read_text(encoding="utf-8"))
    if "error" in result:
        raise RtxError(f"{graph.name}: TensorRT-RTX {result['version']}: {result['error']} ({_last(done.stderr)})")
    return result


def _end(code: int) -> str:
    """How a process ended."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"


def _last(text: str) -> str:
    """The last thing it said, on one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"
