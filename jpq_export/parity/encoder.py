"""Parity of a sentence encoder: PyTorch against onnxruntime on single texts and a padded batch, every sub-layer.

Also the recorded vectors of an encoder's bundle, which `verify` computes again without torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jpq_export.errors import BundleError
from jpq_export.format.compressed import CompressedModel
from jpq_export.format.encoder_spec import EncoderSpec
from jpq_export.format.tensor_file import save_tensors
from jpq_export.parity import tolerance
from jpq_export.parity.bisect import find_divergence, layer_errors, value_errors
from jpq_export.parity.compare import relative_rms
from jpq_export.parity.points import points
from jpq_export.parity.result import Divergence, LayerResult, rounded
from jpq_export.parity.runners import OrtRunner, TorchRunner, load_proto, read_metadata
from jpq_export.runtime import native

FORMAT = "jpq-parity-encoder/1"
VECTORS_FORMAT = "jpq-vectors-encoder/1"
OUTPUT = "embedding"
PADDED = 3  # texts in the batch


@dataclass(frozen=True, slots=True)
class EmbeddingCase:
    """One input shape: errors over its embeddings; `distance` is the largest 1 - cosine."""

    name: str
    texts: int
    rel_rms: float
    distance: float
    passed: bool


@dataclass(frozen=True, slots=True)
class EncoderRuntime:
    """One runtime against the reference."""

    name: str
    version: str
    path: str
    cases: tuple[EmbeddingCase, ...]
    layers: tuple[LayerResult, ...]
    first_diverging: Divergence | None
    passed: bool


@dataclass(frozen=True, slots=True)
class EncoderParity:
    """All runtimes of one encoder's bundle; `as_run`: onnxruntime by its defaults, a price and not a proof."""

    reference: str
    runtimes: tuple[EncoderRuntime, ...]
    as_run: EncoderRuntime | None = None

    @property
    def passed(self) -> bool:
        """Whether every runtime computes the model."""
        return all(r.passed for r in (*self.runtimes, *([self.as_run] if self.as_run else [])))

    @property
    def first_diverging(self) -> Divergence | None:
        """The first wrong value of the first runtime that has one."""
        return next((r.first_diverging for r in self.runtimes if r.first_diverging), None)

    def to_json(self) -> str:
        """The text of parity.json."""
        raw = {"format": FORMAT, "passed": self.passed, **asdict(self)}
        return json.dumps(rounded(raw), indent=1) + "\n"


def check_encoder(
    model: CompressedModel, onnx_path: Path, *, texts: Sequence[Sequence[int]], form: str = "custom_op"
) -> EncoderParity:
    """Compare embeddings and every sub-layer on `texts` (ids with special tokens); nothing raises on a difference.

    The proof runs with fp32 activations: in the function bodies, and in our CPU kernels where they can be compiled. A
    last run lets onnxruntime round activations to 8 bits, as it does by itself, and fails only on a wrong kernel.
    """
    reference = TorchRunner(model)
    proto = load_proto(onnx_path)
    _, unfused = read_metadata(proto, onnx_path)
    cases = make_cases(texts, model.spec)
    runtimes = [_check(model, reference, cases, onnx_path, "onnxruntime", f"{form}, CPU, function bodies, fp32")]
    if proto.functions and native.available():
        path = f"{form}, CPU, our kernels, fp32"
        runtimes.append(_check(model, reference, cases, onnx_path, "onnxruntime-jpq-kernels", path, kernels=True))
    as_run = None
    if any(not name.startswith(("embed", "positions")) for name in set(model.quantized) - unfused):
        path = f"{form}, CPU, function bodies, activations in 8 bits"
        as_run = _check(model, reference, cases, onnx_path, "onnxruntime-int8-activations", path, exact=False)
    return EncoderParity(f"pytorch {reference.version}", tuple(runtimes), as_run)


