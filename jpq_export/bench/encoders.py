"""`jpq-export bench` on a sentence encoder: embeddings a second, latency, memory and quality, every runtime in turn."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from jpq_export.bench.baselines import original_spec
from jpq_export.bench.encoder_baselines import original_weights, write_encoder_baselines
from jpq_export.bench.energy import Meters, find_meters
from jpq_export.bench.rounds import Worker, check_room, compared_name, ended, kind, median_joules
from jpq_export.errors import UsageError
from jpq_export.evaluate.embeddings import EmbeddingQuality, Pairs, evaluate_embeddings, read_pairs
from jpq_export.format.bundle import read_manifest
from jpq_export.format.encoder_spec import KIND, EncoderSpec, spec_from_json
from jpq_export.format.plan import load_plan
from jpq_export.progress import Stages
from jpq_export.revision import processor

FORMAT = "jpq-bench-encoder/1"
TEXTS = 128  # a turn, in batches
SINGLES = 32  # a turn, one by one
# Tokens a text where no --pairs are given: every 32nd part of the sentences of STS-B's dev set in WordPieces.
LENGTHS = (5, 8, 8, 9, 9, 9, 9, 10, 10, 11, 11, 11, 12, 12, 13, 13, 14, 15, 16, 16, 17, 18, 19, 20, 21, 22, 23, 24)
LENGTHS += (26, 27, 30, 34, 53)


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """`rounds` turns, each of SINGLES texts one by one and TEXTS in batches of `batch`.

    `pairs`: texts with scores, which also say how long texts are; `other`: a second bundle.
    """

    threads: int = 1
    rounds: int = 5
    batch: int = 32
    pairs: Path | None = None
    other: Path | None = None
    baselines: bool = True


@dataclass(frozen=True, slots=True)
class Times:
    """`alone`: seconds of every single text; `together`, `joules`: of all texts in batches, once a turn."""

    alone: list[float]
    together: list[float]
    joules: list[dict[str, float]]


@dataclass(frozen=True, slots=True)
class EncoderSpeed:
    """Medians over all rounds; latencies are of one text alone; `spearman`: None without scores.

    `joules_per_text`: in batches, by meter; None without one.
    """

    single_per_s: float
    batch_per_s: float
    latency_p50_ms: float
    latency_p99_ms: float
    peak_rss_bytes: int
    file_bytes: int
    spearman: float | None
    runs: str
    joules_per_text: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class EncoderBench:
    """`bundle`: the modes of this bundle by name; `compared`: those of the other one; `baselines`: the original.

    `energy_reason`: why no energy was measured.
    """

    settings: EncoderSettings
    processor: str
    weight_bytes: int
    mean_tokens: float
    bundle: dict[str, EncoderSpeed]
    compared: dict[str, EncoderSpeed]
    baselines: dict[str, EncoderSpeed]
    energy_reason: str | None = None

    @property
    def speeds(self) -> dict[str, EncoderSpeed]:
        """All rows of the table."""
        return self.bundle | self.compared | self.baselines

    def to_dict(self) -> dict[str, Any]:
        """The best mode's numbers stand at the top as well, where scripts look for them."""
        return asdict(max(self.bundle.values(), key=lambda speed: speed.batch_per_s)) | asdict(self)


def to_json(results: Sequence[EncoderBench]) -> str:
    """As a decoder's: the first result at the top, several under `threads`."""
    raw = {"format": FORMAT} | results[0].to_dict()
    if len(results) > 1:
        raw["threads"] = {str(result.settings.threads): result.to_dict() for result in results}
    return json.dumps(raw, indent=1, default=str) + "\n"


def bench_encoder(folder: Path, settings: EncoderSettings, stages: Stages) -> EncoderBench:
    """Measure the sentence encoder in `folder` on this machine.

    Raises:
        BundleError: no bundle.
        UsageError: `other` is no sentence encoder, or the pairs are unreadable.
        ModelError: with pairs, the original model cannot be had; leave the baselines out.
        BenchError: a runtime stopped.
    """
    manifest = read_manifest(folder)
    if settings.other and read_manifest(settings.other).kind != KIND:
        raise UsageError(f"{settings.other}: no sentence encoder, {folder} is one; compare bundles of one kind")
    pairs = read_pairs(settings.pairs) if settings.pairs else None
    spec = spec_from_json(json.dumps(manifest.model["spec"]))
    assert isinstance(spec, EncoderSpec)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jpq-bench-")))
        graphs = {}
        if settings.baselines:
            with stages.stage("baselines", "writing the graphs to compare with"):
                whole = original_spec(spec, load_plan(folder / "plan.json"))
                check_room(scratch, whole)
                weights = (
                    original_weights(manifest.model["source"], whole) if pairs and pairs.scores is not None else None
                )
                graphs = write_encoder_baselines(whole, scratch, weights=weights)
        texts = _texts(pairs) if pairs else []
        rows = _token_rows(folder, texts) if pairs else random_rows(spec)
        with stages.stage("load", "loading every runtime"):
            workers = _workers(stack, folder, graphs, settings)
        with stages.stage("measure", "taking turns") as report:
            timed = _spread(rows, TEXTS)
            meters = find_meters()
            times = take_turns(workers, timed, scratch, settings, report, meters=meters)
        quality = {}
        if pairs and pairs.scores is not None:
            with stages.stage("quality", f"{len(pairs.first)} pairs"):
                quality = {name: _quality(worker, texts, rows, pairs, scratch) for name, worker in workers.items()}
        speeds = {name: _speed(worker, times[name], len(timed), quality.get(name)) for name, worker in workers.items()}
    ours, other, rivals = (
        {name: speed for name, speed in speeds.items() if kind(name) == wanted}
        for wanted in ("bundle", "compared", "baselines")
    )
    mean = float(np.mean([len(row) for row in timed]))
    return EncoderBench(settings, processor(), manifest.weight_bytes, mean, ours, other, rivals, meters.reason)


