"""The plugin without a library: what makes it unusable, and what TensorRT's builder is told, by NVIDIA's own Python.

Nothing here builds an engine or runs a kernel: that needs TensorRT and a GPU.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from jpq_export.cli import main
from jpq_export.engine import aot
from jpq_export.engine import build as steps
from jpq_export.engine.plugin import PluginError
from jpq_export.engine.preflight import preflight
from jpq_export.format.bundle import hash_file, read_manifest, write_manifest

HERE = Path(__file__).parent
MATMUL = {"op": "LowBitMatMul", "bits": 3, "group_size": 64}
KERNELS = (
    {**MATMUL, "symmetric": True, "bias": True, "tactic": 1, "grid": [("N", 8), ("one", 1), ("rows", 1)]},
    {**MATMUL, "symmetric": True, "bias": True, "tactic": 2, "grid": [("N", 2), ("one", 1), ("rows", 8)]},
    {**MATMUL, "symmetric": False, "bias": False, "tactic": 1, "grid": [("N", 8), ("one", 1), ("rows", 1)]},
    {"op": "LowBitGather", "bits": 16, "group_size": 32, "symmetric": False, "bias": False, "tactic": 1}
    | {"grid": [("rows", 1), ("K", 1024), ("one", 1)]},
)
BIASED, ZEROS = ["rows", "N", "K", "bias_length"], ["N", "K", "zero_row_bytes"]
SCALARS = (BIASED, BIASED, ["rows", *ZEROS], ZEROS)


@pytest.fixture
def kernels(bundle):
    """Kernels for sm_87 and the bundle's graph, listed in its manifest; their PTX is a word each."""
    folder = bundle / aot.FOLDER
    folder.mkdir()
    entries = []
    for i, (about, scalars) in enumerate(zip(KERNELS, SCALARS, strict=True)):
        text = f"ptx {i}"
        (folder / f"{i}.ptx").write_text(text)
        made = {"sm": 87, "entry_point": f"kernel_{i}", "threads": 32 * (i + 1), "shared_bytes": 100 + i}
        made |= {"scalars": scalars, "file": f"{i}.ptx", "sha256": hashlib.sha256(text.encode()).hexdigest()}
        entries.append(about | made)
    manifest = read_manifest(bundle)
    graph = manifest.files["model.trt.onnx"].sha256
    (bundle / aot.MANIFEST).write_text(json.dumps({"format": aot.FORMAT, "graph_sha256": graph, "kernels": entries}))
    listed = {p.relative_to(bundle).as_posix(): hash_file(p) for p in folder.iterdir()}
    write_manifest(bundle, replace(manifest, files={**manifest.files, **listed}))
    return folder


@pytest.fixture
def thor(board):
    """The described board with a TensorRT that has ahead-of-time plugins, and no compilers."""
    return replace(board, tensorrt="10.16.1", tools={})


def plugin_check(bundle, board, settings):
    checks = preflight(read_manifest(bundle), board, replace(settings, aot=True))
    return next(check for check in checks if check.name == "plugin")


def test_kernels_of_this_graph_and_gpu_pass_without_compilers(kernels, bundle, thor, settings):
    check = plugin_check(bundle, thor, settings)
    assert check.passed
    assert "4 kernels compiled ahead of time" in check.got


def change_graph(bundle):
    path = bundle / aot.MANIFEST
    path.write_text(path.read_text().replace('"graph_sha256": "', '"graph_sha256": "0'))


UNUSABLE = {
    "TensorRT 10.3 has no ahead-of-time plugins": ({"tensorrt": "10.3.0"}, None),
    "for sm_87; python -m jpq_kernels.aot BUNDLE --sm 110": ({"sm": 110}, None),
    "compiled for another graph": ({}, change_graph),
    "2.ptx: sha256 is not the recorded one": ({}, lambda bundle: (bundle / "aot" / "2.ptx").write_text("other")),
    "manifest.json: not in this bundle": ({}, lambda bundle: (bundle / aot.MANIFEST).unlink()),
    "manifest.json: not readable": ({}, lambda bundle: (bundle / aot.MANIFEST).write_text("{}")),
}


@pytest.mark.parametrize("words", UNUSABLE)
def test_what_makes_them_unusable_is_said_with_the_way_out(kernels, bundle, thor, settings, words):
    change, damage = UNUSABLE[words]
    if damage:
        damage(bundle)
    check = plugin_check(bundle, replace(thor, **change), settings)
    assert not check.passed
    assert words in check.line
    assert "\n" not in check.line
    assert "--plugin library" in check.line


NODES = [
    {"op": "LowBitMatMul", "K": 128, "N": 9, "bits": 3, "group_size": 64, "symmetric": 1}
    | {"inputs": [["FLOAT", [1, -20, 128]], ["UINT8", [9, 48]], ["HALF", [9, 2]], ["FLOAT", [9]]]},
    {"op": "LowBitMatMul", "K": 128, "N": 9, "bits": 3, "group_size": 64, "symmetric": 0}
    | {"inputs": [["FLOAT", [-20, 128]], ["UINT8", [9, 48]], ["HALF", [9, 2]], ["UINT8", [9, 1]]]},
    {"op": "LowBitGather", "K": 192, "N": 9, "bits": 16, "group_size": 32, "symmetric": 0}
    | {"inputs": [["INT64", [1, -20]], ["UINT8", [9, 39]], ["HALF", [9, 6]], ["UINT8", [9, 2]]]},
]


