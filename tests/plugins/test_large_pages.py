"""Codes of a file that move into pages of 2 MB: the same results, no memory twice, nothing left behind."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jpq_export.lower.export import export_onnx

pytest.importorskip("onnxruntime")
CHECKS = Path(__file__).with_name("large_pages_checks.py")
SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")


def why_not():
    """Why this system gives no pages of 2 MB; nothing where it does."""
    if not sys.platform.startswith("linux") or not SETTINGS.is_dir():
        return "no such pages here"
    if "[never]" in (SETTINGS / "enabled").read_text():
        return "switched off"
    return "" if (SETTINGS / "hpage_pmd_size").read_text() == f"{2 << 20}\n" else "of another size"


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "there are")


@pytest.fixture(scope="module", params=[True, False], ids=["chained", "products"])
def graph(request, tmp_path_factory, conftest_of):
    """A model whose layers have some 100 KB of codes each, its weights in a file beside it."""
    tiny = conftest_of("lower")
    spec = tiny.SPECS["llama"]
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    layers = tuple(replace(layer, ffn=1024) for layer in spec.layers)
    model = tiny.random_model(replace(spec, hidden=512, vocab=512, layers=layers))
    export_onnx(model, path, form="custom_op", chained=request.param)
    return path


@pytest.fixture
def check(library):
    """Runs a check in a process where nothing else has blocks; `library` is compiled by then."""
    environment = {name: value for name, value in os.environ.items() if name != "JPQ_LARGE_PAGES"}

    def run(name, *arguments):
        command = [sys.executable, str(CHECKS), name, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment | {"JPQ_KERNELS": "cpu"})
        assert done.returncode == 0, done.stderr

    return run


@pytest.mark.parametrize("name", ["same_results", "shared_blocks"])
def test_a_model(check, graph, name):
    check(name, graph)


@pytest.mark.parametrize("name", ["once_in_memory", "written_to", "no_file"])
def test_a_product(check, library, tmp_path, name):
    check(name, tmp_path, library.path)
