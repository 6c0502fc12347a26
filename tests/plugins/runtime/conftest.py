"""The C runtime compiled with the sanitizers into one program, and tiny bundles for it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from jpq_export.runtime import native

FLAGS = ("-std=c99", "-D_POSIX_C_SOURCE=200809L", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


@pytest.fixture(scope="session")
def onnxruntime_library():
    """The shared library inside the installed wheel."""
    capi = Path(pytest.importorskip("onnxruntime").__file__).parent / "capi"
    found = sorted(capi.glob("libonnxruntime.so*"))
    return found[0] if found else pytest.skip(f"no libonnxruntime.so in {capi}")


def compile_runtime(folder, *flags):
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    source, out = native.sources_folder() / "runtime", folder / "harness"
    files = [Path(__file__).with_name("harness.c"), *sorted((source / "src").glob("*.c"))]
    command = ["gcc", *FLAGS, *flags, f"-I{source / 'include'}", *files, "-o", out, "-ldl", "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture
def plain_harness(tmp_path):
    """The program without the sanitizers, which keep a record of every stack."""
    return compile_runtime(tmp_path)


@pytest.fixture(scope="session")
def harness(tmp_path_factory, onnxruntime_library):
    """`harness("ids", kernels, folder, ...)`: the finished process."""
    out = compile_runtime(tmp_path_factory.mktemp("harness"), *SANITIZE)

    def run(what, kernels, folder, *arguments, input=None, **environment):
        # The kernels' library leaves its operator domain to the process: leaks are looked for without it.
        sanitizer = {"ASAN_OPTIONS": f"detect_leaks={int(kernels == 'none')}"}
        return subprocess.run(
            [out, what, onnxruntime_library, kernels, folder, *map(str, arguments)],
            capture_output=True,
            input=input,
            timeout=200,
            env={**os.environ, **sanitizer, **environment},
        )

    return run


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory, conftest_of):
    """A finished bundle; do not change it."""
    return conftest_of("runtime").write_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def own_bundle(bundle_folder, tmp_path):
    """A bundle of one's own."""
    return Path(shutil.copytree(bundle_folder, tmp_path / "own"))
