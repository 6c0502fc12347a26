"""What a bundle carries for its board: sources as the checkout has them, and a script that shells accept."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jpq_export.engine.contents import add_device_files, bundle_names
from jpq_export.format.bundle import read_manifest


def add(folder: Path, sources: Path | None) -> dict:
    folder.mkdir(exist_ok=True)
    return add_device_files(folder, sources, tensorrt="10.3", bounds={"logits": 1e-4, "peak": 8}, prompt=1, tokens=2)


def test_sources_are_carried_and_build_results_are_not(bundle):
    assert sorted(
        path.relative_to(bundle).as_posix() for path in (bundle / "plugins").rglob("*") if path.is_file()
    ) == [
        *("plugins/core/CMakeLists.txt", "plugins/core/low_bit.h"),
        *("plugins/tensorrt/CMakeLists.txt", "plugins/tensorrt/plugin.cpp"),
    ]
    manifest = read_manifest(bundle)
    assert bundle_names(bundle) <= set(manifest.files)
    assert manifest.device
    assert (manifest.device["parts"], manifest.device["missing"]) == (["core", "tensorrt"], [])
    assert os.access(bundle / "build_engine.sh", os.X_OK)


def test_what_a_checkout_lacks_is_said(sources, tmp_path):
    shutil.rmtree(sources / "tensorrt")
    section = add(tmp_path / "new", sources)
    assert (section["parts"], section["missing"]) == (["core"], ["tensorrt"])
    assert add(tmp_path / "none", None)["missing"] == ["core", "tensorrt"]
    assert bundle_names(tmp_path / "none") == {"build_engine.sh"}


def test_what_a_killed_run_left_is_replaced(sources, tmp_path):
    stale = tmp_path / "new" / "plugins" / "core" / "stale.h"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    add(tmp_path / "new", sources)
    assert not stale.exists()


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_the_script_parses(bundle, shell):
    assert subprocess.run([shell, "-n", bundle / "build_engine.sh"], check=False).returncode == 0


def test_shellcheck_finds_nothing(bundle):
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([program, bundle / "build_engine.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def script(bundle: Path, python: Path | str, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHON": str(python), "PYTHONPATH": str(root)}
    command = [str(bundle / "build_engine.sh"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=bundle.parent, timeout=120
    )


def test_the_script_passes_options_on_and_gives_the_exit_code(bundle):
    done = script(bundle, sys.executable, "--dry-run", "--max-tokens", "1024")
    assert done.returncode == 1  # no TensorRT here
    assert "FAIL tensorrt" in done.stdout
    assert "--max-tokens 1024" in done.stdout


@pytest.mark.parametrize(
    ("imports", "words"), [("numpy", "pip install numpy click"), ("jpq_export", "pip wheel --no-deps")]
)
def test_the_script_says_what_python_lacks(bundle, tmp_path, imports, words):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$2" in *{imports}*) exit 1;; esac\nexit 0\n')
    python.chmod(0o755)
    done = script(bundle, python)
    assert done.returncode == 1
    assert words in done.stderr


def test_the_script_says_that_python_is_missing(bundle):
    done = script(bundle, "/nowhere/python3")
    assert done.returncode == 1
    assert "not found" in done.stderr
