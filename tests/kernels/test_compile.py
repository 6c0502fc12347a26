"""Ahead-of-time compilation for every device, without a GPU: files, manifest, registers, the same bytes twice."""

import hashlib
import json
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is only built for Linux on x86-64")

TARGETS = (87, 89, 90, 110, 120)
WIDEST = ("--bits", "5", "--group-size", "64", "--zero-points", "asymmetric")  # 5 words a unit: the most registers
ONE = ("--bits", "3", "--group-size", "64", "--zero-points", "symmetric", "--x", "fp16")
# Kernels of one layout: few rows, many rows, gather, sum of the splits.
FP16 = (1, 2, 4, 16, 64, 128, "gather", "add_splits")
FP32 = (1, 2, 4, 8, 64, 128, "gather", "add_splits")


def run(environment, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "jpq_kernels.compile", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def compiled(environment, folder, *arguments):
    done = run(environment, "--out", str(folder), *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "manifest.json").read_text())["kernels"]


@pytest.fixture(scope="module")
def all_targets(compiler_environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("all")
    only = [option for name in ("few_rows_1_", "many_rows_64") for option in ("--only", name)]
    return folder, compiled(compiler_environment, folder, *ONE, *only)


def test_every_target_gets_every_kernel(all_targets):
    folder, kernels = all_targets
    names = {kernel["name"] for kernel in kernels}
    assert len(names) == 2
    assert {(kernel["name"], kernel["sm"]) for kernel in kernels} == {(name, sm) for name in names for sm in TARGETS}
    for kernel in kernels:
        for ending, file in kernel["files"].items():
            body = (folder / file["name"]).read_bytes()
            assert hashlib.sha256(body).hexdigest() == file["sha256"]
            assert body.startswith(b"\x7fELF" if ending == "cubin" else b"//")
        ptx = (folder / kernel["files"]["ptx"]["name"]).read_text()
        assert f".target sm_{kernel['sm']}" in ptx
        assert f".entry {kernel['entry_point']}(" in ptx
        assert ".loc" not in ptx  # line information would carry this machine's paths
        assert ".py" not in ptx
        assert f".reqntid {kernel['threads']}" in ptx


def test_no_kernel_spills_registers_on_any_target(all_targets):
    assert [k["name"] for k in all_targets[1] if k["spill_bytes"] or not 0 < k["registers"] <= 255] == []


def test_the_manifest_says_how_to_launch(all_targets):
    kernel = next(k for k in all_targets[1] if k["name"] == "few_rows_1_b3_g64_sym_fp16")
    assert [(a["name"], a["type"]) for a in kernel["arguments"]] == [
        *(("x", "*fp16"), ("packed", "*i32"), ("scales", "*fp16"), ("zeros", "*u8"), ("bias", "*fp32")),
        *(("out", "*fp16"), ("workspace", "*fp32"), ("rows", "int32"), ("N", "int32"), ("K", "int32")),
        *(("bias_length", "int32"), ("zero_row_bytes", "int32"), ("split_units", "int32")),
        *(("global_scratch", "null"), ("profile_scratch", "null")),
    ]
    assert kernel["grid"] == ["ceil(N / 8)", "splits", "ceil(rows / 1)"]
    assert kernel["split_units"] == "ceil(K / 32 / splits)"
    assert (kernel["threads"], kernel["constants"]["BITS"], kernel["block_rows"]) == (32, 3, 1)
    assert {a["name"]: a["multiple_of"] for a in kernel["arguments"]}["packed"] == 1
    assert {a["name"]: a["multiple_of"] for a in kernel["arguments"]}["x"] == 16


def test_no_tile_spills_registers_at_the_width_that_needs_most(compiler_environment, tmp_path):
    kernels = compiled(compiler_environment, tmp_path, *WIDEST, "--sm", "87")
    assert len(kernels) == len(FP16) + len(FP32)
    assert {k["name"]: k["spill_bytes"] for k in kernels if k["spill_bytes"]} == {}


def test_no_ternary_kernel_spills_registers(compiler_environment, tmp_path):
    ternary = ("--bits", "1.6", "--group-size", "64", "--zero-points", "asymmetric", "--x", "fp32", "--sm", "87")
    kernels = compiled(compiler_environment, tmp_path, *ternary)
    assert len(kernels) == len(FP32)
    assert {k["constants"]["BITS"] for k in kernels if k["name"] != "add_splits_fp32"} == {16}
    assert {k["name"]: k["spill_bytes"] for k in kernels if k["spill_bytes"]} == {}
    assert "few_rows_1_ternary_g64_asym_fp32" in {k["name"] for k in kernels}


def test_no_kernel_of_normal_levels_spills_registers(compiler_environment, tmp_path):
    normal = ("--bits", "normal4", "--group-size", "64", "--x", "fp32", "--sm", "87", "--only", "few_rows")
    kernels = compiled(compiler_environment, tmp_path, *normal)
    assert {k["constants"]["BITS"] for k in kernels} == {36}
    assert {k["constants"]["SYMMETRIC"] for k in kernels} == {True}
    assert {k["name"]: k["spill_bytes"] for k in kernels if k["spill_bytes"]} == {}
    assert "few_rows_1_normal4_g64_sym_fp32" in {k["name"] for k in kernels}


def test_twin_a_tile_that_is_too_large_is_seen_to_spill(compiler_environment):
    code = """
from jpq_kernels.compile import compile_variant
from jpq_kernels.low_bit_matmul import ManyRowsTile
from jpq_kernels.variants import many_rows
from jpq_kernels.weight import layout_of
tile = ManyRowsTile(block_m=128, block_n=128, num_warps=4, num_stages=2)
print(compile_variant(many_rows(layout_of(4, 64, symmetric=True), "fp16", tile), 87)[1]["spill_bytes"])
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=compiler_environment, capture_output=True, text=True, timeout=280, check=True)
    assert int(done.stdout) > 0


def test_the_same_bytes_twice_and_with_several_processes(compiler_environment, tmp_path, all_targets):
    only = ("--only", "few_rows_1_", "--only", "many_rows_64", "--sm", "87", "--jobs", "2")
    first = {(k["name"], k["sm"]): k for k in all_targets[1]}
    again = compiled(compiler_environment, tmp_path, *ONE, *only)
    assert len(again) == 2
    assert all(kernel == first[kernel["name"], kernel["sm"]] for kernel in again)


REFUSED = {
    "no kernel begins with fast": ("--only", "fast"),
    "'75' is not one of": ("--sm", "75"),
    "group_size 12 is not made of whole bytes at 3 bits": ("--bits", "3", "--group-size", "12"),
}


def test_what_cannot_be_compiled_is_refused_in_one_line(compiler_environment, tmp_path):
    code = f"""
from click.testing import CliRunner
from jpq_kernels.compile import main
for message, arguments in {REFUSED}.items():
    result = CliRunner().invoke(main, ["--out", {str(tmp_path / "none")!r}, *arguments])
    assert result.exit_code == 2, result
    assert message in result.output, result.output
print("refused")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=compiler_environment, capture_output=True, text=True, timeout=280, check=True)
    assert done.stdout == "refused\n"
    assert not (tmp_path / "none").exists()


def test_the_interpreter_cannot_compile(compiler_environment, tmp_path):
    done = run(compiler_environment | {"TRITON_INTERPRET": "1"}, "--out", str(tmp_path))
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 replaces Triton's compiler" in done.stderr
    assert "Traceback" not in done.stderr
