"""`check_parity`: the compressed PyTorch model against onnxruntime on the delivered ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jpq_export.format.compressed import CompressedModel
from jpq_export.parity import tolerance
from jpq_export.parity.bisect import find_divergence, layer_errors, value_errors
from jpq_export.parity.cases import CHUNK, Cases, make_cases
from jpq_export.parity.compare import LogitsError, LogitsTally, margin, worst
from jpq_export.parity.points import points
from jpq_export.parity.result import CaseResult, Divergence, GreedyResult, LayerResult, ParityReport, RuntimeResult
from jpq_export.parity.runners import OrtRunner, TorchRunner

Progress = Callable[[int, int], None]
Runner = TorchRunner | OrtRunner
Pair = tuple[np.ndarray, np.ndarray]
ROUNDING, EFFECT = "rounding", "effect"


def check_parity(
    model: CompressedModel,
    onnx_path: Path,
    *,
    prompts: Sequence[Sequence[int]],
    steps: int = 64,
    form: str = "custom_op",
    progress: Progress | None = None,
) -> ParityReport:
    """Compare logits, greedy tokens and every sub-layer; nothing raises on a difference, `report.passed` says it.

    A graph that onnxruntime runs with activations rounded to 8 bits is checked twice: with fp32 activations by the
    bounds of rounding, then as a user runs it by its effect on the output distribution. BundleError when onnxruntime
    cannot load the file.
    """
    job = _Job(model, onnx_path, TorchRunner(model), make_cases(prompts, model.spec), steps, form, progress)
    rounds = OrtRunner.rounds_activations(onnx_path)
    judges = (ROUNDING, EFFECT) if rounds else (ROUNDING,)
    results = []
    for number, judge in enumerate(judges):
        results.append(_check_runtime(job, judge))
        if progress:
            progress(number + 1, len(judges))
    return ParityReport(f"pytorch {job.reference.version}", tuple(results))


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """What every runtime is checked with."""

    model: CompressedModel
    onnx_path: Path
    reference: TorchRunner
    cases: Cases
    steps: int
    form: str
    progress: Progress | None


def _check_runtime(job: _Job, judge: str) -> RuntimeResult:
    """All cases, then all points; two sessions one after the other, for side by side they would hold two copies."""
    version, cases, greedy = _run_cases(job, judge)
    layers, divergence = _run_points(job, judge)
    exact = judge == ROUNDING
    passed = all(case.passed for case in cases) and all(layer.passed for layer in layers)
    passed = passed and (not exact or greedy.equal == greedy.steps or greedy.tie)
    return RuntimeResult(
        name="onnxruntime" if exact else "onnxruntime-int8-activations",
        version=version,
        path=f"{job.form}, CPU, activations " + ("in fp32" if exact else "rounded to 8 bits where onnxruntime fuses"),
        judged_by=judge,
        logits=worst(case.logits for case in cases),
        greedy=greedy,
        cases=cases,
        layers=layers,
        first_diverging=None if passed else divergence,
        passed=passed,
    )


def _run_cases(job: _Job, judge: str) -> tuple[str, tuple[CaseResult, ...], GreedyResult]:
    runner, cases = OrtRunner(job.onnx_path, exact=judge == ROUNDING), job.cases
    runs = {"prefill": _prefill(job.reference, runner, cases), "padded batch": _padded(job.reference, runner, cases)}
    if cases.long is not None:
        runs["sliding window"] = _long(job.reference, runner, cases.long)
    results = []
    for name, pairs in runs.items():
        tally = LogitsTally()
        for reference, value in pairs:
            tally.add(reference, value)
        results.append(_case(name, tally, judge))
    tally = LogitsTally()
    greedy = run_greedy(job.reference, runner, cases.prefill, steps=job.steps, tally=tally)
    return runner.version, (*results, _case("decode", tally, judge)), greedy


def _case(name: str, tally: LogitsTally, judge: str) -> CaseResult:
    error = tally.result()
    return CaseResult(name, tally.positions, error, within(error, judge))


def within(error: LogitsError, judge: str) -> bool:
    """Whether logits are as close as they must be."""
    if judge == EFFECT:
        return error.kl_mean <= tolerance.KL_MEAN_INT8
    return error.rel_rms <= tolerance.LOGITS_REL_RMS and error.kl_mean <= tolerance.KL_MEAN


def _prefill(reference: Runner, runner: Runner, cases: Cases) -> Iterator[Pair]:
    yield reference.forward(cases.prefill).logits, runner.forward(cases.prefill).logits


def _padded(reference: Runner, runner: Runner, cases: Cases) -> Iterator[Pair]:
    """The left-padded batch: prefill, then single steps through the cache; logits [positions, vocab] of real tokens."""
    caches, start = (None, None), 0
    for end in range(cases.padded_prefill, cases.padded.shape[1] + 1):
        ids, mask = cases.padded[:, start:end], cases.mask[:, :end]
        ours, theirs = (r.forward(ids, mask=mask, cache=c) for r, c in zip((reference, runner), caches, strict=True))
        real = mask[:, start:].astype(bool)
        yield ours.logits[real], theirs.logits[real]
        caches, start = (ours.cache, theirs.cache), end


def _long(reference: Runner, runner: Runner, ids: np.ndarray) -> Iterator[Pair]:
    """Past a sliding window, a chunk at a time: whole logits of a large vocabulary would fill the memory."""
    caches = (None, None)
    for start in range(0, ids.shape[1], CHUNK):
        chunk = ids[:, start : start + CHUNK]
        ours, theirs = (r.forward(chunk, cache=c) for r, c in zip((reference, runner), caches, strict=True))
        yield ours.logits, theirs.logits
        caches = ours.cache, theirs.cache


def run_greedy(
    reference: Runner, runner: Runner, prompt: np.ndarray, *, steps: int, tally: LogitsTally
) -> GreedyResult:
    """Both sides choose their own tokens from `prompt` [1, seq] on; stops at the first difference."""
    caches, ids = (None, None), prompt
    for step in range(steps):
        ours, theirs = (r.forward(ids, cache=c) for r, c in zip((reference, runner), caches, strict=True))
        caches, last = (ours.cache, theirs.cache), ours.logits[0, -1]
        tally.add(last[None], theirs.logits[0, -1:])
        token = int(last.argmax())
        if token != int(theirs.logits[0, -1].argmax()):
            rounding = tolerance.greedy_tie(float(np.sqrt(np.mean(last.astype(np.float64) ** 2))))
            return GreedyResult(steps, step, margin(last), rounding)
        ids = np.array([[token]], np.int64)
    return GreedyResult(steps, steps)


def _run_points(job: _Job, judge: str) -> tuple[tuple[LayerResult, ...], Divergence | None]:
    """Errors of every sub-layer, and the first wrong value if one is beyond its bound."""
    runner = OrtRunner(job.onnx_path, exact=judge == ROUNDING, with_points=True)
    reference = job.reference.forward(job.cases.prefill, values=True).values
    values = runner.forward(job.cases.prefill, values=True).values
    layers = layer_errors(points(job.model.spec), value_errors(reference, values), judged=judge == ROUNDING)
    divergence = find_divergence(job.model, runner, reference, values) if judge == ROUNDING else None
    return layers, divergence
