"""plugins/runtime, the C library, under the sanitizers: the same tokens as Python; hostile files are refused."""

import json
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest

from jpq_export.format.bundle import hash_file
from jpq_export.runtime.generate import generate
from jpq_export.runtime.session import OrtModel


def refused(done):
    """Code and line of a refusal; fails when the program did anything else, a sanitizer's report included."""
    assert done.returncode == 3, done.stderr.decode()[-3000:]
    code, text = done.stderr.decode().splitlines()[-1].split(" ", 1)
    return int(code), text


BAD_ARGUMENT, BAD_BUNDLE, UNSUPPORTED, BACKEND = 1, 2, 3, 4


@pytest.mark.parametrize("with_kernels", [False, True])
def test_greedy_tokens_are_those_of_python(harness, bundle_folder, library, with_kernels):
    prompt = [3, 4, 5, 6, 2, 9]
    model = OrtModel(bundle_folder / "model.onnx", threads=1)
    expected = list(generate(model, prompt, max_new_tokens=18, stop_ids=[]))
    done = harness("ids", str(library.path) if with_kernels else "none", bundle_folder, 18, *prompt)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert [int(line) for line in done.stdout.split()] == expected
    assert (b"jpq kernels" in done.stderr) == with_kernels
    other = harness("ids", "none", bundle_folder, 18, *prompt[::-1])
    assert [int(line) for line in other.stdout.split()] != expected


def test_the_head_reads_the_last_token_only(harness, own_bundle):
    """In C and in Python: where a graph gives no logits unless it is asked for some, there are the same tokens."""
    expected = list(generate(OrtModel(own_bundle / "model.onnx"), [3, 4, 5, 6], max_new_tokens=8, stop_ids=[]))
    graph = onnx.load(own_bundle / "model.onnx", load_external_data=False)
    default = next(tensor for tensor in graph.graph.initializer if tensor.name == "logits_from")
    default.CopyFrom(onnx.numpy_helper.from_array(np.array([1 << 20]), "logits_from"))
    onnx.save(graph, own_bundle / "model.onnx")
    model = OrtModel(own_bundle / "model.onnx")
    assert model.forward(np.array([[3, 4, 5, 6]])).logits.shape[1] == 0
    assert list(generate(model, [3, 4, 5, 6], max_new_tokens=8, stop_ids=[])) == expected
    done = harness("ids", "none", own_bundle, 8, 3, 4, 5, 6)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert [int(line) for line in done.stdout.split()] == expected


@pytest.mark.parametrize("with_kernels", [False, True])
def test_learned_positions_give_the_tokens_of_python(harness, tmp_path, conftest_of, library, with_kernels):
    tiny, prompt, kernels = conftest_of("runtime"), [3, 4, 5, 6, 2, 9], str(library.path) if with_kernels else "none"
    folder = tiny.write_bundle(tmp_path / "gpt2", spec=tiny.GPT2)
    expected = list(generate(OrtModel(folder / "model.onnx", threads=1), prompt, max_new_tokens=18, stop_ids=[]))
    done = harness("ids", kernels, folder, 18, *prompt)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert [int(line) for line in done.stdout.split()] == expected
    assert (b"jpq kernels" in done.stderr) == with_kernels
    code, text = refused(harness("ids", kernels, folder, 2, *([3] * 24)))
    assert (code, "1 tokens after 24 need more" in text) == (BAD_ARGUMENT, True)


@pytest.mark.parametrize(
    ("ids", "count", "said"),
    [
        ([40], 1, "token 40 is not in the model's vocabulary of 40"),
        ([-1], 1, "token -1"),
        ([3] * 25, 1, "25 tokens after 0 need more than the sequence's 24 positions"),
        ([3] * 24, 2, "1 tokens after 24 need more"),
    ],
)
def test_wrong_tokens_are_refused(harness, bundle_folder, ids, count, said):
    code, text = refused(harness("ids", "none", bundle_folder, count, *ids))
    assert code == BAD_ARGUMENT
    assert said in text


