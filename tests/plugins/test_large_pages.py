"""Codes of a file that move into pages of 2 MB: the same results, no memory twice, nothing left behind."""

import mmap
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from jpq_export.lower.export import export_onnx
from jpq_export.runtime.session import OrtModel

IDS = np.array([[3, 14, 15, 92, 65]])
LARGE, BLOCK = 2 << 20, 32 << 20  # what large_pages.c asks for at once

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
ort = pytest.importorskip("onnxruntime")


def why_not():
    """Why this system gives no pages of 2 MB; nothing where it does."""
    if not sys.platform.startswith("linux") or not SETTINGS.is_dir():
        return "no such pages here"
    if "[never]" in (SETTINGS / "enabled").read_text():
        return "switched off"
    return "" if (SETTINGS / "hpage_pmd_size").read_text() == f"{LARGE}\n" else "of another size"


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "there are")


@pytest.fixture(scope="module", params=[True, False], ids=["chained", "products"])
def graph(request, tmp_path_factory, conftest_of):
    """A model whose layers have some 100 KB of codes each, its weights in a file beside it."""
    tiny = conftest_of("lower")
    spec = tiny.SPECS["llama"]
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    layers = tuple(replace(layer, ffn=1024) for layer in spec.layers)
    model = tiny.random_model(replace(spec, hidden=512, vocab=512, layers=layers))
    export_onnx(model, path, form="custom_op", chained=request.param)
    return path


@pytest.fixture
def moved(library, monkeypatch):
    monkeypatch.setenv("JPQ_KERNELS", "cpu")
    monkeypatch.delenv("JPQ_LARGE_PAGES", raising=False)


def memory(kind="Rss"):
    """KB of this process: in all, or of a kind."""
    found = 0
    with open("/proc/self/smaps") as file:
        for line in file:
            found += int(line.split()[1]) if line.startswith(f"{kind}:") else 0
    return found


def blocks():
    """How many blocks of ours are mapped: their size, and that large pages were asked for."""
    found, size = 0, 0
    with open("/proc/self/smaps") as file:
        for line in file:
            if line.startswith("Size:"):
                size = int(line.split()[1]) << 10
            found += line.startswith("VmFlags:") and " hg" in line and size == BLOCK
    return found


def model(path):
    return OrtModel(path, threads=1, device="cpu")


def test_results_are_the_same_to_the_last_bit(graph, moved, monkeypatch):
    before = blocks()
    with_them = model(graph)
    assert blocks() == before + 1
    monkeypatch.setenv("JPQ_LARGE_PAGES", "off")
    without = model(graph)
    assert blocks() == before + 1
    for ids in (IDS, IDS[:, :1], np.arange(100)[None]):
        assert np.array_equal(with_them.forward(ids).logits, without.forward(ids).logits)


def test_sessions_share_a_block_and_the_last_one_frees_it(graph, moved):
    before = blocks()
    expected = model(graph).forward(IDS).logits
    assert blocks() == before
    first, second = model(graph), model(graph)
    assert blocks() == before + 1
    del first
    assert blocks() == before + 1
    assert np.array_equal(second.forward(IDS).logits, expected)
    del second
    assert blocks() == before
    for _ in range(5):
        model(graph)
    assert blocks() == before


def large_product(random, tmp_path, *, external):
    """One product of 16 MB of codes."""
    stored = random(4096, 8192, 4, 64, True, np.random.default_rng(2))
    return save_product(tmp_path, {"packed": stored.packed, "scales": stored.scales}, 8192, external=external)


def save_product(folder, arrays, columns, *, external):
    """A file of one product with symmetric codes of 4 bits in groups of 64."""
    facts = {"bits": 4, "K": columns, "N": len(arrays["packed"]), "group_size": 64, "symmetric": 1}
    facts |= {"plugin_namespace": "jpq", "plugin_version": "1"}
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "XY"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("LowBitMatMul", ["X", *arrays], ["Y"], domain="jpq", **facts)],
        "one",
        values[:1],
        values[1:],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("jpq", 1)]
    made = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save_model(made, folder / "one.onnx", save_as_external_data=external, location="one.data")
    return folder / "one.onnx"


def product(path, library, **given):
    """A session; `given`: initializers in memory of ours."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(library.path))
    for name, value in given.items():
        options.add_initializer(name, value)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def test_codes_are_in_memory_once(random, library, moved, tmp_path, monkeypatch):
    path = large_product(random, tmp_path, external=True)
    x = np.ones((1, 8192), np.float32)
    sizes, large, results = {}, {}, {}
    product(path, library).run(None, {"X": x})  # what is allocated once is there
    for asked in ("on", "off"):
        monkeypatch.setenv("JPQ_LARGE_PAGES", asked)
        before, mapped, pages = memory(), blocks(), memory("AnonHugePages")
        run = product(path, library)
        results[asked] = run.run(None, {"X": x})[0]
        assert blocks() == mapped + (asked == "on")
        sizes[asked], large[asked] = memory() - before, memory("AnonHugePages") - pages
        del run
    assert np.array_equal(results["on"], results["off"])
    assert sizes["off"] > 16 << 10  # the codes are there
    assert sizes["on"] < sizes["off"] + (4 << 10)
    assert large["on"] >= (16 << 10) - LARGE // 1024 * 2  # a page may be refused where memory is in pieces
    assert large["off"] < large["on"] // 2


@pytest.mark.parametrize("written", [False, True])
def test_codes_that_were_written_to_stay_where_they_are(library, moved, tmp_path, written):
    """A page of a private mapping that differs from the file: nobody else has its content."""
    arrays = {"packed": np.zeros((4096, 512), np.uint8), "scales": np.ones((4096, 16), np.float16)}
    path = save_product(tmp_path, arrays, 1024, external=False)
    (tmp_path / "codes").write_bytes(arrays["packed"].tobytes())
    with open(tmp_path / "codes", "r+b") as file:
        private = mmap.mmap(file.fileno(), arrays["packed"].nbytes, flags=mmap.MAP_PRIVATE)
    codes = np.frombuffer(private, np.uint8).reshape(4096, 512)
    codes[:, ::64].sum()  # every page is there
    if written:
        codes[2077, 7] = 0xA0
    before, packed = blocks(), ort.OrtValue.ortvalue_from_numpy(codes)
    run = product(path, library, packed=packed)
    assert blocks() == before + (not written)
    row = run.run(None, {"X": np.eye(1024, dtype=np.float32)[15:16]})[0][0]
    assert row[2077] == (0xA if written else 0) - 7.5
    assert codes[2077, 7] == (0xA0 if written else 0)


def test_codes_that_are_no_file_s_stay_where_they_are(random, library, moved, tmp_path):
    before = blocks()
    run = product(large_product(random, tmp_path, external=False), library)
    assert blocks() == before
    assert run.run(None, {"X": np.ones((1, 8192), np.float32)})[0].shape == (1, 4096)
