"""The plugin compiled while exporting: which tools it takes, what it says without. Shell scripts stand in.

The real compilers run in tests/plugins/test_tensorrt.py, where they are installed.
"""

import json
import os
import platform
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from jpq_export.engine import prebuilt as cross
from jpq_export.engine.build import describe, prepare
from jpq_export.engine.contents import bundle_names
from jpq_export.engine.plugin import PluginError
from jpq_export.engine.prebuilt import add_prebuilt, find_cross_tools, reason_against
from jpq_export.engine.preflight import preflight
from jpq_export.format.bundle import Manifest, hash_file, read_manifest, write_manifest
from jpq_export.prove import _device_files

ELF = b"\x7fELF" + bytes(14) + b"\xb7\x00"
# Writes an ELF header for aarch64 and what SYMBOLS says where the last argument points; keeps the commands.
SCRIPT = """#!/bin/sh
echo "$(basename "$0") $*" >> "$(dirname "$0")/commands"
if [ "$1" = --version ]; then echo "Cuda compilation tools, release {release}, V"; exit 0; fi
for last; do true; done
printf '\\177ELF{zeros}\\267\\000{symbols}' > "$last"
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(release="12.6", symbols="")`: an exporting machine with everything; the file of commands."""
    toolkit, headers = tmp_path / "cuda", tmp_path / "headers"
    for path in (
        "cuda/bin",
        "cuda/include",
        "cuda/targets/aarch64-linux/lib",
        "cuda/targets/sbsa-linux/lib",
        "headers",
    ):
        (tmp_path / path).mkdir(parents=True)
    for path in ("aarch64-linux", "sbsa-linux"):
        (toolkit / "targets" / path / "lib" / "libcudart_static.a").write_bytes(b"")
    (headers / "NvInferRuntime.h").write_text("")
    (toolkit / "include" / "cuda_runtime.h").write_text("")
    (headers / "NvInferVersion.h").write_text(
        "#define TRT_MAJOR_ENTERPRISE 10\n#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE\n"
    )
    monkeypatch.setenv("JPQ_TENSORRT_INCLUDE", str(headers))
    monkeypatch.setattr(cross, "TOOLKITS", tmp_path)
    monkeypatch.delenv("JPQ_AARCH64_CUDA", raising=False)
    monkeypatch.setenv("PATH", f"{toolkit / 'bin'}:{os.environ['PATH']}")

    def do(release="12.6", symbols="GLIBC_2.34"):
        for name in ("nvcc", "aarch64-linux-gnu-g++"):
            path = toolkit / "bin" / name
            path.write_text(SCRIPT.format(release=release, zeros="\\000" * 14, symbols=symbols))
            path.chmod(0o755)
        return toolkit / "bin" / "commands"

    return do


def add(bundle, said, **changes):
    target = {"sm": 87, "tensorrt": "10.3", "cuda": "12.6"} | changes
    return add_prebuilt(bundle, say=said.append, **target)


def record(bundle, binaries):
    manifest: Manifest = read_manifest(bundle)
    files = {**manifest.files, **{raw["file"]: hash_file(bundle / raw["file"]) for raw in binaries}}
    write_manifest(bundle, replace(manifest, device={**(manifest.device or {}), "binaries": binaries}, files=files))


def test_it_is_compiled_recorded_and_carried(machine, bundle):
    commands, said = machine(), []
    binaries = add(bundle, said)
    name = "plugins/prebuilt/aarch64-sm_87/libjpq_tensorrt.so"
    versions = {"abi": 1, "machine": "aarch64", "tensorrt": 10, "cuda": 12}
    assert binaries == [{"file": name, "sha256": hash_file(bundle / name).sha256, "sms": [87], **versions}]
    assert name in bundle_names(bundle)
    assert said[1:] == ["plugin compiled for aarch64, sm_87, CUDA 12: 0.0 MB, not run"]
    ran = commands.read_text().splitlines()
    assert [line.split()[0] for line in ran] == ["nvcc", "nvcc", "aarch64-linux-gnu-g++", "aarch64-linux-gnu-g++"]
    assert "-gencode arch=compute_87,code=sm_87" in ran[1]
    assert "targets/aarch64-linux/lib/libcudart_static.a" in ran[-1]


def test_the_other_platform_from_cuda_13_on(machine, bundle):
    commands = machine(release="13.0")
    assert add(bundle, [], sm=110, tensorrt="10.13", cuda="13.0")[0]["cuda"] == 13
    assert "targets/sbsa-linux/lib/libcudart_static.a" in commands.read_text()


@pytest.mark.parametrize(
    ("release", "changes", "words"),
    [
        ("13.0", {}, ["nvcc of CUDA 12"]),
        ("12.6", {"cuda": "13.0"}, ["nvcc of CUDA 13"]),
        ("12.6", {"cuda": None}, ["the target file names no cuda version"]),
        ("12.6", {"tensorrt": "11.0"}, ["headers of TensorRT 11", "JPQ_TENSORRT_INCLUDE"]),
    ],
)
def test_tools_of_another_version_are_said_in_one_line(machine, bundle, monkeypatch, release, changes, words):
    machine(release=release)
    monkeypatch.setattr(cross, "HEADER_FOLDERS", ())
    said: list[str] = []
    assert add(bundle, said, **changes) == []
    assert len(said) == 1
    for word in (*words, "the board compiles its sources"):
        assert word in said[0]
    assert not (bundle / "plugins" / "prebuilt").exists()


