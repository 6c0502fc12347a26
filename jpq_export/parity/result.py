"""What a parity check found, and parity.json. No timings: the same inputs on the same machine give the same bytes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from jpq_export.parity.compare import LogitsError

FORMAT = "jpq-parity/1"
DIGITS = 4


@dataclass(frozen=True, slots=True)
class LayerResult:
    """Relative RMS error of one tap; `bound` is None where no arithmetic bound holds (8-bit activations)."""

    name: str
    rel_rms: float
    bound: float | None
    passed: bool


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One input shape: "prefill", "decode", "padded batch", "sliding window"; `positions` logits rows compared."""

    name: str
    positions: int
    logits: LogitsError
    passed: bool


@dataclass(frozen=True, slots=True)
class GreedyResult:
    """Free-running greedy decoding of both sides; `equal` tokens before the first difference.

    At a difference, `margin` is the reference's distance between its two best logits and `rounding` the distance that
    rounding explains; `tie` when the margin is within it.
    """

    steps: int
    equal: int
    margin: float | None = None
    rounding: float | None = None

    @property
    def tie(self) -> bool:
        """Whether the first difference is one that no fp32 runtime can avoid."""
        return self.margin is not None and self.rounding is not None and self.margin <= self.rounding


@dataclass(frozen=True, slots=True)
class CacheResult:
    """What was written into an int8 cache (see `parity.int8_cache`).

    `codes`: how many; `flipped`: other than the reference's own, of which rounding explains `most_flipped`;
    `scale_error`: largest relative error of a scale; `worst`: largest share of its bound that a code or scale used;
    `place`: the first cache tensor beyond its bound ("3.key"), "all" when only the flips are too many.
    """

    codes: int
    flipped: int
    most_flipped: float
    scale_error: float
    worst: float
    place: str | None
    passed: bool


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first wrong value: its sub-layer (tap), the point or weight to look at, the ONNX node, the error there."""

    sublayer: str
    place: str
    node: str
    rel_rms: float
    bound: float

    def __str__(self) -> str:
        """One line for a terminal."""
        return f"{self.place} (sub-layer {self.sublayer}, node {self.node}): error {self.rel_rms:.1e}"


@dataclass(frozen=True, slots=True)
class RuntimeResult:
    """One runtime against the reference. `judged_by`: "rounding" (elementwise), "half" (fp16) or "effect" (gross)."""

    name: str
    version: str
    path: str
    judged_by: str
    logits: LogitsError
    greedy: GreedyResult
    cases: tuple[CaseResult, ...]
    layers: tuple[LayerResult, ...]
    first_diverging: Divergence | None
    passed: bool
    cache: CacheResult | None = None

    def to_raw(self) -> dict[str, Any]:
        """As in parity.json."""
        raw = {**asdict(self), "greedy_tokens_equal": self.greedy.equal == self.greedy.steps}
        raw |= {"greedy_tokens": self.greedy.equal, "greedy": {**asdict(self.greedy), "tie": self.greedy.tie}}
        raw["first_diverging"] = self.first_diverging.place if self.first_diverging else None
        raw["divergence"] = asdict(self.first_diverging) if self.first_diverging else None
        return raw


@dataclass(frozen=True, slots=True)
class ParityReport:
    """All runtimes of one bundle against the compressed PyTorch model.

    `as_run`: onnxruntime with its default settings, when those round activations to 8 bits: a price, not a proof.
    """

    reference: str
    runtimes: tuple[RuntimeResult, ...]
    as_run: RuntimeResult | None = None

    @property
    def passed(self) -> bool:
        """Whether every runtime computes the model."""
        return all(runtime.passed for runtime in self.runtimes) and (self.as_run is None or self.as_run.passed)

    @property
    def first_diverging(self) -> Divergence | None:
        """The first wrong value of the first runtime that has one."""
        return next((r.first_diverging for r in self.runtimes if r.first_diverging), None)

    def to_json(self) -> str:
        """The text of parity.json; a number that is not finite is null."""
        raw: dict[str, Any] = {"format": FORMAT, "passed": self.passed, "reference": self.reference}
        raw["runtimes"] = [runtime.to_raw() for runtime in self.runtimes]
        raw["as_run"] = self.as_run.to_raw() if self.as_run else None
        return json.dumps(rounded(raw), indent=1) + "\n"


def rounded(value: Any) -> Any:
    """Numbers to a few digits (the rest says nothing), and none that JSON lacks."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
