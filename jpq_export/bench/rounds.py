"""`jpq-export bench`: the bundle and its rivals take turns, so that a busy machine is equally busy for all of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from jpq_export.bench.baselines import original_spec, write_baselines, write_uniform
from jpq_export.bench.energy import Meters, find_meters
from jpq_export.bench.layers import LayerRate, layer_rates, read_bandwidth
from jpq_export.bench.llama_cpp import LlamaBench
from jpq_export.errors import JpqError, UsageError
from jpq_export.format.bundle import read_manifest
from jpq_export.format.encoder_spec import KIND, Spec
from jpq_export.format.plan import load_plan
from jpq_export.format.spec import ModelSpec
from jpq_export.progress import Stages
from jpq_export.revision import processor

FORMAT = "jpq-bench/1"


class BenchError(JpqError):
    """A measured runtime stopped."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`rounds` turns, each a prompt of `prefill` tokens and `decode` greedy steps.

    `widths`: our operators are measured at each of these for all matrices, beside the bundle's own mixture. `other`: a
    second bundle.
    """

    threads: int = 1
    rounds: int = 5
    prefill: int = 128
    decode: int = 32
    gguf: tuple[Path, ...] = ()
    baselines: bool = True
    widths: tuple[float, ...] = ()
    other: Path | None = None


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over all rounds; `file_bytes`: the model on disk; `runs`: what computed the products.

    `first_token_ms`: from a prompt of `prefill` tokens to the first logits. `token_p50_ms`, `token_p99_ms`: between
    tokens, None where the runtime tells averages only. `joules_per_token`: decoding, by meter; None without one.
    `cache_bytes_per_token`: keys and values; 0 where the runtime does not say.
    """

    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    peak_rss_bytes: int
    file_bytes: int
    runs: str
    cache_bytes_per_token: int = 0
    first_token_ms: float | None = None
    token_p50_ms: float | None = None
    token_p99_ms: float | None = None
    joules_per_token: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class BenchResult:
    """`bundle`: the modes of this bundle by name; `uniform`: our operators at one width; `baselines`: others.

    `compared`: the second bundle's modes. `layers`: every product of one decoded token, of the bundle and
    of the uniform graphs. `energy_reason`: why no energy was measured.
    """

    settings: Settings
    processor: str
    weight_bytes: int
    read_gb_s: float
    bundle: dict[str, Speed]
    uniform: dict[str, Speed]
    compared: dict[str, Speed]
    baselines: dict[str, Speed]
    layers: tuple[LayerRate, ...]
    energy_reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The best mode's numbers stand at the top as well, where scripts look for them."""
        best = max(self.bundle.values(), key=lambda speed: speed.decode_tokens_per_s)
        return asdict(best) | asdict(self)


def to_json(results: list[BenchResult]) -> str:
    """The first result's keys at the top; all of them under `threads`, by number of threads, when there are several."""
    raw = {"format": FORMAT} | results[0].to_dict()
    if len(results) > 1:
        raw["threads"] = {str(result.settings.threads): result.to_dict() for result in results}
    return json.dumps(raw, indent=1, default=str) + "\n"


