"""Good things to spoil, and the working folder of a test of bad input."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from spoil import export


@pytest.fixture(scope="module")
def shelf(quick_shelf: Callable, save_tiny: Callable[..., Path], run: Callable[..., str]) -> Iterator[Path]:
    """Good things to spoil: a model m, its plan.json, its bundle b; and a cache that knows the model's prices."""
    with quick_shelf("shelf") as (folder, _):
        save_tiny(folder / "m", "llama")
        run(export("--bits 5").replace("--out out", "--out b"))
        shutil.copy("b/plan.json", "plan.json")
        yield folder


@pytest.fixture
def bench(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of one test: copies of m, b and plan.json, an empty folder for temporary files."""
    folder = tmp_path / "bench"
    for name in ("m", "b"):
        shutil.copytree(shelf / name, folder / name)
    shutil.copy(shelf / "plan.json", folder)
    (folder / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    monkeypatch.chdir(folder)
    return folder
