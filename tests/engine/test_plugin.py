"""Compiling the plugin on the board: commands, log, record; a shell script stands in for cmake. No nvcc runs here."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jpq_export.engine.plugin import PluginError, build_commands, choose, compile_plugin
from jpq_export.engine.settings import device_section
from jpq_export.format.bundle import read_manifest

GOOD = """#!/bin/sh
# A stand-in for cmake: writes a file where the library would be.
echo "called with $*"
if [ "$1" = --build ]; then mkdir -p "$2/lib"; echo library > "$2/lib/libjpq_tensorrt.so"; fi
"""
BAD = "#!/bin/sh\necho '/plugin.cpp:3: error: NvInfer.h: No such file'\nexit 2\n"
EMPTY = "#!/bin/sh\nexit 0\n"


@pytest.fixture
def tools(tmp_path):
    def do(script: str) -> dict[str, str]:
        path = tmp_path / "cmake"
        path.write_text(script)
        path.chmod(0o755)
        return {"cmake": str(path), "nvcc": "/usr/local/cuda/bin/nvcc"}

    return do


def find(settings, sm: int = 87, machine: str = "aarch64"):
    return choose(settings, device_section(read_manifest(settings.bundle)), sm=sm, machine=machine)


def test_it_is_compiled_once_with_log_and_record(settings, tools):
    said: list[str] = []
    assert find(settings) is None
    built = compile_plugin(settings, tools(GOOD), sm=87, machine="aarch64", say=said.append)
    assert built.path == settings.home / "libjpq_tensorrt.so"
    assert built.untouched
    assert len(said) == 2
    assert "-DCMAKE_CUDA_ARCHITECTURES=87" in said[0]
    assert said[0] in (settings.home / "plugin-build.log").read_text()
    assert find(settings) == built
    assert find(settings, sm=110) is None
    assert find(settings, machine="x86_64") is None


def test_a_touched_library_is_compiled_again(settings, tools):
    built = compile_plugin(settings, tools(GOOD), sm=87, machine="aarch64", say=lambda _text: None)
    built.path.write_bytes(b"touched")
    assert find(settings) is None


def test_changed_sources_are_compiled_again(settings, tools):
    compile_plugin(settings, tools(GOOD), sm=87, machine="aarch64", say=lambda _text: None)
    assert find(settings) is not None
    (settings.bundle / "plugins" / "core" / "low_bit.h").write_text("// newer")
    assert find(settings) is None


@pytest.mark.parametrize(("script", "words"), [(BAD, r"NvInfer\.h"), (EMPTY, "made no libjpq_tensorrt")])
def test_a_failing_build_is_one_line_with_its_log(settings, tools, script, words):
    with pytest.raises(PluginError, match=words) as caught:
        compile_plugin(settings, tools(script), sm=87, machine="aarch64", say=lambda _text: None)
    assert "plugin-build.log" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (settings.home / "plugin.json").exists()


def test_commands_name_sources_and_compiler(settings):
    configure, make = build_commands(settings, {"cmake": "/c", "nvcc": "/n"}, 110)
    assert configure[:3] == ["/c", "-S", str(settings.bundle / "plugins" / "tensorrt")]
    assert configure[-2:] == ["-DCMAKE_CUDA_ARCHITECTURES=110", "-DCMAKE_CUDA_COMPILER=/n"]
    assert make[:2] == ["/c", "--build"]


def test_a_record_of_another_form_is_no_record(settings, tools):
    compile_plugin(settings, tools(GOOD), sm=87, machine="aarch64", say=lambda _text: None)
    record: Path = settings.home / "plugin.json"
    raw = json.loads(record.read_text())
    del raw["abi"]
    record.write_text(json.dumps(raw))
    assert find(settings) is None
    assert find(replace(settings, out=settings.out)) is None
