"""Kernels for TensorRT's ahead-of-time plugins: real Triton and ptxas, no GPU. A launch passes what they read."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is only built for Linux on x86-64")

SERVER = """
import json, sys
from pathlib import Path
import numpy as np, onnx
from onnx import helper
from jpq_export.format.bundle import Manifest, read_manifest, write_manifest
from jpq_kernels import aot

folder = Path(sys.argv[1])
attributes = {"bits": 4, "K": 64, "N": 8, "group_size": 32, "domain": "jpq"}
inputs = ["x", "packed", "scales", "zeros", "bias"]
nodes = [
    helper.make_node("LowBitMatMul", inputs[:3], ["a"], symmetric=1, **attributes),
    helper.make_node("LowBitMatMul", inputs, ["b"], symmetric=0, **attributes),
    helper.make_node("LowBitMatMul", inputs[:3], ["c"], symmetric=1, **{**attributes, "N": 9}),
    helper.make_node("LowBitGather", inputs[:4], ["d"], symmetric=0, **{**attributes, "bits": 16}),
    helper.make_node("Add", ["a", "b"], ["e"]),
]
onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [])), folder / "model.trt.onnx")
about = {"model": {"name": "m"}, "target": {"name": "t"}, "method": "jpq"}
manifest = Manifest(**about, bits_per_weight=4.0, weight_bytes=1, original_bytes=2, device={"graph": "model.trt.onnx"})
write_manifest(folder, manifest.with_contents(folder))
print(json.dumps(aot.compile_bundle(folder, [int(sm) for sm in sys.argv[2:]])))
"""


def run(environment, *arguments):
    command = [sys.executable, "-c", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def compiled(compiler_environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    done = run(compiler_environment, SERVER, str(folder), "87", "110")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_each_layout_of_the_graph_once_for_each_device(compiled):
    folder, entries = compiled
    found = {(e["op"], e["symmetric"], e["bias"], e["tactic"], e["sm"]) for e in entries}
    matmuls = {("LowBitMatMul", *kind, tactic) for kind in ((True, False), (False, True)) for tactic in (1, 2)}
    assert found == {(*one, sm) for one in matmuls | {("LowBitGather", False, False, 1)} for sm in (87, 110)}
    assert len(entries) == len(found)
    assert all(entry["spill_bytes"] == 0 for entry in entries)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert {f"aot/{entry['file']}" for entry in entries} | {"aot/manifest.json", "model.trt.onnx"} == set(files)


INPUTS, SCALARS = ["x", "packed", "scales", "zeros", "bias"], ["rows", "N", "K", "bias_length", "zero_row_bytes"]
TRITON = [*INPUTS, "out", "workspace", *SCALARS, "split_units"]  # the order of few_rows_kernel
ORDER = {
    (True, False): ["x", "packed", "scales", "rows", "N", "K", "out"],
    (False, True): [*INPUTS, *SCALARS, "out"],
}


def test_parameters_are_inputs_then_scalars_then_the_output(compiled):
    folder, entries = compiled
    for entry in entries:
        if entry["op"] != "LowBitMatMul":
            continue
        ptx = (folder / "aot" / entry["file"]).read_text()
        head = ptx.split(".entry", 1)[1].split(")", 1)[0]
        listed = [TRITON[int(place)] for place in re.findall(r"_param_(\d+)", head)]
        assert listed == ORDER[entry["symmetric"], entry["bias"]]
        assert [name for name in listed if name in entry["scalars"]] == entry["scalars"]
        assert re.search(r"^\.version (8\.7|9\.0)$", ptx, re.MULTILINE)
        loaded = {TRITON[int(place)] for place in re.findall(r"\[\w+_param_(\d+)\]", ptx)}
        assert loaded <= set(listed)  # nothing is read that nobody passes
        assert {"x", "packed", "scales", "out", "N"} <= loaded


def test_the_device_side_reads_what_was_written(compiled):
    from jpq_export.engine.aot import read_kernels

    kernels = read_kernels(compiled[0])
    assert kernels.sms == (87, 110)
    found = kernels.of(("LowBitMatMul", 4, 32, False, True), 110)
    assert sorted(found) == [1, 2]
    assert found[2].ptx.startswith("//")


TWINS = """
from jpq_kernels.aot import CompileError, assemble, relist
ptx = open({path!r}).read()
names = [f"p{{i}}" for i in range(ptx.split(".entry")[1].split(")")[0].count(".param"))]
def wrong(what):
    try:
        what()
    except CompileError as error:
        print(error)
wrong(lambda: relist(ptx, names[1:], names[1:], {{}}))
wrong(lambda: assemble(relist(ptx, names, names[:-1], {{}}), 87))  # the output is still used, and nobody passes it
used = ptx.replace("ld.param.b64", "ld.param.v2.b64")
wrong(lambda: relist(used, names, names[1:], {{names[0]: 0}}))
"""


def test_twin_a_kernel_that_would_read_what_nobody_passes_is_refused(compiled, compiler_environment):
    folder, entries = compiled
    path = next(str(folder / "aot" / e["file"]) for e in entries if e["sm"] == 87 and e["op"] == "LowBitMatMul")
    done = run(compiler_environment, TWINS.format(path=path))
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 3
    assert re.match(r"a kernel takes \d+ parameters, expected \d+", said[0])
    assert said[1].startswith("ptxas refuses a rewritten kernel")
    assert said[2].startswith("parameter p0 of a kernel is more than loaded")


def test_what_cannot_be_compiled_is_one_line(compiler_environment, tmp_path):
    code = "from jpq_kernels.aot import main\nmain()"
    done = run(compiler_environment, code, str(tmp_path), "--sm", "87")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "not a bundle" in done.stderr
    assert Path(tmp_path, "aot").exists() is False
