"""What a runtime wrote into an int8 key/value cache, against the keys and values of the reference.

Two right runtimes differ in the last bits of a key, so where it lies near the middle between two codes they round to
different ones. One such flip is half a percent of a key, ten thousand times what rounding explains, and the layers
after it flip more: over 144 tokens of SmolLM2 a free run of both sides ended with 16% of all codes different and logits
1.7e-2 apart. That proves nothing, and the comparison is cut in two instead, each half with the bounds of fp32
arithmetic (see `tolerance`); then 0.003% of the codes differ, and logits by 4e-6:

    the reference reads the codes and scales the runtime wrote: then logits agree as closely as with a float cache;
    each of those codes must be a rounding of the key or value the reference computed from the same past.

With e = PEAK inside(depth) hypot(RMS of the position over all heads, max |x| of its head), the largest error rounding
explains in one key or value x of scale s:

    |scale - s| <= e / 127       |code * scale - x| <= s / 2 + 2 e       (x itself and its scale may each be off by e)

and in all no more codes may differ than such errors, of their RMS size, carry over a middle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from jpq_export.format.spec import ModelSpec
from jpq_export.parity import tolerance
from jpq_export.parity.points import node_of
from jpq_export.parity.result import CacheResult, Divergence

if TYPE_CHECKING:
    from onnx import GraphProto

LARGEST = 127
HALF_STEP = 0.5
WHOLE_STEP = 1.0  # against recorded codes, which were rounded themselves
Arrays = Mapping[str, np.ndarray]


class CacheTally:
    """Adds up what was written in many passes. `slack`: distance in steps that rounding to codes allows by itself."""

    def __init__(self, spec: ModelSpec, *, slack: float = HALF_STEP) -> None:
        self._inside, self._slack = _bounds(spec), slack
        self._codes = self._flipped = 0
        self._expected = self._scale_error = 0.0
        self._worst: dict[str, float] = {}

    def add(self, exact: Arrays, written: Arrays) -> None:
        """`exact`: {"0.key": float [batch, kv_heads, new, head_dim], ...}; `written`: codes and "0.key_scale", ..."""
        for name, x in exact.items():
            self._add(name, x.astype(np.float64), written[name], written[f"{name}_scale"].astype(np.float64))

    def _add(self, name: str, x: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> None:
        peak = np.abs(x).max(-1, keepdims=True, initial=0)
        step, share = peak / LARGEST, self._inside[name.split(".")[0]]
        typical = share * np.hypot(np.sqrt(np.mean(x**2, (1, 3), keepdims=True)), peak)
        most = np.maximum(tolerance.PEAK * typical, np.finfo(np.float64).tiny)
        distance = np.abs(codes * scale - x) - self._slack * step
        shares = [np.abs(scale - step) * LARGEST / most, distance / (2 * most)]
        worst = max(float(np.nan_to_num(part, nan=np.inf).max(initial=0)) for part in shares)
        self._worst[name] = max(worst, self._worst.get(name, 0.0))
        divisor = np.where(step > 0, step, 1)
        self._scale_error = max(self._scale_error, float((np.abs(scale - step) / divisor).max(initial=0)))
        self._codes += codes.size
        self._flipped += int((np.rint(x / divisor) != codes).sum())
        self._expected += float(np.minimum(1, 2 * typical / divisor).sum()) * x.shape[-1]

    def result(self) -> CacheResult:
        """Over all that was added."""
        most = self._expected + 3 * self._expected**0.5 + 1
        place = next((name for name, worst in sorted(self._worst.items(), key=_order) if worst > 1), None)
        if place is None and self._flipped > most:
            place = "all"
        worst = max(self._worst.values(), default=0.0)
        return CacheResult(self._codes, self._flipped, most, self._scale_error, worst, place, place is None)


def wrong_write(result: CacheResult, graph: GraphProto) -> Divergence | None:
    """The first tensor of an int8 cache that holds no rounding of the reference's keys or values."""
    if result.place is None:
        return None
    if result.place == "all":
        return Divergence("int8 cache", "too many codes of the int8 cache", "any", result.flipped, result.most_flipped)
    layer, part = result.place.split(".")
    node = node_of(graph, f"present.{result.place}")
    return Divergence(f"layers.{layer}.attn", f"layers.{layer}.attn int8 cache ({part})", node, result.worst, 1.0)


def _order(item: tuple[str, float]) -> tuple[int, str]:
    """Layers as they are computed."""
    layer, part = item[0].split(".")
    return int(layer), part


def _bounds(spec: ModelSpec) -> dict[str, float]:
    """Relative RMS two right runtimes may differ by in a layer's keys and values, by layer."""
    bounds, depth = {}, 0
    for i, layer in enumerate(spec.layers):
        bounds[str(i)] = tolerance.inside(spec, depth)
        depth += (layer.kv_heads > 0) + (layer.ffn > 0)
    return bounds


def read_back(written: Arrays) -> dict[str, np.ndarray]:
    """Codes times scales: {"0.key": float32 [batch, kv_heads, new, head_dim], "0.value": ..., ...}."""
    names = [name for name in written if not name.endswith("_scale")]
    return {name: written[name].astype(np.float32) * written[f"{name}_scale"] for name in names}
