"""Imports flow one way, the light parts load no torch, and no file is too long to read."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jpq_export

PACKAGE = Path(jpq_export.__file__).parent
# A module may import what stands in a later row than its own.
ROWS = (
    ("__main__",),
    ("cli",),
    ("cli_study",),
    ("cli_options", "cli_group"),
    ("study_export",),
    ("study",),
    ("comparison",),
    ("comparison_cells", "comparison_report"),
    ("comparison_picture",),
    ("peers",),
    ("pipeline", "finalists", "prove", "fallback", "evaluation", "encoder_evaluation", "summary"),
    ("feasible", "given_plan", "read_activations", "published", "rotate"),
    ("request", "bench", "serve"),
    ("methods", "compress", "lower", "runtime", "engine", "parity", "evaluate", "workspace"),
    ("format",),
    ("numerics",),
    ("cache", "errors", "progress", "ranks", "revision", "__init__"),
)
ROW = {part: i for i, row in enumerate(ROWS) for part in row}
# The choice between finalists and the last stages of a run are files of their own; the fallback is a pipeline beside;
# parity runs the PyTorch reference and our kernels; the device side uses parity's error measures, pure numpy
# (test_build.py blocks everything else); tasks go on from the decoder's cache; the runtime asks the driver for a GPU
# through the device side's few calls; methods build on the parts of compression and draw with the report's pieces.
BESIDE = {
    ("pipeline", "finalists"),
    ("finalists", "pipeline"),
    ("pipeline", "prove"),
    ("prove", "pipeline"),
    ("fallback", "prove"),
    ("evaluation", "fallback"),
    ("parity", "compress"),
    ("parity", "runtime"),
    ("engine", "parity"),
    ("evaluate", "compress"),
    ("runtime", "engine"),
    ("methods", "compress"),
    ("methods", "parity"),
}
FREE = ("__init__", "cache", "errors", "progress", "ranks", "revision")
LIGHT = ("serve", "runtime", "engine", "format", "numerics", "cache", "errors", "progress", "ranks", "revision")
HEAVY = ("torch", "transformers")
LONGEST = 400


def part_of(module: str) -> str:
    """`jpq_export.compress.load` -> "compress"; the package itself -> "__init__"."""
    return [*module.split("."), "__init__"][1]


def imported(source: str) -> Iterator[str]:
    """Full names of the modules a source imports, at the top, inside functions and for type checkers alike."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module or ""
            if node.module == "jpq_export":  # from jpq_export import errors
                yield from (f"jpq_export.{alias.name}" for alias in node.names if alias.name in ROW)


def violations(part: str, source: str) -> list[str]:
    """What `source`, lying in `part`, must not import."""
    found = []
    for module in imported(source):
        if part in LIGHT and module.split(".")[0] in HEAVY:
            found.append(f"{part} -> {module}")
        if module.split(".")[0] != "jpq_export":
            continue
        other = part_of(module)
        if other not in ROW:
            found.append(f"{part} -> {module}: in no row")
        elif other != part and ROW[other] < ROW[part]:
            found.append(f"{part} -> {module}: upwards")
        elif other != part and ROW[other] == ROW[part] and part not in FREE and (part, other) not in BESIDE:
            found.append(f"{part} -> {module}: beside")
    return found


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_imports_flow_one_way(path: Path) -> None:
    assert violations(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("format", "from jpq_export.compress.load import load_model"),
        ("numerics", "from jpq_export.format import spec"),
        ("lower", "def f():\n    from jpq_export.pipeline import Export"),
        ("lower", "import jpq_export.compress.decoder"),
        ("errors", "from jpq_export import cli"),
        ("runtime", "def f():\n    import torch.nn"),
        ("numerics", "from transformers import AutoModel"),
        ("compress", "import jpq_export.leftover"),
    ],
)
def test_twin_a_wrong_import_is_caught(part: str, source: str) -> None:
    assert len(violations(part, source)) == 1


def loaded_by(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter holds after `code`."""
    code += f"\nimport sys\nprint('heavy:', *[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.split("heavy:")[1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import jpq_export.cli",
        "from jpq_export.cli import main\nmain(['--help'], standalone_mode=False)",
        "from jpq_export.cli import main\nmain(['export', '--help'], standalone_mode=False)",
        "from jpq_export.cli import main\nmain(['targets'], standalone_mode=False)",
        "import jpq_export.runtime.bundle",
        "import jpq_export.parity.verify",
        "import jpq_export.engine.build",
        "import jpq_export.serve.command",
    ],
    ids=["cli", "help", "export help", "targets", "bundle", "verify", "build", "serve"],
)
def test_light_parts_load_no_torch(code: str) -> None:
    assert loaded_by(code) == set()


def test_twin_loading_a_model_does_load_torch() -> None:
    assert "torch" in loaded_by("import jpq_export.compress.decoder")


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_files_stay_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