class Worker:
    """A runtime in its own process (see `worker`)."""

    def __init__(self, model: Path, threads: int, *, kernels: bool, exact: bool) -> None:
        self.file_bytes = sum(part.stat().st_size for part in model.parent.glob(f"{model.name}*") if part.is_file())
        command = [sys.executable, "-m", "jpq_export.bench.worker", str(model), "--threads", str(threads)]
        environment = dict(os.environ) if kernels else os.environ | {"JPQ_KERNELS": "off"}
        self.process = subprocess.Popen(
            command + ["--exact"] * exact,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, **job: Any) -> Any:
        """The answer to one job; BenchError when the process is gone."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            told = (self.process.communicate()[1] or "no message").strip().splitlines()
            raise BenchError(f"bench: a measured runtime stopped ({told[-1]}); is there enough memory?")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        self.process.communicate()

    def kill(self) -> None:
        """End it at once, also in the middle of a job."""
        self.process.kill()
        self.process.communicate()


def bench(folder: Path, settings: Settings, stages: Stages) -> BenchResult:
    """Measure the bundle in `folder` on this machine.

    Raises:
        BundleError: no bundle.
        UsageError: the second bundle is an encoder; a file for llama.cpp, or llama.cpp, is missing.
        BenchError: a runtime stopped, for want of memory for example.
    """
    manifest, plan = read_manifest(folder), load_plan(folder / "plan.json")
    if settings.other and read_manifest(settings.other).kind == KIND:
        raise UsageError(f"{settings.other}: a sentence encoder, {folder} is a decoder; compare bundles of one kind")
    own = ModelSpec.from_json(json.dumps(manifest.model["spec"]))
    spec = original_spec(own, plan)
    rivals = {f"llama.cpp {path.stem}": LlamaBench(path, settings.threads) for path in settings.gguf}
    with ExitStack() as stack:
        graphs: dict[str, Path] = {}
        uniform: dict[str, Path] = {}
        if settings.baselines or settings.widths:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jpq-bench-")))
            with stages.stage("baselines", "writing the graphs to compare with"):
                check_room(scratch, spec)
                graphs = write_baselines(spec, scratch) if settings.baselines else {}
                uniform = write_uniform(replace(spec, rotated=own.rotated), plan, scratch, settings.widths)
        with stages.stage("load", "loading every runtime") as report:
            others = {compared_name(settings.other): settings.other / "model.onnx"} if settings.other else {}
            ways = _ways({"jpq": folder / "model.onnx"} | others | uniform, graphs)
            workers = _workers(stack, ways, settings, report) | rivals
        with stages.stage("measure", "taking turns") as report:
            meters = find_meters()
            speeds = _take_turns(workers, settings, report, meters)
        with stages.stage("layers", "layer by layer"):
            measured = [folder / "model.onnx", *uniform.values()]
            rates = tuple(rate for path in measured for rate in layer_rates(path, settings.threads))
            bandwidth = read_bandwidth(settings.threads)
    ours, same, second, rivals = (
        {name: speed for name, speed in speeds.items() if kind(name) == wanted}
        for wanted in ("bundle", "uniform", "compared", "baselines")
    )
    return BenchResult(
        settings, processor(), manifest.weight_bytes, bandwidth, ours, same, second, rivals, rates, meters.reason
    )


def compared_name(folder: Path) -> str:
    """What the rows of a second bundle are called."""
    return f"B: {folder.resolve().name}"


def kind(name: str) -> str:
    """Which part of the result a runtime belongs to."""
    if name.startswith("B: "):
        return "compared"
    if not name.startswith("jpq"):
        return "baselines"
    return "bundle" if name in ("jpq", "jpq-fast") else "uniform"


def _ways(ours: dict[str, Path], others: dict[str, Path]) -> dict[str, tuple[Path, bool, bool]]:
    """Runtime -> (graph, with our kernels, fp32 activations); ours both exactly and fast."""
    ways: dict[str, tuple[Path, bool, bool]] = {}
    for name, path in ours.items():
        ways |= {name: (path, True, True), f"{name}-fast": (path, True, False)}
    return ways | {name: (graph, False, name == "onnxruntime-fp32") for name, graph in others.items()}


def check_room(folder: Path, spec: Spec) -> None:
    """BenchError when the graphs to compare with do not fit on the disk."""
    needed, free = 5 * spec.parameters(), shutil.disk_usage(folder).free
    if free < needed:
        raise BenchError(
            f"{folder.parent}: {free / 1e9:.1f} GB free, the graphs to compare with need {needed / 1e9:.1f} GB; set "
            "TMPDIR to another folder or give --no-baselines"
        )


def _workers(
    stack: ExitStack,
    wanted: dict[str, tuple[Path, bool, bool]],
    settings: Settings,
    report: Callable[[int, int], None],
) -> dict[str, Worker | LlamaBench]:
    workers: dict[str, Worker | LlamaBench] = {}
    for i, (name, (path, kernels, exact)) in enumerate(wanted.items()):
        worker = stack.enter_context(ended(Worker(path, settings.threads, kernels=kernels, exact=exact)))
        worker.ask(decode=1)
        workers[name] = worker
        report(i + 1, len(wanted))
    return workers


@contextmanager
def ended(worker: Worker) -> Iterator[Worker]:
    """The process ends with the block, whatever happened in it."""
    try:
        yield worker
        worker.close()
    finally:
        worker.kill()


def _take_turns(
    workers: dict[str, Worker | LlamaBench],
    settings: Settings,
    report: Callable[[int, int], None],
    meters: Meters | None = None,
) -> dict[str, Speed]:
    meters = meters or Meters()
    prefills: dict[str, list[float]] = {name: [] for name in workers}
    decodes: dict[str, list[float]] = {name: [] for name in workers}
    joules: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    total = settings.rounds * len(workers)
    for turn in range(settings.rounds):
        for i, (name, worker) in enumerate(workers.items()):
            prefills[name].append(worker.ask(prefill=settings.prefill)["seconds"])
            answer, seen = meters.around(lambda worker=worker: worker.ask(decode=settings.decode))
            decodes[name] += answer["seconds"]
            joules[name].append(seen)
            report(turn * len(workers) + i + 1, total)
    return {
        name: _speed(worker, prefills[name], decodes[name], joules[name], settings) for name, worker in workers.items()
    }


def _speed(
    worker: Worker | LlamaBench,
    prefills: list[float],
    decodes: list[float],
    joules: list[dict[str, float]],
    settings: Settings,
) -> Speed:
    memory = worker.ask(memory=True)
    each = None if isinstance(worker, LlamaBench) else [float(np.percentile(decodes, q)) * 1e3 for q in (50, 99)]
    return Speed(
        1 / median(decodes),
        settings.prefill / median(prefills),
        memory["peak_rss_bytes"],
        worker.file_bytes,
        memory["runs"],
        memory.get("cache_bytes_per_token", 0),
        first_token_ms=median(prefills) * 1e3,
        token_p50_ms=each[0] if each else None,
        token_p99_ms=each[1] if each else None,
        joules_per_token=median_joules(joules, settings.decode),
    )


def median_joules(turns: list[dict[str, float]], pieces: int) -> dict[str, float] | None:
    """By meter, for each of the `pieces` (tokens, texts) of a turn; None without a meter."""
    names = {name for turn in turns for name in turn}
    return {name: median([turn[name] for turn in turns if name in turn]) / pieces for name in sorted(names)} or None
