"""plugins/CMakeLists.txt leaves out what has no toolkit, and says so."""

import os
import shutil
import subprocess

import pytest

from jpq_export.runtime import native


@pytest.mark.parametrize(
    ("options", "said"), [((), True), (("-DJPQ_CUDA=OFF", "-DJPQ_TENSORRT=OFF"), False)], ids=["missing", "off"]
)
def test_without_nvcc_the_cpu_libraries_are_configured_and_one_line_says_so(tmp_path, options, said):
    if not shutil.which("cmake") or not shutil.which("g++"):
        pytest.skip("no cmake or no g++")
    command = ["cmake", "-S", str(native.sources_folder()), "-B", str(tmp_path), *options]
    environment = {**os.environ, "CUDACXX": str(tmp_path / "no-such-nvcc")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    assert ("jpq: no nvcc: CUDA kernels and TensorRT plugin left out" in done.stdout) == said
    cache = (tmp_path / "CMakeCache.txt").read_text()
    assert "jpq_core_SOURCE_DIR" in cache
    assert "jpq_tensorrt_SOURCE_DIR" not in cache
