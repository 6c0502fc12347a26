"""What a TensorRT bundle carries for its board: plugin sources, build_engine.sh, and the manifest's device section."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from jpq_export.engine.plugin import ABI

PARTS = ("core", "tensorrt")  # of plugins/; what a checkout does not have yet is listed as missing
SUFFIXES = (".c", ".h", ".inc", ".cu", ".cuh", ".cc", ".cpp", ".hpp", ".cmake", ".map")
NAMES = ("CMakeLists.txt",)
GRAPH, SCRIPT = "model.trt.onnx", "build_engine.sh"


def add_device_files(
    folder: Path, sources: Path | None, *, tensorrt: str, bounds: dict[str, float], prompt: int, tokens: int
) -> dict[str, Any]:
    """Copy script and plugin sources into the bundle `folder`; returns the manifest's device section.

    `sources`: a checkout's plugins/, None when this installation has none. `bounds`: what recorded vectors are compared
    with, {"logits": relative RMS, "peak": how many times that one value may differ}. `prompt`, `tokens`: of the longest
    recorded sequence.
    """
    script = folder / SCRIPT
    shutil.copyfile(Path(__file__).with_name(SCRIPT), script)
    script.chmod(0o755)
    parts = [name for name in PARTS if sources and _copy(sources / name, folder / "plugins" / name)]
    return {
        "graph": GRAPH,
        "tensorrt": tensorrt,
        "abi": ABI,
        "parts": parts,
        "missing": [name for name in PARTS if name not in parts],
        "binaries": [],
        "bounds": bounds,
        "vectors_prompt": prompt,
        "vectors_tokens": tokens,
    }


def bundle_names(folder: Path) -> set[str]:
    """The files `add_device_files` wrote, relative to the bundle."""
    found = {SCRIPT} if (folder / SCRIPT).is_file() else set()
    return found | {p.relative_to(folder).as_posix() for p in (folder / "plugins").rglob("*") if p.is_file()}


def _copy(source: Path, folder: Path) -> bool:
    """Copy the sources of one part, build results left out; False when there are none."""
    if folder.exists():
        shutil.rmtree(folder)  # of a killed run
    files = [path for path in sorted(source.rglob("*")) if path.suffix in SUFFIXES or path.name in NAMES]
    files = [path for path in files if "build" not in path.relative_to(source).parts and path.is_file()]
    for path in files:
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return bool(files)
