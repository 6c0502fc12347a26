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
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from jpq_export.bench.baselines import original_spec, write_baselines
from jpq_export.bench.layers import LayerRate, layer_rates, read_bandwidth
from jpq_export.bench.llama_cpp import LlamaBench
from jpq_export.errors import JpqError
from jpq_export.format.bundle import read_manifest
from jpq_export.format.plan import load_plan
from jpq_export.format.spec import ModelSpec
from jpq_export.progress import Stages

FORMAT = "jpq-bench/1"


class BenchError(JpqError):
    """A measured runtime stopped."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`rounds` turns, each a prompt of `prefill` tokens and `decode` greedy steps."""

    threads: int = 1
    rounds: int = 5
    prefill: int = 128
    decode: int = 32
    gguf: Path | None = None
    baselines: bool = True


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over all rounds; `runs`: what computed the products."""

    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    peak_rss_bytes: int
    runs: str


@dataclass(frozen=True, slots=True)
class BenchResult:
    """`bundle`: the modes of this bundle by name; `baselines` with the same keys; `layers`: one decoded token."""

    settings: Settings
    processor: str
    weight_bytes: int
    read_gb_s: float
    bundle: dict[str, Speed]
    baselines: dict[str, Speed]
    layers: tuple[LayerRate, ...]

    def to_json(self) -> str:
        """The best mode's numbers stand at the top as well, where scripts look for them."""
        best = max(self.bundle.values(), key=lambda speed: speed.decode_tokens_per_s)
        raw = {"format": FORMAT} | asdict(best) | asdict(self)
        return json.dumps(raw, indent=1, default=str) + "\n"


class Worker:
    """A runtime in its own process (see `worker`)."""

    def __init__(self, model: Path, threads: int, *, kernels: bool, exact: bool) -> None:
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
        BenchError: a runtime stopped, for want of memory for example.
    """
    manifest, plan = read_manifest(folder), load_plan(folder / "plan.json")
    spec = original_spec(ModelSpec.from_json(json.dumps(manifest.model["spec"])), plan)
    with ExitStack() as stack:
        graphs: dict[str, Path] = {}
        if settings.baselines:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jpq-bench-")))
            with stages.stage("baselines", "writing the graphs to compare with"):
                _check_room(scratch, spec)
                graphs = write_baselines(spec, scratch)
        with stages.stage("load", "loading every runtime") as report:
            workers = _workers(stack, folder / "model.onnx", graphs, settings, report)
        with stages.stage("measure", "taking turns") as report:
            speeds = _take_turns(workers, settings, report)
        with stages.stage("layers", "layer by layer"):
            rates = layer_rates(folder / "model.onnx", settings.threads)
            bandwidth = read_bandwidth(settings.threads)
    ours = {name: speed for name, speed in speeds.items() if name.startswith("jpq")}
    rivals = {name: speed for name, speed in speeds.items() if name not in ours}
    return BenchResult(settings, _processor(), manifest.weight_bytes, bandwidth, ours, rivals, rates)


def _check_room(folder: Path, spec: ModelSpec) -> None:
    needed, free = 5 * spec.parameters(), shutil.disk_usage(folder).free
    if free < needed:
        raise BenchError(
            f"{folder.parent}: {free / 1e9:.1f} GB free, the graphs to compare with need {needed / 1e9:.1f} GB; set "
            "TMPDIR to another folder or give --no-baselines"
        )


def _workers(
    stack: ExitStack, model: Path, graphs: dict[str, Path], settings: Settings, report: Callable[[int, int], None]
) -> dict[str, Worker | LlamaBench]:
    wanted = {"jpq": (model, True, True), "jpq-fast": (model, True, False)}
    wanted |= {name: (graph, False, name == "onnxruntime-fp32") for name, graph in graphs.items()}
    workers: dict[str, Worker | LlamaBench] = {}
    for i, (name, (path, kernels, exact)) in enumerate(wanted.items()):
        worker = stack.enter_context(_ended(Worker(path, settings.threads, kernels=kernels, exact=exact)))
        worker.ask(decode=1)
        workers[name] = worker
        report(i + 1, len(wanted))
    if settings.gguf:
        workers["llama.cpp"] = LlamaBench(settings.gguf, settings.threads)
    return workers


@contextmanager
def _ended(worker: Worker) -> Iterator[Worker]:
    """The process ends with the block, whatever happened in it."""
    try:
        yield worker
        worker.close()
    finally:
        worker.kill()


def _take_turns(
    workers: dict[str, Worker | LlamaBench], settings: Settings, report: Callable[[int, int], None]
) -> dict[str, Speed]:
    prefills: dict[str, list[float]] = {name: [] for name in workers}
    decodes: dict[str, list[float]] = {name: [] for name in workers}
    total = settings.rounds * len(workers)
    for turn in range(settings.rounds):
        for i, (name, worker) in enumerate(workers.items()):
            prefills[name].append(worker.ask(prefill=settings.prefill)["seconds"])
            decodes[name] += worker.ask(decode=settings.decode)["seconds"]
            report(turn * len(workers) + i + 1, total)
    out = {}
    for name, worker in workers.items():
        memory = worker.ask(memory=True)
        rates = 1 / median(decodes[name]), settings.prefill / median(prefills[name])
        out[name] = Speed(*rates, memory["peak_rss_bytes"], memory["runs"])
    return out


def _processor() -> str:
    """The processor's name where Linux tells it, and the number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {os.cpu_count()} cores"
