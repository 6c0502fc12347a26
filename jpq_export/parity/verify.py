"""`verify_bundle`: hashes, then the recorded vectors in onnxruntime. Needs numpy, onnx and onnxruntime; no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jpq_export.errors import BundleError
from jpq_export.format.bundle import Problem, check_hashes, read_manifest
from jpq_export.format.encoder_spec import KIND
from jpq_export.format.spec import ModelSpec
from jpq_export.parity import tolerance
from jpq_export.parity.cases import Cases
from jpq_export.parity.compare import peak_error, relative_rms
from jpq_export.parity.int8_cache import WHOLE_STEP, CacheTally, read_back, wrong_write
from jpq_export.parity.points import Point, inside_chain, node_of, points
from jpq_export.parity.result import Divergence, GreedyResult
from jpq_export.parity.runners import OrtRunner
from jpq_export.parity.vectors import WRITTEN, Vectors, compute
from jpq_export.runtime import native

Progress = Callable[[int, int], None]
PHASES = 3
NEEDED = {"ids.prefill", "ids.padded", "mask.padded", "greedy", "margin", "rounding"}
CASES = ("prefill", "padded", "decode")
ONNX, VECTORS = "model.onnx", "vectors.safetensors"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found. `problems` of the files first, then of the numbers; none means the bundle is as exported."""

    problems: tuple[Problem, ...]
    files: int
    runtime: str | None = None
    logits_rel_rms: float | None = None
    greedy: GreedyResult | None = None
    first_diverging: Divergence | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify_bundle(folder: Path, *, progress: Progress | None = None) -> VerifyReport:
    """Check every file's hash, then recompute the recorded vectors; BundleError when there is no readable manifest.

    They are computed as `run` computes: by our kernels, or by onnxruntime's operators where those cannot be compiled.
    The numbers are checked even when a hash is wrong, so that the report says what the damage does, and even when all
    hashes are right, for files and hashes can be rewritten together.
    """
    tick = progress or (lambda _done, _total: None)
    manifest = read_manifest(folder)
    problems = check_hashes(folder, manifest)
    tick(1, PHASES)
    if manifest.kind == KIND:
        report = _verify_encoder(folder, problems, files=len(manifest.files))
        tick(PHASES, PHASES)
        return report
    place = VECTORS
    try:
        vectors = Vectors.load(folder / VECTORS)
        place = ONNX
        runner = OrtRunner(folder / ONNX, kernels=native.available(), with_points=True, open_cache=True)
        place = VECTORS
        _check_vectors(vectors, runner)
        tick(2, PHASES)
        report = _check_numbers(vectors, runner, problems, files=len(manifest.files))
    except BundleError as error:
        report = VerifyReport((*problems, Problem(place, str(error))), len(manifest.files))
    tick(PHASES, PHASES)
    return report


def _verify_encoder(folder: Path, problems: list[Problem], *, files: int) -> VerifyReport:
    """The same for a sentence encoder, whose recorded vectors are embeddings."""
    from jpq_export.parity.encoder import compare_recorded, load_recorded

    try:
        recorded = load_recorded(folder / VECTORS)
        runner = OrtRunner(folder / ONNX, kernels=native.available(), with_points=True)
        error, place = compare_recorded(recorded, runner)
    except BundleError as failure:
        return VerifyReport((*problems, Problem(ONNX, str(failure))), files)
    told = f"first value that differs from the recorded one; the embeddings' error is {error:.1e}"
    found = (*problems, *([Problem(place, told)] if place else []))
    return VerifyReport(found, files, f"onnxruntime {runner.version}", error)


def _check_vectors(vectors: Vectors, runner: OrtRunner) -> None:
    """BundleError when these cannot be the vectors of this graph: a tensor is missing, or it has another vocabulary."""
    recorded, vocab = vectors.tensors, runner.spec.vocab
    if missing := sorted(NEEDED - recorded.keys()):
        raise BundleError(f"{VECTORS}: {missing[0]} is missing; export the bundle again")
    for name in ("ids.prefill", "ids.padded", "greedy"):
        if recorded[name].size and not 0 <= recorded[name].min() <= recorded[name].max() < vocab:
            raise BundleError(f"{VECTORS}: {name} has tokens outside the model's vocabulary of {vocab}; wrong file")
    stored = {name for case in CASES for name in (f"{WRITTEN}{case}.{part}" for part in runner.opened)}
    if wrong := sorted(stored ^ {name for name in recorded if name.startswith(WRITTEN)}):
        raise BundleError(f"{VECTORS}: {wrong[0]} fits no int8 cache of {ONNX}; export the bundle again")


