"""The TensorRT-RTX build: a real engine where the package is, and every way its process can end otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from jpq_export.engine import rtx
from jpq_export.engine.rtx import RtxError, try_build
from jpq_export.lower.export import export_onnx
from jpq_export.numerics.scheme import Scheme

try:
    VERSION = metadata.version(rtx.PACKAGE)
except metadata.PackageNotFoundError:
    VERSION = ""
needs_rtx = pytest.mark.skipif(not VERSION, reason="tensorrt-rtx is not installed: pip install '.[rtx]'")
# NOT TensorRT-RTX: a module in its place that ends as a library may.
STAND_INS = {
    "abort": ("import os; os.abort()", "was ended by SIGABRT"),
    "exit": ("import sys; print('no such driver', file=sys.stderr); sys.exit(3)", "exit code 3: no such driver"),
    "import": ("raise ImportError('libtensorrt_rtx.so.1: missing')", "ImportError: libtensorrt_rtx.so.1: missing"),
}


@pytest.fixture(scope="module")
def tiny(conftest_of: Callable[[str], Any]) -> Any:
    return conftest_of("lower")


@pytest.fixture
def written(tiny: Any, tmp_path: Path) -> Callable[[str], Any]:
    """Write the signed graph of a family; gives its spec."""

    def write(family: str) -> Any:
        def scheme_of(name: str, index: int) -> Scheme:
            return Scheme(*((4, 16), (8, 16))[index % 2], integer_zero=True)

        export_onnx(tiny.random_model(tiny.SPECS[family], scheme_of), tmp_path / rtx.GRAPH, form="signed")
        return tiny.SPECS[family]

    return write


@needs_rtx
@pytest.mark.parametrize("family", ["gemma3", "pruned"])
def test_an_engine_is_built(written: Callable, tmp_path: Path, family: str) -> None:
    engine = try_build(tmp_path, written(family), sm=89, context=64, weight_bytes=1)
    assert engine.reason is None
    assert (engine.file, engine.version, engine.max_prompt, engine.max_tokens) == (rtx.ENGINE, VERSION, 32, 64)
    assert engine.bytes == (tmp_path / rtx.ENGINE).stat().st_size
    assert "built, not run" in engine.line
    assert not engine.ran


@needs_rtx
def test_a_board_it_does_not_build_for_is_an_error(written: Callable, tmp_path: Path) -> None:
    engine = try_build(tmp_path, written("llama"), sm=87, context=64, weight_bytes=1)
    assert engine.file is None
    assert "SM87" in (engine.reason or "")
    assert not (tmp_path / rtx.ENGINE).exists()


@needs_rtx
def test_a_graph_it_cannot_parse_is_told_in_its_words(tiny: Any, tmp_path: Path) -> None:
    export_onnx(tiny.random_model(tiny.SPECS["llama"]), tmp_path / rtx.GRAPH, form="custom_op")
    engine = try_build(tmp_path, tiny.SPECS["llama"], sm=89, context=64, weight_bytes=1)
    assert engine.file is None
    assert VERSION in (engine.reason or "")
    assert list(tmp_path.glob("*.engine*")) == []


@pytest.mark.parametrize("ends", list(STAND_INS))
def test_a_process_that_dies_does_not_take_the_export_along(
    written: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    code, said = STAND_INS[ends]
    (tmp_path / "stand_in").mkdir()
    (tmp_path / "stand_in" / "tensorrt_rtx.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand_in"))
    monkeypatch.setattr(rtx, "PACKAGE", "pytest")  # something that is installed
    engine = try_build(tmp_path, written("llama"), sm=89, context=64, weight_bytes=1)
    assert engine.file is None
    assert said in (engine.reason or "")
    assert "\n" not in (engine.reason or "")


def test_without_the_package_no_process_is_started(
    written: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rtx, "PACKAGE", "tensorrt-rtx-not-there")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(RtxError, match=r"pip install 'jpq-export\[rtx\]'"):
        rtx.build(tmp_path / rtx.GRAPH, tmp_path / rtx.ENGINE, written("llama"), sm=89, max_prompt=4, max_tokens=8)


@pytest.mark.parametrize(("context", "expected"), [(2048, (64, 128)), (9, (4, 9)), (1, (1, 2))])
def test_profiles_stay_within_the_model(tiny: Any, context: int, expected: tuple[int, int]) -> None:
    assert rtx.lengths(tiny.SPECS["llama"], context) == expected