def test_loading_a_hundred_times_does_not_grow(bundle_folder, library, plain_harness, onnxruntime_library):
    for kernels in ("none", library.path):
        command = [plain_harness, "load", onnxruntime_library, kernels, bundle_folder, "100"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        lines = [line.split() for line in done.stdout.splitlines()]
        resident, own = [int(line[0]) for line in lines], [int(line[1]) for line in lines]
        assert len(own) == 100, done.stderr[-3000:]
        assert max(own[60:]) - max(own[20:60]) < 512, own  # kB; a leaked session would be 40 x 100
        assert sum(after > before for before, after in pairwise(resident[60:])) < 20, resident  # as a leaked file would


def change_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


ZERO = {"sha256": "0" * 64, "bytes": 1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(format="jpq-bundle/9"), 'expected "format": "jpq-bundle/1", got \'jpq-bundle/9\''),
        (lambda m: m.pop("format"), "got 'none'"),
        (lambda m: m.update(files=[]), "no files"),
        (lambda m: m["files"].update({"../x": ZERO}), "'../x' points outside the bundle"),
        (lambda m: m["files"].update({"/etc/passwd": ZERO}), "points outside"),
        (lambda m: m["files"].update({"a/../../x": ZERO}), "points outside"),
        (lambda m: m["files"].update({"a//x": ZERO}), "points outside"),
        (lambda m: m["files"].update({"c:x": ZERO}), "points outside"),
        (lambda m: m["files"].update({"a\0b": ZERO}), "points outside"),
        (lambda m: m["files"].update({"": ZERO}), "points outside"),
        (lambda m: m["files"].update({"x": {"sha256": "0" * 63, "bytes": 1}}), "malformed manifest (files, x)"),
        (lambda m: m["files"].update({"x": {"sha256": "0" * 64, "bytes": -1}}), "malformed manifest (files, x)"),
        (lambda m: m["files"].update({"x": None}), "malformed manifest (files, x)"),
    ],
)
def test_a_hostile_manifest_is_refused(harness, own_bundle, change, said):
    change_manifest(own_bundle, change)
    code, text = refused(harness("ids", "none", own_bundle, 1, 3))
    assert code == BAD_BUNDLE
    assert said in text


def test_a_kernel_library_of_the_bundle_is_loaded_only_with_the_manifests_hash(harness, own_bundle, library):
    plugins = own_bundle / "plugins"
    plugins.mkdir()
    path = Path(shutil.copy(library.path, plugins / "libjpq_cpu.so"))
    entry = hash_file(path)
    change_manifest(
        own_bundle,
        lambda m: m["files"].update({"plugins/libjpq_cpu.so": {"sha256": entry.sha256, "bytes": entry.bytes}}),
    )
    done = harness("ids", "", own_bundle, 1, 3)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert b"jpq kernels" in done.stderr
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, text = refused(harness("ids", "", own_bundle, 1, 3))
    assert code == BAD_BUNDLE
    assert f"expected sha256 {entry.sha256[:12]}..., got " in text


def test_check_finds_every_damaged_file(harness, own_bundle):
    assert harness("ids", "none", own_bundle, 1, 3, CHECK="1").returncode == 0
    for path in [path for path in own_bundle.iterdir() if path.name != "manifest.json"]:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        code, text = refused(harness("ids", "none", own_bundle, 1, 3, CHECK="1"))
        assert code == BAD_BUNDLE
        assert f"{path.name}: expected sha256" in text
        path.write_bytes(content[:-1])
        assert "bytes, got" in refused(harness("ids", "none", own_bundle, 1, 3, CHECK="1"))[1]
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "expected"), [("manifest.json", BAD_BUNDLE), ("tokenizer.json", BAD_BUNDLE), ("model.onnx", BACKEND)]
)
def test_a_file_cut_short_is_refused(harness, own_bundle, name, expected):
    path = own_bundle / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    code, text = refused(harness("ids", "none", own_bundle, 1, 3))
    assert code == expected
    assert name in text


@pytest.mark.parametrize(
    ("key", "value", "kinds"),
    [
        ("vocab", 41, (BAD_BUNDLE, BACKEND)),  # more than the graph gives: would be read beyond its end
        ("vocab", 7, (BAD_BUNDLE, BACKEND)),  # fewer: would be written beyond ours
        ("vocab", 2**40, (BAD_BUNDLE,)),
        ("head_dim", 8, (BACKEND,)),
        ("head_dim", 4097, (BAD_BUNDLE,)),
        ("layers", [], (BAD_BUNDLE,)),
        ("layers", [{"kv_heads": 4}] * 3, (BACKEND,)),
        ("max_positions", -1, (BAD_BUNDLE,)),
        ("eos_ids", ["x"], (BAD_BUNDLE,)),
    ],
)
@pytest.mark.parametrize("prompt", [(3,), (3, 4, 5)])
def test_facts_that_are_not_the_graphs_are_refused(harness, own_bundle, key, value, kinds, prompt):
    graph = onnx.load(own_bundle / "model.onnx", load_external_data=False)
    entry = next(entry for entry in graph.metadata_props if entry.key == "jpq.spec")
    entry.value = json.dumps(json.loads(entry.value) | {key: value})
    onnx.save(graph, own_bundle / "model.onnx")
    code, text = refused(harness("ids", "none", own_bundle, 2, *prompt))
    assert code in kinds
    assert text
