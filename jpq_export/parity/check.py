"""`check_parity`: the compressed PyTorch model against onnxruntime on the delivered ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jpq_export.format.compressed import CompressedModel
from jpq_export.format.encoder_spec import Spec
from jpq_export.format.spec import INT8_CACHE, ModelSpec
from jpq_export.parity import tolerance
from jpq_export.parity.bisect import find_divergence, layer_errors, value_errors
from jpq_export.parity.cases import CHUNK, Cases, make_cases
from jpq_export.parity.compare import LogitsError, LogitsTally, margin, worst
from jpq_export.parity.int8_cache import CacheTally, wrong_write
from jpq_export.parity.points import points
from jpq_export.parity.recalled import Recalled
from jpq_export.parity.result import (
    CacheResult,
    CaseResult,
    Divergence,
    GreedyResult,
    LayerResult,
    ParityReport,
    RuntimeResult,
)
from jpq_export.parity.runners import OrtRunner, Outcome, TorchRunner, load_proto, read_metadata
from jpq_export.parity.vectors import Runner
from jpq_export.runtime import native

Progress = Callable[[int, int], None]
Pair = tuple[np.ndarray, np.ndarray]
ROUNDING, HALF, EFFECT = "rounding", "half", "effect"


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to run the file: whose operators, and whether rounding alone may explain a difference."""

    name: str
    path: str
    judge: str = ROUNDING
    kernels: bool = False

    @property
    def exact(self) -> bool:
        """Whether onnxruntime must not round activations to 8 bits."""
        return self.judge != EFFECT

    @property
    def bounded(self) -> bool:
        """Whether every value inside has an arithmetic bound."""
        return self.judge == ROUNDING


BODIES = _Way("onnxruntime", "function bodies, activations in fp32")
KERNELS = _Way("onnxruntime-jpq-kernels", "our CPU kernels, activations in fp32", kernels=True)
SIGNED = _Way("onnxruntime-fp16", "the graph of the engine: INT4 and INT8, products in fp16", judge=HALF)
INT8 = _Way("onnxruntime-int8-activations", "function bodies, activations rounded to 8 bits", judge=EFFECT)


def check_parity(
    model: CompressedModel,
    onnx_path: Path,
    *,
    prompts: Sequence[Sequence[int]],
    steps: int = 64,
    form: str = "custom_op",
    half_path: Path | None = None,
    reference: Runner | None = None,
    progress: Progress | None = None,
) -> ParityReport:
    """Compare logits, greedy tokens and every sub-layer; nothing raises on a difference, `report.passed` says it.

    The proof are two runs with fp32 activations: the function bodies, which any onnxruntime computes, and our CPU
    kernels where they can be compiled, which is what `run` uses. onnxruntime left to itself rounds activations to 8
    bits in its own low-bit kernels; a last run says what that costs and fails only on a wrong kernel.
    `reference`: what onnxruntime is compared with instead of our own PyTorch model of `model`.
    `half_path`: a graph of the same model that computes in fp16 (form "signed"), checked against bounds of its own.
    BundleError when onnxruntime cannot load the file.
    """
    proto = load_proto(onnx_path)
    _, unfused = read_metadata(proto, onnx_path)
    rounds = bool(set(model.quantized) - unfused - {"embed", "positions"})
    assert isinstance(model.spec, ModelSpec)  # encoders: `parity.encoder`
    cases, reference = make_cases(prompts, model.spec), reference or Recalled(TorchRunner(model))
    steps = cases.steps_within(model.spec, steps)
    ways = [BODIES, KERNELS] if proto.functions and native.available() else [BODIES]
    count = len(ways) + rounds + (half_path is not None)
    job = _Job(model, onnx_path, reference, cases, steps, form, _ticker(progress, count * (steps + 3)))
    runtimes = tuple(_check_runtime(job, way) for way in ways)
    if half_path is not None:
        runtimes += (_check_runtime(replace(job, onnx_path=half_path, form="signed"), SIGNED),)
    return ParityReport(f"pytorch {reference.version}", runtimes, _check_runtime(job, INT8) if rounds else None)


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """What every runtime is checked with; `tick` is called after each pass."""

    model: CompressedModel
    onnx_path: Path
    reference: Runner
    cases: Cases
    steps: int
    form: str
    tick: Callable[[], None]


