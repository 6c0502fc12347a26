"""A real bundle through onnxruntime's CUDA provider and our operators: parity with the CPU, then tokens a second."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from gpu_steps.outcome import FAILED, PASSED, CannotRun, Outcome, Settings

PROMPT, STEPS = 32, 64
PREFILLS = (128, 512)
LOGITS_REL_RMS = 1e-4  # parity/tolerance.py: the product's promise


def run(settings: Settings) -> Outcome:
    """The step `decode`; without a GPU (a rehearsal) our CPU kernels stand in its place."""
    if settings.bundle is None:
        raise CannotRun("no bundle: give --bundle FOLDER, one written by jpq-export (--target h100, say)")
    model, reference = loaded(Path(settings.bundle) / "model.onnx", settings)
    vocab, rng = model.spec.vocab, np.random.default_rng(5)
    prompt = rng.integers(0, vocab, PROMPT)
    tokens, errors = greedy(model, reference, prompt)
    other = relative_rms(model.forward(prompt[None]).logits, reference.forward((prompt[None] + 1) % vocab).logits)
    facts = {
        "runs": model.path,
        "beside": reference.path,
        "largest relative RMS error of the logits": max(errors),
        "bound": LOGITS_REL_RMS,
        "twin: the same of another prompt": other,
        f"greedy tokens equal, of {STEPS}": tokens,
    }
    rows = [speeds(model, settings), speeds(reference, settings)] if not settings.quick else [speeds(model, settings)]
    wrong = [
        *(["logits are beyond the bound"] if not max(errors) <= LOGITS_REL_RMS else []),
        *(["another prompt passes as well"] if not other > LOGITS_REL_RMS else []),
        *([f"only {tokens} of {STEPS} greedy tokens are equal"] if tokens < STEPS else []),
    ]
    return Outcome(FAILED if wrong else PASSED, "; ".join(wrong), facts, rows)


def loaded(path: Path, settings: Settings) -> tuple[Any, Any]:
    """The model under test, and onnxruntime's own operators on the CPU; CannotRun where a package or the GPU lacks."""
    try:
        from jpq_export.errors import JpqError
        from jpq_export.runtime import native_cuda
        from jpq_export.runtime.session import OrtModel

        reason = None if settings.rehearse else native_cuda.reason_against()
    except ImportError as error:
        raise CannotRun(f"{error}; install onnxruntime-gpu") from error
    if reason:
        raise CannotRun(reason)
    try:
        os.environ["JPQ_KERNELS"] = "off"
        reference = OrtModel(path, device="cpu")
        del os.environ["JPQ_KERNELS"]
        return OrtModel(path, device="cpu" if settings.rehearse else "cuda"), reference
    except JpqError as error:
        raise AssertionError(str(error)) from error


def greedy(model: Any, reference: Any, prompt: np.ndarray) -> tuple[int, list[float]]:
    """How many greedy tokens are equal until one differs, and the logits' error at each step, fed the reference's."""
    ours, theirs = model.start(), reference.start()
    ids, equal, errors = prompt.tolist(), 0, []
    for step in range(STEPS):
        got, expected = ours.step(ids), theirs.step(ids)
        errors.append(relative_rms(got, expected))
        ids = [int(expected.argmax())]
        equal += equal == step and tie_or_equal(got, expected)
    return equal, errors


def tie_or_equal(got: np.ndarray, expected: np.ndarray) -> bool:
    """The same best token, or two that rounding alone may turn round (parity/tolerance.py: greedy_tie)."""
    margin = expected.max() - expected[got.argmax()]
    return bool(margin <= 2 * LOGITS_REL_RMS * np.sqrt(np.mean(np.square(expected))))


def relative_rms(got: np.ndarray, expected: np.ndarray) -> float:
    """RMS of the difference over the RMS of `expected`; infinite for a NaN."""
    ratio = np.sqrt(np.mean(np.square(got - expected)) / np.mean(np.square(expected)))
    return float(np.nan_to_num(ratio, nan=np.inf))


def speeds(model: Any, settings: Settings) -> dict[str, Any]:
    """Tokens a second: decode after a short prompt (median of the steps), prefill (median of three)."""
    limit = model.spec.max_positions
    decoding, seconds = model.start(), []
    logits = decoding.step(range(8))
    for _ in range(min(STEPS, limit - 8)):
        start = time.perf_counter()
        logits = decoding.step([int(logits.argmax())])
        seconds.append(time.perf_counter() - start)
    out = {"runs": model.path, "decode tokens/s": 1 / statistics.median(seconds)}
    for count in PREFILLS[:1] if settings.quick else PREFILLS:
        ids = np.random.default_rng(0).integers(0, model.spec.vocab, min(count, limit)).tolist()
        times = []
        for _ in range(3):
            start = time.perf_counter()
            model.start().step(ids)
            times.append(time.perf_counter() - start)
        out[f"prefill of {count}, tokens/s"] = len(ids) / statistics.median(times)
    return out
