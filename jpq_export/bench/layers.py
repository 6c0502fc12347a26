"""Every product of one decoded token: its bytes, its time in the running session, and the machine's read bandwidth."""

from __future__ import annotations

import ctypes
import json
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from jpq_export.numerics.scheme import Scheme
from jpq_export.runtime import native
from jpq_export.runtime.session import OrtModel

STEPS = 24
READ_BYTES = 1 << 28  # far beyond every cache


@dataclass(frozen=True, slots=True)
class LayerRate:
    """One `jpq::LowBitMatMul`, LowBitMatMuls or LowBitChain at one row: stored bytes, median microseconds, GB/s."""

    name: str
    bits: float
    bytes: int
    microseconds: float
    gb_s: float


def layer_rates(path: Path, threads: int) -> tuple[LayerRate, ...]:
    """By onnxruntime's profiler (whole microseconds; median of the steps); empty where our kernels do not run."""
    with tempfile.TemporaryDirectory(prefix="jpq-bench-") as scratch:
        model = OrtModel(path, threads=threads, profile=Path(scratch) / "profile", device="cpu")
        if "jpq kernels" not in model.path:
            return ()
        decoding = model.start()
        for token in range(STEPS):
            decoding.step([token % model.spec.vocab])
        events = json.loads(Path(model.session.end_profiling()).read_text(encoding="utf-8"))
    stored, found = _stored(path), defaultdict(list)
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if name != event["name"] and name in stored:
            found[name].append(max(1, event["dur"]))
    out = []
    for name, micro in ((name, float(median(times))) for name, times in found.items()):
        bits, size = stored[name]
        out.append(LayerRate(name, bits, size, micro, size / micro / 1e3))
    return tuple(out)


def _stored(path: Path) -> dict[str, tuple[float, int]]:
    """Node name -> (bits a weight on average, stored bytes) of every product."""
    import onnx

    out = {}
    for node in onnx.load(str(path), load_external_data=False).graph.node:
        facts = {a.name: a.i for a in node.attribute}
        if node.op_type == "LowBitMatMul":
            out[node.name] = _size(facts, "")
        if node.op_type in ("LowBitMatMuls", "LowBitChain"):
            count = facts["count"] if "count" in facts else sum(facts[f"count_{i}"] for i in range(facts["links"]))
            parts = [_size(facts, f"_{i}") for i in range(count)]
            weights = [facts[f"N_{i}"] * _columns(facts, f"_{i}") for i in range(count)]
            widths = {bits for bits, _ in parts}
            mean = widths.pop() if len(widths) == 1 else float(np.average([bits for bits, _ in parts], weights=weights))
            out[node.name] = mean, sum(size for _, size in parts)
    return out


def _size(facts: dict[str, int], part: str) -> tuple[float, int]:
    symmetric = bool(facts[f"symmetric{part}"])
    scheme = Scheme.stated(facts[f"bits{part}"], facts[f"group_size{part}"], symmetric=symmetric)
    return scheme.bits, scheme.weight_bytes(facts[f"N{part}"], _columns(facts, part))


def _columns(facts: dict[str, int], part: str) -> int:
    """K, which the products of one X share."""
    return facts["K"] if "K" in facts else facts[f"K{part}"]


def read_bandwidth(threads: int, *, repeats: int = 5) -> float:
    """GB/s at which `threads` cores read memory, each its own part: the best of `repeats`; 0 without a compiler."""
    try:
        library = ctypes.CDLL(str(native.cpu_library().path))
    except native.NativeError:
        return 0.0
    library.jpq_read.argtypes, library.jpq_read.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_uint64
    memory = np.ones(READ_BYTES // 8, np.uint64)
    share = memory.nbytes // threads // 64 * 64
    best = float("inf")
    for _ in range(repeats):
        # ctypes lets go of the interpreter's lock: the parts are read at the same time.
        parts = [
            threading.Thread(target=library.jpq_read, args=(memory.ctypes.data + i * share, share))
            for i in range(threads)
        ]
        start = time.perf_counter()
        for part in parts:
            part.start()
        for part in parts:
            part.join()
        best = min(best, time.perf_counter() - start)
    return share * threads / best / 1e9
