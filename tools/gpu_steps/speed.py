"""Bytes a second of the decode kernels against a copy, products a second of the prefill kernels against cuBLAS."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gpu_steps.cases import DTYPES, TERNARY, Shape, Stored, is_normal, random_weight
from gpu_steps.cuda_set import CudaKernels, built_library, describe
from gpu_steps.outcome import FAILED, PASSED, Outcome, Settings
from jpq_export.numerics.scheme import from_kernel_bits

Call = Callable[[], Any]
LAYERS = ((4096, 4096), (4096, 14336))  # [N, K]
TINY_LAYERS = ((32, 64),)
WIDTHS = (1, TERNARY, 2, 3, 35, 4, 36, 5, 6, 8)  # 35, 36: normal levels of 3 and 4 bits
FEW = (1, 4, 16)
MANY = (512, 2048)
GROUP_SIZE = 128
REPEATS = 15
CACHES = 4  # times the L2 cache: what lies in it from the call before must be gone when its turn comes again
DECODE_GOAL, PREFILL_GOAL = 0.85, 0.70
COPY_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds of a call in a queue of many: on the GPU, events around a CUDA graph, so that no launch is waited for."""

    device: str
    repeats: int = REPEATS

    def seconds(self, calls: Sequence[Call]) -> float:
        """Median over repeats of the time of all `calls` one after the other, divided by their number."""
        run = self._graph(calls) if self.device == "cuda" else _loop(calls)
        times = [self._once(run) for _ in range(self.repeats + 2)][2:]
        return statistics.median(times) / len(calls)

    def _graph(self, calls: Sequence[Call]) -> Call:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles and allocates what a capture must not
            calls[0]()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def _once(self, run: Call) -> float:
        if self.device != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


