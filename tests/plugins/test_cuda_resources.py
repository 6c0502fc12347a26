"""The CUDA kernels compile for every GPU we name, and none spills: the record, and one width compiled now."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "cuda_resources.py"
KERNELS = 13 * 3 + 13 * 2 + 2  # widths times tiles of few rows, widths times fp16 and fp32 X, add_parts and gather_rows


def load_tool():
    spec = importlib.util.spec_from_file_location("cuda_resources", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool():
    return load_tool()


def problems(record, tool):
    """Why a record does not hold, in words."""
    found = []
    if record["sources_sha256"] != tool.sources_sha256():
        found.append("not of these sources: run python tools/cuda_resources.py")
    for name in tool.ARCHITECTURES:
        rows = record["architectures"].get(name, [])
        if len(rows) != KERNELS:
            found.append(f"{name}: {len(rows)} kernels, expected {KERNELS}")
        found += [f"{name}: {row['kernel']} spills" for row in rows if row["spill_bytes"] or row["stack_bytes"]]
        # 99 KiB: the least a block can have among these GPUs (8.9 and 12.0).
        found += [f"{name}: {row['kernel']} does not fit" for row in rows if row["shared_bytes"] > 99 * 1024]
    return found


def test_the_record_holds(tool):
    assert problems(json.loads(tool.RECORD.read_text()), tool) == []
    assert tool.TABLE.read_text() == tool.table(json.loads(tool.RECORD.read_text()))


def test_twin_a_spill_a_missing_gpu_and_old_sources_are_seen(tool):
    record = json.loads(tool.RECORD.read_text())
    record["architectures"]["sm_87"][3]["spill_bytes"] = 8
    del record["architectures"]["sm_120"]
    record["sources_sha256"] = "0" * 64
    assert len(problems(record, tool)) == 3


# The tile nearest to the limit of registers, one that is staged in shared memory, ternary codes, tensor cores.
TILES = """
#include "low_bit_matmul.cuh"
#include "low_bit_matmul_many.cuh"
template __global__ void jpq::few_rows<8, 4, 4>(jpq::Few);
template __global__ void jpq::few_rows<3, 16, 2>(jpq::Few);
template __global__ void jpq::few_rows<JPQ_TERNARY, 1, 4>(jpq::Few);
template __global__ void jpq::many_rows<3, true>(jpq::Many);
"""
SPILLING = """
__global__ void __launch_bounds__(1024, 2) spilling(float *p) {
  float v[96];
  for (int i = 0; i < 96; i++) v[i] = p[i * 32 + threadIdx.x];
  for (int n = 0; n < 9; n++)
    for (int i = 0; i < 96; i++) v[i] = v[i] * v[(i + 17) % 96] + v[(i + 31) % 96];
  for (int i = 0; i < 96; i++) p[i * 32 + threadIdx.x] = v[i];
}
"""


def compiled(tool, folder, architecture, source):
    """Resources of a source's kernels, compiled now; skips where there is no nvcc, or one too old for the GPU."""
    nvcc = tool.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc: the CUDA kernels are NOT compiled in this run; install CUDA 13")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if architecture not in known:
        pytest.skip(f"this nvcc knows no {architecture}: the CUDA kernels are NOT compiled for it; install CUDA 13")
    (folder / "one.cu").write_text(source)
    return tool.compile_for(nvcc, architecture, source=folder / "one.cu")


@pytest.mark.parametrize("architecture", load_tool().ARCHITECTURES)
def test_tiles_compiled_now_use_what_is_recorded(tool, tmp_path, architecture):
    rows = [row for row in compiled(tool, tmp_path, architecture, TILES) if "parts" not in row["kernel"]]
    assert len(rows) == 4
    assert [row["kernel"] for row in rows if row["spill_bytes"] or row["stack_bytes"]] == []
    record = json.loads(tool.RECORD.read_text())
    recorded = {row["kernel"]: row for row in record["architectures"][architecture]}
    assert {row["kernel"] for row in rows} <= set(recorded)
    if tool.release(tool.find_nvcc()) == record["nvcc"]:  # another one allots registers another way
        assert [recorded[row["kernel"]] for row in rows] == rows


def test_twin_a_kernel_that_spills_is_seen(tool, tmp_path):
    assert any(row["spill_bytes"] for row in compiled(tool, tmp_path, "sm_87", SPILLING))