def random_rows(spec: EncoderSpec) -> list[list[int]]:
    """TEXTS rows of token ids, as long as sentences are and no longer than the model reads."""
    rng = np.random.default_rng(0)
    words = [token for token in range(spec.vocab) if token != spec.pad_id]
    lengths = (min(LENGTHS[i % len(LENGTHS)], spec.max_positions) for i in range(TEXTS))
    return [rng.choice(words, length).tolist() for length in lengths]


def _texts(pairs: Pairs) -> list[str]:
    """Every different text once."""
    return list(dict.fromkeys((*pairs.first, *pairs.second)))


def _token_rows(folder: Path, texts: list[str]) -> list[list[int]]:
    """As the bundle's tokenizer cuts them."""
    from tokenizers import Tokenizer

    return [e.ids for e in Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)]


def _spread(rows: list[list[int]], count: int) -> list[list[int]]:
    """`count` rows of all lengths that occur, evenly by rank."""
    ranked = sorted(rows, key=len)
    return [ranked[i * len(ranked) // count] for i in range(count)] if len(ranked) > count else ranked


def _workers(stack: ExitStack, folder: Path, graphs: dict[str, Path], settings: EncoderSettings) -> dict[str, Worker]:
    """Ours both exactly and fast; the original's graphs without our kernels."""
    bundles = {"jpq": folder} | ({compared_name(settings.other): settings.other} if settings.other else {})
    ways = {}
    for name, each in bundles.items():
        ways |= {name: (each / "model.onnx", True, True), f"{name}-fast": (each / "model.onnx", True, False)}
    ways |= {name: (graph, False, True) for name, graph in graphs.items()}
    return {
        name: stack.enter_context(ended(Worker(path, settings.threads, kernels=kernels, exact=exact)))
        for name, (path, kernels, exact) in ways.items()
    }


def take_turns(
    workers: dict[str, Any],
    rows: list[list[int]],
    scratch: Path,
    settings: EncoderSettings,
    report: Callable[[int, int], None],
    *,
    meters: Meters,
) -> dict[str, Times]:
    """Runtime -> its times and energies."""
    all_rows, singles = scratch / "rows.json", scratch / "singles.json"
    all_rows.write_text(json.dumps(rows), encoding="utf-8")
    singles.write_text(json.dumps(_spread(rows, SINGLES)), encoding="utf-8")
    for worker in workers.values():  # the first passes allocate
        worker.ask(embed=[str(singles), 1])
        worker.ask(embed=[str(all_rows), settings.batch])
    out = {name: Times([], [], []) for name in workers}
    for turn in range(settings.rounds):
        for i, (name, worker) in enumerate(workers.items()):
            out[name].alone.extend(worker.ask(embed=[str(singles), 1])["seconds"])
            job = [str(all_rows), settings.batch]
            answer, joules = meters.around(lambda worker=worker, job=job: worker.ask(embed=job))
            out[name].together.append(sum(answer["seconds"]))
            out[name].joules.append(joules)
            report(turn * len(workers) + i + 1, settings.rounds * len(workers))
    return out


def _quality(worker: Worker, texts: list[str], rows: list[list[int]], pairs: Pairs, scratch: Path) -> EmbeddingQuality:
    source, out = scratch / "texts.json", scratch / "vectors.npy"
    source.write_text(json.dumps(rows), encoding="utf-8")
    worker.ask(vectors=[str(source), str(out)])
    place, vectors = {text: i for i, text in enumerate(texts)}, np.load(out)
    return evaluate_embeddings(lambda wanted: vectors[[place[text] for text in wanted]], pairs)


def _speed(worker: Any, times: Times, texts: int, quality: EmbeddingQuality | None) -> EncoderSpeed:
    alone, together = times.alone, times.together
    memory = worker.ask(memory=True)
    p50, p99 = (float(np.percentile(alone, q)) * 1e3 for q in (50, 99))
    turns = np.reshape(alone, (len(together), -1)).sum(1)  # [rounds]
    return EncoderSpeed(
        single_per_s=len(alone) / len(together) / median(turns.tolist()),
        batch_per_s=texts / median(together),
        latency_p50_ms=p50,
        latency_p99_ms=p99,
        peak_rss_bytes=memory["peak_rss_bytes"],
        file_bytes=worker.file_bytes,
        spearman=quality.spearman if quality else None,
        runs=memory["runs"],
        joules_per_text=median_joules(times.joules, texts),
    )