def _loop(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def copy_bandwidth(clock: Clock, settings: Settings) -> float:
    """Bytes a second of torch's copy on the device, read and written ones counted."""
    count = 1 << 16 if settings.rehearse else COPY_BYTES
    source = torch.zeros(count, dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    return 2 * count / clock.seconds([lambda: target.copy_(source)])


def copies_needed(nbytes: int, settings: Settings) -> int:
    """How many weights take turns, so that none is found in the L2 cache."""
    if settings.rehearse:
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-CACHES * cache // nbytes))


def clones(weight: Stored, count: int) -> list[Stored]:
    """The weight at `count` places in memory."""

    def copied(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.clone()

    made = []
    for _ in range(count):
        packed, scales, zeros = copied(weight.packed), copied(weight.scales), copied(weight.zeros)
        assert packed is not None
        assert scales is not None
        made.append(Stored(weight.bits, weight.group_size, weight.codes, weight.zero_points, packed, scales, zeros))
    return made


def triton_calls(weights: Sequence[Stored], x: torch.Tensor) -> list[Call]:
    """One call a weight, with output and workspace made beforehand."""
    from jpq_kernels import low_bit_matmul

    from gpu_steps.triton_set import device_weight

    count = low_bit_matmul.count_multiprocessors(x.device)

    def call_of(weight: Stored) -> Call:
        on_device = device_weight(weight)
        size = low_bit_matmul.plan(len(x), on_device, x.dtype, count).workspace_size(len(x), weight.shape[0])
        out = torch.empty(len(x), weight.shape[0], dtype=x.dtype, device=x.device)
        space = torch.empty(size, device=x.device)
        return lambda: low_bit_matmul.low_bit_matmul(x, on_device, out=out, workspace=space, multiprocessors=count)

    return [call_of(weight) for weight in weights]


def cuda_calls(kernels: CudaKernels, weights: Sequence[Stored], x: torch.Tensor) -> list[Call]:
    """The same for the CUDA kernels."""

    def call_of(weight: Stored) -> Call:
        described = describe(weight)
        out = torch.empty(len(x), weight.shape[0], dtype=x.dtype, device=x.device)
        space = kernels.workspace(described, len(x), str(x.device))
        return lambda: kernels.queue(described, x, None, out, space)

    return [call_of(weight) for weight in weights]


def cublas_seconds(clock: Clock, settings: Settings, n: int, k: int, rows: int) -> float:
    """Fp16 X · Wᵀ by torch, weights taking turns as ours do."""
    x = torch.randn(rows, k, dtype=torch.float16, device=settings.device)
    count = copies_needed(2 * n * k, settings)
    weights = [torch.randn(n, k, dtype=torch.float16, device=settings.device) for _ in range(count)]
    out = torch.empty(rows, n, dtype=torch.float16, device=settings.device)
    return clock.seconds([lambda w=w: torch.matmul(x, w.T, out=out) for w in weights])


def timed(settings: Settings, rows_of: Sequence[int], row: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """`row(...)` for every layer, width, number of rows and set of kernels."""
    rng, out = np.random.default_rng(1), []
    clock = Clock(settings.device, 1 if settings.rehearse else REPEATS)
    cuda = CudaKernels(built_library(settings))
    widths = (3,) if settings.rehearse else (2, 3, 35, 4, 36) if settings.quick else WIDTHS
    for n, k in TINY_LAYERS if settings.rehearse else LAYERS:
        rivals = {rows: cublas_seconds(clock, settings, n, k, rows) for rows in rows_of}
        for bits in widths:
            group_size = min(GROUP_SIZE, k)
            weight = random_weight(Shape(bits, group_size, k // group_size, n, 1), rng, settings.device)
            weights = clones(weight, copies_needed(weight.nbytes, settings))
            for rows in rows_of:
                x = torch.randn(rows, k, device=settings.device).to(DTYPES["fp16"])
                for name, calls in (("triton", triton_calls(weights, x)), ("cuda", cuda_calls(cuda, weights, x))):
                    seconds = clock.seconds(calls)
                    named = {"kernels": name, "layer": f"{n} x {k}", "bits": from_kernel_bits(bits), "rows": rows}
                    named["levels"] = "normal" if is_normal(bits) else "even"
                    out.append(named | row(weight, rows, seconds, rivals[rows]))
    return out


def run_decode(settings: Settings) -> Outcome:
    """The step `bandwidth`: fp16 X of a few rows."""
    clock = Clock(settings.device, 1 if settings.rehearse else REPEATS)
    copy = copy_bandwidth(clock, settings)

    def row(weight: Stored, rows: int, seconds: float, rival: float) -> dict[str, Any]:
        n, k = weight.shape
        moved = weight.nbytes + 2 * rows * (n + k)
        fractions = {"of copy": moved / seconds / copy, "times faster than cuBLAS fp16": rival / seconds}
        return {"microseconds": seconds * 1e6, "GB/s": moved / seconds / 1e9} | fractions

    rows = timed(settings, FEW, row)
    facts = {"copy GB/s, read and written": copy / 1e9} | best_of(rows, "of copy", DECODE_GOAL, rows_at_most=1)
    return check_numbers(Outcome(PASSED, "", facts, rows))


def run_prefill(settings: Settings) -> Outcome:
    """The step `gemm`: fp16 X of many rows."""

    def row(weight: Stored, rows: int, seconds: float, rival: float) -> dict[str, Any]:
        work = 2 * rows * weight.shape[0] * weight.shape[1]
        rates = {"TFLOP/s": work / seconds / 1e12, "cuBLAS fp16 TFLOP/s": work / rival / 1e12}
        return {"microseconds": seconds * 1e6} | rates | {"of cuBLAS": rival / seconds}

    rows = timed(settings, (40,) if settings.rehearse else MANY, row)
    return check_numbers(Outcome(PASSED, "", best_of(rows, "of cuBLAS", PREFILL_GOAL, rows_at_most=512), rows))


def best_of(rows: list[dict[str, Any]], key: str, goal: float, *, rows_at_most: int) -> dict[str, Any]:
    """Per set of kernels: the range of `key`, and how many of the rows the goal speaks of reach it."""
    out = {"goal": f"{key} >= {goal}"}
    for name in ("triton", "cuda"):
        values = [row[key] for row in rows if row["kernels"] == name and row["rows"] <= rows_at_most]
        if values:
            reached = sum(value >= goal for value in values)
            out[name] = f"{min(values):.2f} to {max(values):.2f} {key}; {reached} of {len(values)} reach the goal"
    return out


def check_numbers(outcome: Outcome) -> Outcome:
    """A speed nobody can have is a mistake of the clock: failed. Missing a goal is a result, not a failure."""
    beyond = [row for row in outcome.rows if not 0 < row.get("of copy", 0.5) < 1.3 or not row["microseconds"] > 0]
    if beyond and outcome.rows:
        first = beyond[0]
        return Outcome(FAILED, f"{len(beyond)} times are not believable; first: {first}", outcome.facts, outcome.rows)
    return outcome
