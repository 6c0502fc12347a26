"""The CUDA kernels compile for every GPU we name, and none spills: the record, and one width compiled now."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "cuda_resources.py"
KERNELS = 9 * 3 + 9 * 2 + 2  # widths times tiles of few rows, widths times fp16 and fp32 X, add_parts and gather_rows


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


ONE_WIDTH = """
#include "low_bit_matmul.cuh"
#include "low_bit_matmul_many.cuh"
template __global__ void jpq::few_rows<3, 16, 2>(jpq::Few);
template __global__ void jpq::many_rows<3, {split}>(jpq::Many);
"""
SPILLING = """
__global__ void __launch_bounds__(1024, 2) spilling(float *p) {{
  float v[96];
  for (int i = 0; i < 96; i++) v[i] = p[i * 32 + threadIdx.x];
  for (int n = 0; n < 9; n++)
    for (int i = 0; i < 96; i++) v[i] = v[i] * v[(i + 17) % 96] + v[(i + 31) % 96];
  for (int i = 0; i < 96; i++) p[i * 32 + threadIdx.x] = v[i];
}}
"""


@pytest.mark.parametrize(("source", "spills"), [(ONE_WIDTH, False), (SPILLING, True)], ids=["ours", "twin"])
def test_a_width_compiled_now(tool, tmp_path, source, spills):
    nvcc = tool.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc: the CUDA kernels cannot be compiled here")
    (tmp_path / "one.cu").write_text(source.format(split="true"))
    rows = tool.compile_for(nvcc, "sm_87", source=tmp_path / "one.cu")
    assert len(rows) >= 1
    assert any(row["spill_bytes"] for row in rows) == spills
    recorded = json.loads(tool.RECORD.read_text())["architectures"]["sm_87"]
    if not spills:
        assert [row for row in rows if "few" in row["kernel"] or "many" in row["kernel"]]
        assert {row["kernel"] for row in rows if "parts" not in row["kernel"]} <= {row["kernel"] for row in recorded}
