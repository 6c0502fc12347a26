"""From "the logits differ" to the node: the first value that is wrong, in order of execution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jpq_export.format.compressed import CompressedModel
from jpq_export.format.encoder_spec import EncoderSpec, is_table
from jpq_export.format.spec import rotation_sizes
from jpq_export.numerics.reference import int8_codes
from jpq_export.parity import tolerance
from jpq_export.parity.compare import relative_rms
from jpq_export.parity.points import Point, linear_input, node_of, points
from jpq_export.parity.result import Divergence, LayerResult
from jpq_export.parity.runners import OrtRunner

ROWS_AT_ONCE = 8192  # of a weight in float64: 50 MB for 768 columns


def layer_errors(point_list: Sequence[Point], errors: Mapping[str, float], *, judged: bool) -> tuple[LayerResult, ...]:
    """Errors of the taps, with their bounds when rounding is the judge."""
    return tuple(
        LayerResult(p.name, errors[p.name], p.bound if judged else None, not judged or errors[p.name] <= p.bound)
        for p in point_list
        if p.is_tap and p.name in errors
    )


def value_errors(reference: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Relative RMS error of every point both sides have."""
    return {name: relative_rms(reference[name], value) for name, value in values.items() if name in reference}


def find_divergence(
    model: CompressedModel, runner: OrtRunner, reference: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray]
) -> Divergence | None:
    """The first wrong value among the points of one pass, or None.

    First every linear is recomputed from the input the runtime itself gave it: that error owes nothing to earlier
    layers, so even one wrong code in an early weight is found where it is. If all linears are right, it is the first
    point beyond its bound against the reference (rotary, norms, cache, masks).
    """
    for point in points(model.spec):
        local, weight = _local_error(model, point.name, values), _head(model, point.name) or point.name
        if local is not None and local > _local_bound(model, weight):
            return _divergence(runner, point, local, _local_bound(model, weight))
        if local is None and point.name in values:
            error = relative_rms(reference[point.name], values[point.name])
            if error > point.bound:
                return _divergence(runner, point, error, point.bound)
    return None


def _divergence(runner: OrtRunner, point: Point, error: float, bound: float) -> Divergence:
    node = node_of(runner.proto.graph, point.name)
    return Divergence(point.sublayer, point.blame, node, error, bound)


def _local_error(model: CompressedModel, name: str, values: Mapping[str, np.ndarray]) -> float | None:
    """Largest error of a linear against its weight times the runtime's own input; None when `name` is no linear.

    In units of the size of the sum and of its terms in quadrature: rounding grows with both, and a sum whose terms
    cancel is small without being wrong.
    """
    if (head := _head(model, name)) is not None:
        if "norm" not in values:
            return None
        turned = not isinstance(model.spec, EncoderSpec) and model.spec.rotated
        x = _turned(values["norm"], model) if turned else values["norm"]
        return _product_error(x, model.weight(head), None, values[name])
    source = linear_input(name, model.spec) if name in model.quantized and not is_table(name) else None
    if source is None or source not in values or name not in values:
        return None
    turned = not isinstance(model.spec, EncoderSpec) and model.spec.turned_reads and source.endswith("_norm")
    x = _as_read(_turned(values[source], model) if turned else values[source], model)
    bias = model.vectors.get(f"{name}.bias")
    return _product_error(x, model.weight(name), bias, values[name])


def _head(model: CompressedModel, name: str) -> str | None:
    """The matrix behind the logits, where they are judged as a product: the wide bound of flips would hide its codes.

    Elsewhere the bound on logits is narrow enough, and this would take seconds for a large vocabulary.
    """
    if name != "logits" or not tolerance.flips(model.spec):
        return None
    return "head" if "head" in model.quantized else "embed"


def _product_error(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, got: np.ndarray) -> float:
    """Largest error of got [..., N] against x [..., K] times weight [N, K]; a part of the rows at a time."""
    x, worst = x.astype(np.float64), 0.0
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        part = weight[rows].astype(np.float64)
        expected = x @ part.T + (0 if bias is None else bias[rows])
        scale = np.sqrt(expected**2 + np.square(x) @ np.square(part).T)
        error = np.abs(got[..., rows] - expected) / np.maximum(scale, np.finfo(np.float32).tiny)
        worst = max(worst, float(np.nan_to_num(error, nan=np.inf).max()))
    return worst


def _turned(x: np.ndarray, model: CompressedModel) -> np.ndarray:
    """What is read behind a norm where reads are turned: x (A ⊗ B) of x [..., hidden], float64."""
    a, b = rotation_sizes(model.spec.hidden)
    outer, inner = (model.vectors[f"rotation.{part}"].astype(np.float64) for part in ("outer", "inner"))
    rows = x.astype(np.float64).reshape(*x.shape[:-1], a, b)
    return (outer.reshape(a, a).T @ (rows @ inner.reshape(b, b))).reshape(x.shape)


def _as_read(x: np.ndarray, model: CompressedModel) -> np.ndarray:
    """What a linear multiplies: its input x [..., K] float32, rounded where the model rounds it."""
    if not tolerance.flips(model.spec):
        return x
    codes, step = int8_codes(x)
    return codes * step


def _local_bound(model: CompressedModel, name: str) -> float:
    """PEAK over what one dot product explains."""
    return tolerance.PEAK * tolerance.CHAIN * tolerance.dot(model.quantized[name].shape[1])
