"""The plan: what is kept of every layer and in how many bits, why, and the size-quality front it was chosen from."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jpq_export.errors import BudgetError, PlanError
from jpq_export.format.encoder_spec import Spec
from jpq_export.numerics.levels import NORMAL_WIDTHS
from jpq_export.numerics.row_blocks import RowLayout
from jpq_export.numerics.scheme import TERNARY, Scheme

FORMAT = "jpq-plan/1"
METHODS = ("jpq", "gptq", "rtn", "toga", "srcr", "qpruner", "llm-pruner")


@dataclass(frozen=True, slots=True)
class Budget:
    """What was asked for; `kind` "size" (bytes), "bits" (a weight), "ratio" (of fp16), "latency" (ms)."""

    kind: str
    value: float
    bytes: int | None
    latency_ms: float | None = None

    def too_small(self, least: float, why: str, remedy: str = "ask for at least that") -> BudgetError:
        """The error of a budget below `least` (bytes, or ms), told in the unit that was asked in, rounded up."""
        latency = self.bytes is None
        of, size, unit = (self.latency_ms, 1.0, "ms") if latency else (self.bytes, 1e6, "MB")
        assert of is not None

        shown = {"bits": "bits per weight", "ratio": "of fp16"}.get(self.kind) if of else None
        asked, needed = f"{of / size:g} {unit}", f"{math.ceil(least / size * 1e3) / 1e3:.3f} {unit}"
        if shown:
            asked = f"{self.value:g} {shown} ({asked})"
            needed = f"{math.ceil(least / of * self.value * 1e3) / 1e3:.3f} {shown} ({needed})"
        return BudgetError(f"budget of {asked} cannot be met: {why} {needed}; {remedy}")


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Structure of one layer: which key/value heads stay, and which MLP channels (None = all `ffn_of` of them)."""

    index: int
    kv_heads: tuple[int, ...]
    kv_heads_of: int
    ffn: int
    ffn_of: int
    channels: tuple[int, ...] | None = None

    @property
    def kept_channels(self) -> tuple[int, ...]:
        """Channel numbers that stay, in the order they are stored in."""
        return tuple(range(self.ffn)) if self.channels is None else self.channels


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Consecutive stored rows of one width."""

    bits: float
    rows: int


@dataclass(frozen=True, slots=True)
class Choice:
    """One matrix [rows, columns] after pruning: scheme, stored bytes, predicted KL (nats a token), and why.

    With `blocks`, its rows have widths of their own and `bits` is their mean; `order` is then the row at each stored
    place, None when they are stored in order.
    """

    name: str
    bits: float
    group_size: int
    symmetric: bool
    rows: int
    columns: int
    bytes: int
    predicted_kl: float
    reason: str = ""
    integer_zero: bool = False
    blocks: tuple[RowBlock, ...] = ()
    order: tuple[int, ...] | None = None
    normal: bool = False

    @property
    def layout(self) -> RowLayout | None:
        """Its rows' widths; None when all have the same."""
        rows = [block.rows for block in self.blocks]
        return RowLayout(tuple(zip(self.schemes, rows, strict=True)), self.order) if rows else None

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Of every block of rows."""
        widths = [block.bits for block in self.blocks] or [self.bits]
        return tuple(self._of(bits) for bits in widths)

    @property
    def scheme(self) -> Scheme:
        """As a Scheme."""
        return self._of(self.bits)

    def _of(self, bits: float) -> Scheme:
        normal = self.normal and bits in NORMAL_WIDTHS  # other widths have none
        return Scheme(bits, self.group_size, self.symmetric, self.integer_zero, normal)


@dataclass(frozen=True, slots=True)
class Removal:
    """A unit that was removed: a sub-layer, heads of it or channels of it."""

    name: str
    predicted_kl: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Predicted:
    """What the price list says of the plan; `gap`: the fraction by which a better one may still exist."""

    kl: float
    bytes: int
    latency_ms: float
    gap: float


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """One plan of the size-quality front."""

    bytes: int
    bits_per_weight: float
    latency_ms: float
    predicted_kl: float


@dataclass(frozen=True, slots=True)
class Plan:
    """plan.json; `adapter_rank`: of the low-rank branch beside every linear, 0 without."""

    model_name: str
    model_sha256: str
    target: str
    method: str
    budget: Budget
    layers: tuple[LayerPlan, ...]
    choices: tuple[Choice, ...]
    removed: tuple[Removal, ...]
    predicted: Predicted
    front: tuple[FrontPoint, ...]
    search: dict[str, Any]
    adapter_rank: int = 0

    def to_json(self) -> str:
        """Readable, stable JSON."""
        raw = asdict(self)
        if not self.adapter_rank:
            del raw["adapter_rank"]
        model = {"name": raw.pop("model_name"), "sha256": raw.pop("model_sha256")}
        return json.dumps({"format": FORMAT, "model": model, **raw}, indent=1) + "\n"

    def spec(self, teacher: Spec) -> Spec:
        """The teacher's spec with this plan's widths; PlanError when the plan belongs to another model."""
        if len(self.layers) != len(teacher.layers):
            raise PlanError(
                f"plan: made for {len(self.layers)} layers, {teacher.name} has {len(teacher.layers)}; "
                "use the plan of this model"
            )
        fresh = []
        for old, new in zip(teacher.layers, self.layers, strict=True):
            if (new.kv_heads_of, new.ffn_of) != (old.kv_heads, old.ffn):
                raise PlanError(
                    f"plan: layers.{new.index} has {new.kv_heads_of} key/value heads and {new.ffn_of} channels, "
                    f"the model has {old.kv_heads} and {old.ffn}; use the plan of this model"
                )
            fresh.append(type(old)(len(new.kv_heads), new.ffn, old.window, old.rope))
        return teacher.with_layers(tuple(fresh))

    def check(self, teacher: Spec) -> None:
        """PlanError when choices and structure do not fit together or not this model."""
        matrices = self.spec(teacher).matrices()
        chosen = {c.name: c for c in self.choices}
        if missing := sorted(matrices.keys() - chosen.keys()):
            raise PlanError(f"plan: no choice for {missing[0]} ({len(missing)} missing); make the plan again")
        if extra := sorted(chosen.keys() - matrices.keys()):
            raise PlanError(f"plan: {extra[0]} is not a matrix of this model; make the plan again")
        for name, shape in matrices.items():
            choice = chosen[name]
            if (choice.rows, choice.columns) != shape:
                got = (choice.rows, choice.columns)
                raise PlanError(f"plan: {name} has shape {got}, the model needs {shape}; make the plan again")
            if shape[1] % choice.group_size:
                raise PlanError(
                    f"plan: {name} has in_features {shape[1]}, not a multiple of group_size {choice.group_size}; "
                    "choose a divisor"
                )
        for layer in self.layers:
            kept, of = layer.kept_channels, layer.ffn_of
            if not len(kept) == len(set(kept)) == layer.ffn or any(not 0 <= c < of for c in kept):
                raise PlanError(f"plan: layers.{layer.index} channels are not {layer.ffn} different numbers below {of}")
            heads = layer.kv_heads
            if list(heads) != sorted(set(heads)) or any(not 0 <= h < layer.kv_heads_of for h in heads):
                raise PlanError(
                    f"plan: layers.{layer.index} kv_heads {list(heads)} are not rising below {layer.kv_heads_of}"
                )


def load_plan(path: Path) -> Plan:
    """Read plan.json; PlanError says what is wrong and where."""
    path = path / "plan.json" if path.is_dir() else path
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: cannot be read ({error.strerror}); give the path of a plan.json") from error
    except ValueError as error:
        raise PlanError(f"{path}: not JSON ({error}); make the plan again with `jpq-export plan`") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        got = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise PlanError(f"{path}: format is {got!r}, expected {FORMAT!r}; make the plan again with `jpq-export plan`")
    if raw.get("method") not in METHODS:
        raise PlanError(f"{path}: method is {raw.get('method')!r}, expected one of {', '.join(METHODS)}")
    try:
        return Plan(
            model_name=raw["model"]["name"],
            model_sha256=raw["model"]["sha256"],
            target=raw["target"],
            method=raw["method"],
            budget=Budget(**raw["budget"]),
            layers=tuple(_layer(layer, i) for i, layer in enumerate(raw["layers"])),
            choices=tuple(_choice(choice) for choice in raw["choices"]),
            removed=tuple(Removal(**removal) for removal in raw["removed"]),
            predicted=Predicted(**raw["predicted"]),
            front=tuple(FrontPoint(**point) for point in raw["front"]),
            search=dict(raw["search"]),
            adapter_rank=_rank(raw.get("adapter_rank", 0)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{path}: damaged plan ({error!r}); make it again with `jpq-export plan`") from error


def _rank(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"adapter_rank {value!r}: expected a whole number from 0")
    return value


def _layer(raw: dict[str, Any], position: int) -> LayerPlan:
    channels = raw.get("channels")
    numbers = [raw["index"], *raw["kv_heads"], raw["kv_heads_of"], raw["ffn"], raw["ffn_of"], *(channels or ())]
    if not all(type(number) is int for number in numbers):
        raise ValueError(f"layers[{position}]: expected whole numbers")
    if raw["index"] != position:
        raise ValueError(f"layers[{position}] has index {raw['index']}")
    if channels is None and raw["ffn"] not in (0, raw["ffn_of"]):
        raise ValueError(f"layers[{position}] keeps {raw['ffn']} of {raw['ffn_of']} channels without saying which")
    kept = None if channels is None else tuple(channels)
    return LayerPlan(raw["index"], tuple(raw["kv_heads"]), raw["kv_heads_of"], raw["ffn"], raw["ffn_of"], kept)


def _choice(raw: dict[str, Any]) -> Choice:
    raw = dict(raw)
    raw["blocks"] = tuple(RowBlock(**block) for block in raw.get("blocks", ()))
    raw["order"] = None if raw.get("order") is None else tuple(raw["order"])
    choice = Choice(**raw)
    widths = [b.bits for b in choice.blocks] or [choice.bits]
    numbers = [choice.group_size, choice.rows, choice.columns, *(bits for bits in widths if bits != TERNARY)]
    numbers += [*(b.rows for b in choice.blocks), *(choice.order or ())]
    if not all(type(number) is int for number in numbers):
        raise ValueError(f"{choice.name}: expected whole numbers, and {TERNARY} bits where ternary")
    layout = choice.layout
    if layout is None:
        if choice.scheme.weight_bytes(choice.rows, choice.columns) != choice.bytes:  # also validates the scheme
            raise ValueError(f"{choice.name}: bytes {choice.bytes} do not match its scheme")
        return choice
    if sum(b.rows for b in choice.blocks) != choice.rows or min(b.rows for b in choice.blocks) < 1:
        raise ValueError(f"{choice.name}: its blocks do not have {choice.rows} rows")
    if choice.order is not None and sorted(choice.order) != list(range(choice.rows)):
        raise ValueError(f"{choice.name}: order is not each of {choice.rows} rows once")
    if layout.weight_bytes(choice.columns) != choice.bytes:
        raise ValueError(f"{choice.name}: bytes {choice.bytes} do not match its blocks")
    return choice