def test_everything_that_is_missing_is_listed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cross, "HEADER_FOLDERS", ())
    monkeypatch.setattr(cross, "find_tool", lambda _name: None)
    for name in ("JPQ_TENSORRT_INCLUDE", "JPQ_AARCH64_CUDA"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PluginError) as caught:
        find_cross_tools(tensorrt="10.3", cuda="9.0")
    for word in ("nvcc of CUDA 9", "g++-aarch64-linux-gnu", "headers of TensorRT 10", "libcudart_static.a"):
        assert word in str(caught.value)


def test_a_compiler_that_fails_is_said_and_the_export_goes_on(machine, bundle):
    commands, said = machine(), []
    path = commands.with_name("aarch64-linux-gnu-g++")
    path.write_text("#!/bin/sh\necho 'plugin.cpp:3: error: no such thing' >&2\nexit 1\n")
    assert add(bundle, said) == []
    assert "aarch64-linux-gnu-g++ fails: plugin.cpp:3: error: no such thing" in said[-1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (ELF + b"\0GLIBC_2.35\0GLIBCXX_3.4.30\0CXXABI_1.3\0", None),
        (ELF + b"\0GLIBC_2.36\0", "needs GLIBC 2.36, and boards have 2.35"),
        (ELF + b"\0GLIBCXX_3.4.31\0", "needs GLIBCXX 3.4.31"),
        (ELF[:18] + b"\x3e\x00", "is not for aarch64"),
    ],
)
def test_a_library_that_boards_cannot_load_is_refused(content, reason):
    found = reason_against(content)
    assert found == reason if reason is None else reason in (found or "")


def test_a_library_that_boards_cannot_load_does_not_get_into_the_bundle(machine, bundle):
    machine(symbols="GLIBC_2.38")
    said: list[str] = []
    assert add(bundle, said) == []
    assert "needs GLIBC 2.38" in said[-1]
    assert not (bundle / "plugins" / "prebuilt").exists()


def test_what_a_killed_run_left_is_not_carried(machine, bundle, monkeypatch):
    machine()
    add(bundle, [])
    monkeypatch.setenv("JPQ_TENSORRT_INCLUDE", str(bundle))
    monkeypatch.setattr(cross, "HEADER_FOLDERS", ())
    assert add(bundle, []) == []
    assert not (bundle / "plugins" / "prebuilt").exists()


def board_check(bundle, board, settings, **changes):
    board = replace(board, machine="aarch64", **changes)
    checks = {check.name: check for check in preflight(read_manifest(bundle), board, settings)}
    return checks["plugin"], describe(prepare(settings, board))[0]


def test_the_board_uses_it(machine, bundle, board, settings):
    machine()
    record(bundle, add(bundle, []))
    check, step = board_check(bundle, board, settings, tools={})
    assert check.passed
    assert check.got.startswith("prebuilt, plugins/prebuilt/aarch64-sm_87/")
    assert step.startswith("plugin: prebuilt")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sm": 110}, "for sm_87"),
        ({"tensorrt": "11.0.0"}, "for TensorRT 10"),
        ({"cuda": "11.4"}, "for CUDA 12"),
        ({"cuda": None}, "for CUDA 12"),
    ],
)
def test_twin_another_board_compiles_and_says_why(machine, bundle, board, settings, changes, reason):
    machine()
    record(bundle, add(bundle, []))
    check, step = board_check(bundle, board, settings, **changes)
    assert check.passed
    assert "compiled here first" in check.got
    assert reason in check.got
    assert step == "plugin: compile the bundle's sources"
    without, _ = board_check(bundle, board, settings, tools={}, **changes)
    assert not without.passed


def test_a_newer_driver_and_a_newer_minor_version_are_fine(machine, bundle, board, settings):
    machine()
    record(bundle, add(bundle, []))
    check, _ = board_check(bundle, board, settings, cuda="13.0", tensorrt="10.7.0", tools={})
    assert check.passed


def test_a_malformed_record_is_refused(machine, bundle, board, settings):
    machine()
    record(bundle, [{**add(bundle, [])[0], "cuda": "12"}])
    assert json.loads((bundle / "manifest.json").read_text())["device"]["binaries"][0]["cuda"] == "12"
    with pytest.raises(Exception, match="device: malformed"):
        prepare(settings, replace(board, machine=platform.machine()))


@pytest.mark.parametrize(("kind", "sms"), [("jetson", [[87]]), ("rtx", [])])
def test_an_export_for_a_jetson_asks_for_it(machine, bundle, kind, sms):
    machine()
    target = SimpleNamespace(kind=kind, sm=87, tensorrt="10.3", cuda="12.6")
    export: Any = SimpleNamespace(
        work=SimpleNamespace(folder=bundle),
        request=SimpleNamespace(target=target),
        stages=SimpleNamespace(note=lambda _text: None),
    )
    assert [raw["sms"] for raw in _device_files(export, "10.3")["binaries"]] == sms