def _check_numbers(vectors: Vectors, runner: OrtRunner, problems: list[Problem], *, files: int) -> VerifyReport:
    recorded = vectors.tensors
    cases = Cases(recorded["ids.prefill"], recorded["ids.padded"], recorded["mask.padded"], None)
    steps = len(recorded["greedy"])
    computed = compute(runner, cases, steps=steps, forced=recorded["greedy"], recorded=recorded)
    divergence = _first_divergence(vectors, runner, computed) or _wrong_write(vectors, runner, computed)
    greedy = _compare_greedy(recorded, computed["greedy"])
    found = list(problems)
    if divergence:
        found.append(Problem(divergence.place, _line(divergence)))
    if greedy.equal < steps and not greedy.tie and not divergence:
        found.append(Problem("greedy", f"token {greedy.equal + 1} of {steps} differs from the recorded one"))
    rel_rms = max(
        relative_rms(recorded[name], computed[name]) if recorded[name].shape == computed[name].shape else float("inf")
        for name in recorded
        if name.startswith("logits.")
    )
    return VerifyReport(tuple(found), files, f"onnxruntime {runner.version}", rel_rms, greedy, divergence)


def _line(divergence: Divergence) -> str:
    return (
        f"first value that differs from the recorded one: error {divergence.rel_rms:.1e}, rounding explains at most "
        f"{divergence.bound:.1e} (sub-layer {divergence.sublayer}, node {divergence.node})"
    )


def _first_divergence(vectors: Vectors, runner: OrtRunner, computed: dict[str, np.ndarray]) -> Divergence | None:
    """The first point, then the first logits, beyond what rounding explains."""
    for point in points(runner.spec):
        if inside_chain(runner.proto.graph, point):
            continue
        kept = ("logits.last", "logits.prefill", "logits.padded", "logits.decode")
        for name in kept if point.name == "logits" else (f"point.{point.name}",):
            if name in vectors.tensors:
                found = _beyond(point, vectors.tensors[name], computed.get(name))
                if found:
                    return _divergence(runner, point, *found)
    return None


def _wrong_write(vectors: Vectors, runner: OrtRunner, computed: dict[str, np.ndarray]) -> Divergence | None:
    """The first tensor of an int8 cache that holds other codes or scales than rounding explains."""
    if not runner.opened:
        return None
    assert isinstance(runner.spec, ModelSpec)
    tally = CacheTally(runner.spec, slack=WHOLE_STEP)
    for case in CASES:
        stem = f"{WRITTEN}{case}."
        theirs, ours = (
            {name.removeprefix(stem): value for name, value in side.items() if name.startswith(stem)}
            for side in (vectors.tensors, computed)
        )
        tally.add(read_back(theirs), ours)
    return wrong_write(tally.result(), runner.proto.graph)


def _beyond(point: Point, recorded: np.ndarray, computed: np.ndarray | None) -> tuple[float, float] | None:
    """(error, bound) when a value is out of bounds on the whole or in one feature; a missing one is infinitely so."""
    if computed is None or computed.shape != recorded.shape:
        return float("inf"), point.bound
    error, peak = relative_rms(recorded, computed), peak_error(recorded, computed)
    if error > point.bound:
        return error, point.bound
    return (peak, tolerance.PEAK * point.bound) if peak > tolerance.PEAK * point.bound else None


def _divergence(runner: OrtRunner, point: Point, error: float, bound: float) -> Divergence:
    node = node_of(runner.proto.graph, point.name)
    return Divergence(point.sublayer, point.blame, node, error, bound)


def _compare_greedy(recorded: dict[str, np.ndarray], tokens: np.ndarray) -> GreedyResult:
    """Tokens chosen after the same prefix; the first difference with the recorded margin."""
    steps = len(tokens)
    different = np.flatnonzero(recorded["greedy"] != tokens)
    if not different.size:
        return GreedyResult(steps, steps)
    first = int(different[0])
    return GreedyResult(steps, first, float(recorded["margin"][first]), float(recorded["rounding"][first]))
