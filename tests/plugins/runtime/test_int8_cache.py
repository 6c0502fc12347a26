"""The C runtime on a bundle with an int8 key/value cache: the same tokens as Python, under the sanitizers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from jpq_export.format.spec import INT8_CACHE
from jpq_export.runtime.generate import generate
from jpq_export.runtime.session import OrtModel

PROMPT = [3, 4, 5, 6, 2, 9]


@pytest.fixture(scope="module")
def int8_folder(tmp_path_factory: Any, conftest_of: Any) -> Path:
    tiny = conftest_of("runtime")
    return tiny.write_bundle(tmp_path_factory.mktemp("int8") / "tiny", replace(tiny.SPEC, kv_cache=INT8_CACHE))


def test_greedy_tokens_are_those_of_python(harness: Any, int8_folder: Path) -> None:
    model = OrtModel(int8_folder / "model.onnx", threads=1)
    expected = list(generate(model, PROMPT, max_new_tokens=18, stop_ids=[]))
    done = harness("ids", "none", int8_folder, 18, *PROMPT)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert [int(line) for line in done.stdout.split()] == expected
    other = harness("ids", "none", int8_folder, 18, *PROMPT[::-1])
    assert [int(line) for line in other.stdout.split()] != expected
    full = harness("ids", "none", int8_folder, 19, *PROMPT, 1)
    assert full.returncode == 3
    assert b"24 positions" in full.stderr


def test_a_model_without_rotation_gives_the_tokens_of_python(harness: Any, tmp_path: Path, conftest_of: Any) -> None:
    tiny = conftest_of("runtime")
    folder = tiny.write_bundle(tmp_path / "gpt2", replace(tiny.GPT2, kv_cache=INT8_CACHE))
    expected = list(generate(OrtModel(folder / "model.onnx", threads=1), PROMPT, max_new_tokens=18, stop_ids=[]))
    done = harness("ids", "none", folder, 18, *PROMPT)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert [int(line) for line in done.stdout.split()] == expected
    other = harness("ids", "none", folder, 18, *PROMPT[::-1])
    assert [int(line) for line in other.stdout.split()] != expected


def test_a_cache_tensor_of_another_type_is_refused_by_name(harness: Any, int8_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(int8_folder, tmp_path / "own"))
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    present = next(value for value in graph.graph.output if value.name == "present.0.key")
    cast = onnx.helper.make_node("Cast", ["present.0.key"], ["present.0.wide"], to=onnx.TensorProto.INT32)
    graph.graph.node.append(cast)
    present.name, present.type.tensor_type.elem_type = "present.0.wide", onnx.TensorProto.INT32
    onnx.save(graph, folder / "model.onnx")
    done = harness("ids", "none", folder, 2, *PROMPT)
    assert done.returncode == 3
    assert b"present.0.wide is not float32" in done.stderr