def _ticker(progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done = min(done + 1, total)
        if progress:
            progress(done, total)

    return tick


def _check_runtime(job: _Job, way: _Way) -> RuntimeResult:
    """All cases, then all points; two sessions one after the other, for side by side they would hold two copies."""
    version, cases, greedy, cache = _run_cases(job, way)
    layers, divergence = _run_points(job, way)
    if cache and not divergence:
        divergence = wrong_write(cache, load_proto(job.onnx_path).graph)
    passed = all(case.passed for case in cases) and all(layer.passed for layer in layers) and divergence is None
    return RuntimeResult(
        name=way.name,
        version=version,
        path=f"{job.form}, CPU, {way.path}",
        judged_by=way.judge,
        logits=worst(case.logits for case in cases),
        greedy=greedy,
        cases=cases,
        layers=layers,
        first_diverging=divergence,
        passed=passed and (not way.bounded or greedy.equal == greedy.steps or greedy.tie),
        cache=cache,
    )


def _run_cases(job: _Job, way: _Way) -> tuple[str, tuple[CaseResult, ...], GreedyResult, CacheResult | None]:
    both = _Both(job, OrtRunner(job.onnx_path, exact=way.exact, kernels=way.kernels), way)
    runs = {"prefill": _prefill(both, job.cases), "padded batch": _padded(both, job.cases)}
    if job.cases.long is not None and way.exact:
        runs["sliding window"] = _long(both, job.cases.long)
    results, spec = [], job.model.spec
    for name, pairs in runs.items():
        tally = LogitsTally()
        for reference, value in pairs:
            tally.add(reference, value)
        results.append(_case(name, tally, spec, judge=way.judge))
        job.tick()
    tally = LogitsTally()
    greedy = _greedy(both, job.cases.prefill, steps=job.steps, tally=tally, tick=job.tick)
    cache = both.written.result() if both.written else None
    return both.runner.version, (*results, _case("decode", tally, spec, judge=way.judge)), greedy, cache


def _case(name: str, tally: LogitsTally, spec: Spec, *, judge: str) -> CaseResult:
    error = tally.result()
    return CaseResult(name, tally.positions, error, within(error, spec, judge=judge))


def within(error: LogitsError, spec: Spec, *, judge: str) -> bool:
    """Whether logits are as close as they must be."""
    if judge == HALF:
        return error.rel_rms <= tolerance.half(spec) and error.kl_mean <= tolerance.SMALL_EFFECT
    if judge == EFFECT:
        return error.rel_rms <= tolerance.int8(spec)
    return error.rel_rms <= tolerance.logits(spec) and error.kl_mean <= tolerance.kl_mean(spec)


class _Both:
    """The reference and a runtime fed the same tokens, each with its own cache.

    What a bounded runtime writes into an int8 cache is judged by `written`, and then the reference reads that.
    """

    def __init__(self, job: _Job, runner: OrtRunner, way: _Way) -> None:
        self.reference, self.runner = job.reference, runner
        spec = job.model.spec
        judged = isinstance(spec, ModelSpec) and spec.kv_cache == INT8_CACHE and way.bounded
        self.written = CacheTally(spec) if judged and isinstance(spec, ModelSpec) else None
        self._caches = (None, None)

    def start(self) -> None:
        """Forget what was fed."""
        self._caches = (None, None)

    def feed(self, ids: np.ndarray, *, mask: np.ndarray | None = None) -> Pair:
        """Logits of both for the next tokens."""
        theirs = self.runner.forward(ids, mask=mask, cache=self._caches[1])
        given = theirs.written if self.written else None
        ours: Outcome = self.reference.forward(ids, mask=mask, cache=self._caches[0], given=given)
        if self.written:
            self.written.add(ours.exact, theirs.written)
        self._caches = ours.cache, theirs.cache
        return ours.logits, theirs.logits


def _prefill(both: _Both, cases: Cases) -> Iterator[Pair]:
    both.start()
    yield both.feed(cases.prefill)


def _padded(both: _Both, cases: Cases) -> Iterator[Pair]:
    """The left-padded batch: prefill, then single steps through the cache; logits [positions, vocab] of real tokens."""
    both.start()
    start = 0
    for end in range(cases.padded_prefill, cases.padded.shape[1] + 1):
        ours, theirs = both.feed(cases.padded[:, start:end], mask=cases.mask[:, :end])
        real = cases.mask[:, start:end].astype(bool)
        yield ours[real], theirs[real]
        start = end


def _long(both: _Both, ids: np.ndarray) -> Iterator[Pair]:
    """Past a sliding window, fed in chunks: whole logits of a large vocabulary would fill the memory.

    The last chunk is compared. Its queries look at keys of all chunks before, and the window leaves the first behind.
    """
    both.start()
    pair = None
    for start in range(0, ids.shape[1], CHUNK):
        pair = both.feed(ids[:, start : start + CHUNK])
    if pair is not None:
        yield pair


def _greedy(
    both: _Both, prompt: np.ndarray, *, steps: int, tally: LogitsTally, tick: Callable[[], None]
) -> GreedyResult:
    """Both sides choose their own tokens from `prompt` [1, seq] on; stops at the first difference."""
    both.start()
    ids = prompt
    for step in range(steps):
        ours, theirs = (logits[0, -1] for logits in both.feed(ids))
        tally.add(ours[None], theirs[None])
        tick()
        token = int(ours.argmax())
        if token != int(theirs.argmax()):
            size = float(np.sqrt(np.mean(ours.astype(np.float64) ** 2)))
            rounding = tolerance.greedy_tie(size, both.reference.spec)
            return GreedyResult(steps, step, margin(ours), rounding)
        ids = np.array([[token]], np.int64)
    return GreedyResult(steps, steps)


def _run_points(job: _Job, way: _Way) -> tuple[tuple[LayerResult, ...], Divergence | None]:
    """Errors of every sub-layer, and the first wrong value if there is one."""
    runner = OrtRunner(job.onnx_path, exact=way.exact, kernels=way.kernels, with_points=True)
    theirs = runner.forward(job.cases.prefill, values=True)
    values, given = theirs.values, theirs.written if way.bounded and theirs.written else None
    reference = job.reference.forward(job.cases.prefill, values=True, given=given).values
    layers = layer_errors(points(job.model.spec), value_errors(reference, values), judged=way.bounded)
    return layers, find_divergence(job.model, runner, reference, values) if way.bounded else None
