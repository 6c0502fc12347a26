"""Checks of test_large_pages.py that count memory, each in a process of its own: CHECK and what it takes."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from jpq_export.runtime.session import OrtModel

IDS = np.array([[3, 14, 15, 92, 65]])
LARGE, BLOCK = 2 << 20, 32 << 20  # a page, and what large_pages.c asks for at once


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
    return OrtModel(Path(path), threads=1, device="cpu")


def same_results(path):
    """To the last bit, with and without."""
    with_them = model(path)
    assert blocks() == 1
    os.environ["JPQ_LARGE_PAGES"] = "off"
    without = model(path)
    assert blocks() == 1
    for ids in (IDS, IDS[:, :1], np.arange(100)[None]):
        assert np.array_equal(with_them.forward(ids).logits, without.forward(ids).logits)


def shared_blocks(path):
    """Sessions share a block, and the last one frees it."""
    expected = model(path).forward(IDS).logits
    assert blocks() == 0
    first, second = model(path), model(path)
    assert blocks() == 1
    del first
    assert blocks() == 1
    assert np.array_equal(second.forward(IDS).logits, expected)
    del second
    assert blocks() == 0
    for _ in range(5):
        model(path)
    assert blocks() == 0


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
    path = Path(folder) / "one.onnx"
    onnx.save_model(made, path, save_as_external_data=external, location="one.data")
    return path


def large_product(folder, *, external):
    """One product of 16 MB of codes."""
    rng = np.random.default_rng(2)
    arrays = {"packed": rng.integers(0, 256, (4096, 4096), np.uint8), "scales": np.full((4096, 128), 0.01, np.float16)}
    return save_product(folder, arrays, 8192, external=external)


def product(path, library, **given):
    """A session; `given`: initializers in memory of ours."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(library)
    for name, value in given.items():
        options.add_initializer(name, value)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def once_in_memory(folder, library):
    """Codes are in memory once, and in large pages."""
    path = large_product(folder, external=True)
    x = np.ones((1, 8192), np.float32)
    sizes, large, results = {}, {}, {}
    product(path, library).run(None, {"X": x})  # what is allocated once is there
    for asked in ("on", "off"):
        os.environ["JPQ_LARGE_PAGES"] = asked
        before, pages = memory(), memory("AnonHugePages")
        run = product(path, library)
        results[asked] = run.run(None, {"X": x})[0]
        assert blocks() == (asked == "on")
        sizes[asked], large[asked] = memory() - before, memory("AnonHugePages") - pages
        del run
    assert np.array_equal(results["on"], results["off"])
    assert sizes["off"] > 16 << 10  # the codes are there
    assert sizes["on"] < sizes["off"] + (4 << 10)
    assert large["on"] >= (16 << 10) - LARGE // 1024 * 2  # a page may be refused where memory is in pieces
    assert large["off"] < large["on"] // 2


def written_to(folder, library):
    """A page of a private mapping that differs from the file: nobody else has its content, so it stays where it is."""
    arrays = {"packed": np.zeros((4096, 512), np.uint8), "scales": np.ones((4096, 16), np.float16)}
    path = save_product(folder, arrays, 1024, external=False)
    data = Path(folder) / "codes"
    data.write_bytes(arrays["packed"].tobytes())
    for written in (False, True):
        with open(data, "r+b") as file:
            private = mmap.mmap(file.fileno(), arrays["packed"].nbytes, flags=mmap.MAP_PRIVATE)
        codes = np.frombuffer(private, np.uint8).reshape(4096, 512)
        codes[:, ::64].sum()  # every page is there
        if written:
            codes[2077, 7] = 0xA0
        run = product(path, library, packed=ort.OrtValue.ortvalue_from_numpy(codes))
        assert blocks() == (not written)
        row = run.run(None, {"X": np.eye(1024, dtype=np.float32)[15:16]})[0][0]
        assert row[2077] == (0xA if written else 0) - 7.5
        assert codes[2077, 7] == (0xA0 if written else 0)
        del run


def no_file(folder, library):
    """Codes that no file holds by themselves stay where they are."""
    run = product(large_product(folder, external=False), library)
    assert blocks() == 0
    assert run.run(None, {"X": np.ones((1, 8192), np.float32)})[0].shape == (1, 4096)


CHECKS = {check.__name__: check for check in (same_results, shared_blocks, once_in_memory, written_to, no_file)}

if __name__ == "__main__":
    CHECKS[sys.argv[1]](*sys.argv[2:])