def ask_nvidia(bundle, nodes, sm=87):
    """Run `aot_server.py`; skips without NVIDIA's package."""
    if importlib.util.find_spec("tensorrt_dispatch_bindings") is None:
        pytest.skip("no tensorrt.plugin: pip install tensorrt-dispatch-cu13-bindings tensorrt-dispatch-cu13-libs")
    listed = [
        {"op": node["op"], "inputs": node["inputs"], "attributes": [(name, node[name]) for name in aot.ATTRIBUTES]}
        for node in nodes
    ]
    command = [sys.executable, str(HERE / "aot_server.py"), str(bundle), str(sm), json.dumps(listed)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)


def test_nvidias_builder_side_is_told_shapes_kernels_and_launches(kernels, bundle):
    done = ask_nvidia(bundle, NODES)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers["registered"] == [True, True]
    biased, plain, gather = answers["nodes"]
    assert biased["out"] == {"type": "FLOAT", "shape": ["1", "dim1", "9"]}
    assert biased["types"] == ["FLOAT", "UINT8", "HALF", "FLOAT", "FLOAT"]
    assert [(one["tactic"], one["entry"], one["ptx"]) for one in biased["launches"]] == [
        *((1, "kernel_0", "ptx 0"), (2, "kernel_1", "ptx 1"))
    ]
    one, eight = (launch["launch"] for launch in biased["launches"])
    assert [one[f"grid_{axis}"] for axis in "xyz"] == [2, 1, 20]  # 9 rows of W by 8; 20 rows of X
    assert [eight[f"grid_{axis}"] for axis in "xyz"] == [5, 1, 3]
    assert (one["block_x"], one["shared_mem"]) == (32, 100)
    assert biased["launches"][1]["symbolic"]["grid_z"] == "CEIL_DIV(PROD(1, dim1), 8)"  # follows the shape at run time
    assert biased["launches"][0]["scalars"] == [20, 9, 128, 9]
    assert (plain["launches"][0]["entry"], plain["launches"][0]["scalars"]) == ("kernel_2", [20, 9, 128, 1])
    assert gather["out"] == {"type": "FLOAT", "shape": ["1", "dim1", "192"]}
    assert (gather["launches"][0]["entry"], gather["launches"][0]["scalars"]) == ("kernel_3", [9, 192, 2])


def test_twin_a_layout_or_type_without_a_kernel_stops_it(kernels, bundle):
    bare = NODES[0] | {"inputs": NODES[0]["inputs"][:3]}
    done = ask_nvidia(bundle, [bare])
    assert done.returncode != 0
    assert "no kernel for op LowBitMatMul, bits 3, group_size 64, symmetric True, bias False on sm_87" in done.stderr
    half = NODES[0] | {"inputs": [["HALF", [1, -20, 128]], *NODES[0]["inputs"][1:]]}
    done = ask_nvidia(bundle, [half])
    assert done.returncode != 0
    assert "HALF in, HALF out: compiled for fp32" in done.stderr


class FakeModule(SimpleNamespace):
    """NOT `tensorrt.plugin`: notes what is registered, in order."""

    def __init__(self):
        kinds = ("TensorDesc", "AutoTuneCombination", "KernelLaunchParams", "SymExprs")
        super().__init__(noted=[], **{kind: type(kind, (), {}) for kind in kinds})

    def __getattr__(self, name):
        def decorator(plugin):
            return lambda function: self.noted.append((name, plugin)) or function

        return decorator


def test_build_registers_them_and_loads_no_library(kernels, bundle, thor, settings, monkeypatch):
    asked, fake = [], FakeModule()
    modules = {"tensorrt": (SimpleNamespace(Logger=lambda _l: None), None), "tensorrt.plugin": (fake, None)}
    modules["tensorrt"][0].Logger.WARNING = 1
    monkeypatch.setattr(steps, "import_tensorrt", lambda name="tensorrt": modules[name])
    monkeypatch.setattr(steps, "read_device", lambda _out: thor)

    def build(*_args, **_keywords):
        asked.append(list(fake.noted))
        raise PluginError("as far as this test goes")

    monkeypatch.setattr(steps, "build_engine", build)
    done = CliRunner().invoke(main, ["build", str(bundle), "--plugin", "aot"])
    assert "as far as this test goes" in done.output
    each = ("register", "autotune", "aot_impl")
    assert asked == [[(kind, f"jpq::{op}") for op in aot.INPUTS for kind in each]]
    done = CliRunner().invoke(main, ["build", str(bundle), "--plugin", "aot", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "plugin: kernels compiled ahead of time" in done.output
    assert "cmake" not in done.output


def test_without_nvidias_module_it_is_one_line(kernels, bundle, thor, monkeypatch):
    modules = {"tensorrt": (SimpleNamespace(Logger=lambda _l: None), None), "tensorrt.plugin": (None, "no such module")}
    modules["tensorrt"][0].Logger.WARNING = 1
    monkeypatch.setattr(steps, "import_tensorrt", lambda name="tensorrt": modules[name])
    monkeypatch.setattr(steps, "read_device", lambda _out: thor)
    done = CliRunner().invoke(main, ["build", str(bundle), "--plugin", "aot"])
    assert done.exit_code == 1
    assert "no Python module tensorrt.plugin (no such module); use --plugin library" in done.output


def test_a_library_is_still_taken_by_its_name_or_its_file(bundle, board, settings, monkeypatch):
    monkeypatch.setattr(steps, "read_device", lambda _out: board)
    done = CliRunner().invoke(main, ["build", str(bundle), "--plugin", "library", "--dry-run"])
    assert "plugin: compile the bundle's sources" in done.output
    done = CliRunner().invoke(main, ["build", str(bundle), "--plugin", "absent.so", "--dry-run"])
    assert "--plugin absent.so: no such file" in done.output