def make_cases(texts: Sequence[Sequence[int]], spec: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(ids, mask) int64 [batch, seq] by name: the longest text alone, and a batch of different lengths padded right."""
    real = sorted(([t for t in text if t != spec.pad_id] for text in texts), key=len)
    if not real or not real[0]:
        raise ValueError("texts must hold token ids")
    chosen = [real[round(k * (len(real) - 1) / (PADDED - 1))] for k in range(PADDED)]
    return {"one text": _batch([chosen[-1]], spec.pad_id), "padded batch": _batch(chosen, spec.pad_id)}


def _batch(texts: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, texts))
    ids, mask = np.full((len(texts), width), pad_id, np.int64), np.zeros((len(texts), width), np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    return ids, mask


def _check(
    model: CompressedModel,
    reference: TorchRunner,
    cases: dict[str, tuple[np.ndarray, np.ndarray]],
    path: Path,
    name: str,
    told: str,
    *,
    exact: bool = True,
    kernels: bool = False,
) -> EncoderRuntime:
    runner = OrtRunner(path, exact=exact, kernels=kernels, with_points=True)
    results, layers, divergence = [], (), None
    for case, (ids, mask) in cases.items():
        ours, theirs = reference.embed(ids, mask), run(runner, ids, mask)
        results.append(_case(case, ours[OUTPUT], theirs[OUTPUT], model.spec, exact=exact))
        if case == "one text":
            layers = layer_errors(points(model.spec), value_errors(ours, theirs), judged=exact)
            divergence = find_divergence(model, runner, ours, theirs) if exact else None
    passed = all(r.passed for r in results) and all(layer.passed for layer in layers) and divergence is None
    return EncoderRuntime(name, runner.version, told, tuple(results), layers, divergence, passed)


def _case(name: str, ours: np.ndarray, theirs: np.ndarray, spec: Any, *, exact: bool) -> EmbeddingCase:
    bound = tolerance.residual(spec, 2 * len(spec.layers)) if exact else tolerance.int8(spec)
    error = relative_rms(ours, theirs)
    a, b = (v.astype(np.float64) / np.linalg.norm(v.astype(np.float64), axis=-1, keepdims=True) for v in (ours, theirs))
    return EmbeddingCase(name, len(ours), error, float(np.square(a - b).sum(-1).max() / 2), error <= bound)


def run(runner: OrtRunner, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """The embedding and the values of all points the graph has, by name."""
    names = list(dict.fromkeys((OUTPUT, *runner.points)))
    return dict(zip(names, runner.session.run(names, {"input_ids": ids, "attention_mask": mask}), strict=True))


def record_vectors(model: CompressedModel, path: Path, *, texts: Sequence[Sequence[int]]) -> None:
    """vectors.safetensors: the padded batch, its embeddings, and the stream after each sub-layer of its first token."""
    reference = TorchRunner(model)
    ids, mask = make_cases(texts, model.spec)["padded batch"]
    values = reference.embed(ids, mask)
    taps = {f"point.{p.name}": values[p.name][:, 0] for p in points(model.spec) if p.is_tap and p.name != OUTPUT}
    tensors = {"ids": ids, "mask": mask, OUTPUT: values[OUTPUT]} | taps
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_tensors(path, tensors, meta={"format": VECTORS_FORMAT, "reference": f"pytorch {reference.version}"})


def load_recorded(path: Path) -> dict[str, np.ndarray]:
    """The tensors of vectors.safetensors; BundleError when it is missing or damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            meta = json.loads((file.metadata() or {})["jpq"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
        if meta["format"] != VECTORS_FORMAT or not {"ids", "mask", OUTPUT} <= tensors.keys():
            raise ValueError(f"no recorded embeddings in the format {VECTORS_FORMAT}")
        return tensors
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise BundleError(f"{path}: not readable recorded vectors ({error}); export the bundle again") from error


def compare_recorded(recorded: dict[str, np.ndarray], runner: OrtRunner) -> tuple[float, str | None]:
    """(error of the embeddings, first point beyond what rounding explains or None) of recorded vectors."""
    assert isinstance(runner.spec, EncoderSpec)
    values = run(runner, recorded["ids"], recorded["mask"])
    error = relative_rms(recorded[OUTPUT], values[OUTPUT])
    for point in points(runner.spec):
        mine = values[OUTPUT] if point.name == OUTPUT else values.get(point.name)
        theirs = recorded.get(point.name if point.name == OUTPUT else f"point.{point.name}")
        if theirs is None:
            continue
        mine = mine if point.name == OUTPUT or mine is None else mine[:, 0]
        if mine is None or mine.shape != theirs.shape or not relative_rms(theirs, mine) <= point.bound:
            return error, point.name
    return error, None
