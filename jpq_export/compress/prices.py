"""The price list: the KL that each matrix costs at each width, and each removable unit when it goes.

A price is 0.5 * tr(E H Eᵀ) of the really rounded weight (GPTQ at 2, 3, 4 bits; a quarter per further bit), scaled by
measured KLs on held-out text: every sub-layer is once quantized to 2 bits, once removed and (MLP) once halved, with the
rest of the model intact. Widths below 2 bits are rounded and measured only when they are asked for, each by itself:
their errors are too large to be scaled from another width's. Additive by construction; `search` corrects the sum with
measured plans.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jpq_export.compress import parallel
from jpq_export.compress.apply import LayerChoice, all_kept, prune_layer
from jpq_export.compress.grid import Grid
from jpq_export.compress.heldout import PartialForward
from jpq_export.compress.model import AnyContext, AnyLayer, Model
from jpq_export.compress.rounding import Rounded, quantize_rows, row_loss
from jpq_export.compress.statistics import Progress, Statistics
from jpq_export.errors import PlanError
from jpq_export.format.encoder_spec import Spec, is_table, spec_from_json
from jpq_export.numerics.scheme import BIT_WIDTHS, Scheme, read_width, wide_group_size

FORMAT = "jpq-prices/1"
# Squared error of a normal weight of variance 1 at its best scale, by width: evenly spaced and normal levels.
EVEN_ERROR = {4: 1.154e-2, 5: 3.495e-3, 6: 1.040e-3, 8: 8.77e-5}
NORMAL_ERROR = {4: 9.506e-3, 5: 2.524e-3, 6: 6.64e-4}
ROUNDED_BITS = (2, 3, 4)
ROWS_TOGETHER = 8192  # of a table, rounded at once
NARROW = 2  # bits below which a width is priced on request only
FFN_STEPS = 12  # MLP widths offered: twelfths of the channels, rounded to whole groups


@dataclass(frozen=True, slots=True)
class StructurePrice:
    """Removing parts of a sub-layer: units, least important first, and the KL of removing the first n."""

    order: tuple[int, ...]
    removal: tuple[float, ...]  # [len(order) + 1]; removal[0] = 0, removal[-1] = the whole sub-layer
    step: int  # units removed together


@dataclass(frozen=True, slots=True)
class PriceList:
    """`matrices[name][bits]` and `structures["layers.i.attn" | "layers.i.mlp"]`, nats of KL per token.

    `normal`: widths whose codes stand for normal levels.
    """

    spec: Spec
    group_size: int
    matrices: dict[str, dict[float, float]]
    structures: dict[str, StructurePrice]
    normal: tuple[float, ...] = ()

    def scheme(self, columns: int, bits: float) -> Scheme:
        """The scheme of a matrix with `columns` inputs."""
        return scheme_of(columns, bits, self.group_size, normal=self.normal)

    def save(self, path: Path) -> None:
        """Write prices.json."""
        raw = {
            "format": FORMAT,
            "spec": json.loads(self.spec.to_json()),
            "group_size": self.group_size,
            "normal": self.normal,
            "matrices": self.matrices,
            "structures": {name: asdict(s) for name, s in self.structures.items()},
        }
        path.write_text(json.dumps(raw), encoding="utf-8")

    @staticmethod
    def load(path: Path) -> PriceList:
        """Read prices.json; PlanError when it is damaged."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] != FORMAT:
                raise ValueError(f"format {raw['format']!r}, expected {FORMAT!r}")
            structures = {
                name: StructurePrice(tuple(s["order"]), tuple(s["removal"]), s["step"])
                for name, s in raw["structures"].items()
            }
            matrices = {name: {read_width(b): p for b, p in prices.items()} for name, prices in raw["matrices"].items()}
            spec = spec_from_json(json.dumps(raw["spec"]))
            return PriceList(spec, raw["group_size"], matrices, structures, tuple(raw["normal"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PlanError(f"{path}: damaged price list ({error!r}); delete it and run again") from error


def scheme_of(columns: int, bits: float, group_size: int, *, normal: tuple[float, ...]) -> Scheme:
    """The scheme of a matrix with `columns` inputs."""
    return Scheme(bits, wide_group_size(columns, group_size), normal=bits in normal)


def expected_error(bits: float, *, normal: tuple[float, ...]) -> float:
    """Squared error of a normal weight of variance 1 at 4 bits and up."""
    return (NORMAL_ERROR if bits in normal else EVEN_ERROR)[int(bits)]


# Rounded rows at all widths: codes uint8 [widths, N, K]; scales, zeros [widths, N, K/g]; loss of each row [widths, N].
Stacked = tuple[Tensor, ...]


class RoundedCache:
    """Rounded weights of the teacher by (name, bits), so that a candidate model is assembled instead of computed."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, float], Rounded] = {}

    def weight(self, name: str, bits: float) -> Tensor:
        """Dequantized float32 [N, K]; widths above 4 were not rounded and read as the 4-bit one's caller decides."""
        return self.entries[name, bits].dequantize()


def narrow_widths(widths: tuple[float, ...]) -> tuple[float, ...]:
    """Those that are priced on request only, sorted."""
    return tuple(sorted(bits for bits in set(widths) if bits < NARROW))


def round_all(
    weights: dict[str, Tensor],
    spec: Spec,
    stats: Statistics,
    *,
    group_size: int,
    normal: tuple[float, ...] = (),
    narrow: tuple[float, ...] = (),
    progress: Progress | None = None,
) -> tuple[RoundedCache, dict[str, dict[float, float]]]:
    """Every matrix rounded at 2, 3, 4 bits and the `narrow` widths; raw Fisher prices of those and of BIT_WIDTHS."""
    cache, prices, widths = RoundedCache(), {}, (*narrow, *ROUNDED_BITS)
    names = list(spec.matrices())
    jobs = [(name, start) for name in names for start in range(0, len(weights[name]), ROWS_TOGETHER)]
    owners = parallel.spread([weights[name][start : start + ROWS_TOGETHER].numel() for name, start in jobs])
    mine = [job for job, owner in zip(jobs, owners, strict=True) if owner == parallel.rank()]
    found: dict[tuple[str, int], Stacked] = {}
    for done, (name, start) in enumerate(mine):
        rows, size = weights[name][start : start + ROWS_TOGETHER], wide_group_size(weights[name].shape[1], group_size)
        found[name, start] = _round_widths(rows, stats.hessians[name], size, widths, normal=normal)
        if progress:
            progress(done + 1, len(mine))
    for name in names:
        W, size = weights[name], wide_group_size(weights[name].shape[1], group_size)
        parts = [
            _exchanged(found.pop(job, None), owner, W[job[1] : job[1] + ROWS_TOGETHER], size, len(widths))
            for job, owner in zip(jobs, owners, strict=True)
            if job[0] == name
        ]
        codes, scales, zeros, losses = (torch.cat(kind, 1) for kind in zip(*parts, strict=True))
        row_weight = stats.rows if name in ("embed", "head") else torch.ones(len(W), device=W.device)
        prices[name] = {}
        for i, bits in enumerate(widths):
            cache.entries[name, bits] = Rounded(codes[i], scales[i], zeros[i])
            prices[name][bits] = float((losses[i] * row_weight).sum()) / 2
        for bits in BIT_WIDTHS:
            if bits not in prices[name]:
                beside = expected_error(bits, normal=normal) / expected_error(4, normal=normal)
                prices[name][bits] = prices[name][4] * beside
    return cache, prices


def _round_widths(
    W: Tensor, H: Tensor, group_size: int, widths: tuple[float, ...], *, normal: tuple[float, ...]
) -> Stacked:
    """Rows W [N, K] rounded at every width: one GPTQ over stacked copies of them."""
    stack = W.repeat(len(widths), 1)
    schemes = [(scheme_of(W.shape[1], bits, group_size, normal=normal), len(W)) for bits in widths]
    grid = Grid.of(schemes, W.device)
    rounded = quantize_rows(stack, H, grid, group_size, symmetric=True, method="gptq", candidates=11)
    kinds = (rounded.codes, rounded.scales, rounded.zeros, row_loss(stack, H, rounded))
    return tuple(kind.view(len(widths), len(W), *kind.shape[1:]) for kind in kinds)


def _exchanged(own: Stacked | None, owner: int, W: Tensor, group_size: int, widths: int) -> Stacked:
    """The result for rows W of the rank that has it (elsewhere None), on every rank."""
    n, k = W.shape
    sizes = ((n, k), (n, k // group_size), (n, k // group_size), (n,))
    types = (torch.uint8, torch.float32, torch.float32, torch.float32)
    if own is None:
        kinds = zip(sizes, types, strict=True)
        own = tuple(torch.empty((widths, *size), dtype=dtype, device=W.device) for size, dtype in kinds)
    return tuple(parallel.from_rank(owner, part) for part in own)


def measure_prices(
    teacher: Model,
    stats: Statistics,
    raw: dict[str, dict[float, float]],
    cache: RoundedCache,
    forward: PartialForward,
    *,
    group_size: int,
    normal: tuple[float, ...] = (),
    progress: Progress | None = None,
) -> PriceList:
    """Scale the Fisher prices by measured KLs, sub-layer by sub-layer."""
    spec = teacher.spec
    matrices = {name: dict(prices) for name, prices in raw.items()}
    structures: dict[str, StructurePrice] = {}
    jobs = list(_sublayers(spec))
    mine = jobs[parallel.rank() :: parallel.world()]
    found: dict[tuple[int, str], tuple[dict[float, float], StructurePrice]] = {}
    for done, (i, sub) in enumerate(mine):
        names = _names(spec, i, sub)
        kls = {
            bits: forward.kl(i, _with_weights(teacher, i, names, cache, bits))
            for bits in _measured_widths(raw[names[0]])
        }
        found[i, sub] = kls, _structure(teacher, stats, forward, i, sub, group_size)
        if progress:
            progress(done + 1, len(mine))
    found = {job: value for part in parallel.gathered(found) for job, value in part.items()}
    for i, sub in jobs:
        names = _names(spec, i, sub)
        kls, structures[f"layers.{i}.{sub}"] = found[i, sub]
        for measured_bits, priced in _measured_widths(raw[names[0]]).items():
            factor = kls[measured_bits] / max(sum(raw[n][measured_bits] for n in names), 1e-12)
            for name in names:
                for bits in priced:
                    matrices[name][bits] = raw[name][bits] * factor
    _measure_tables(teacher, raw, cache, forward, matrices)
    return PriceList(spec, group_size, matrices, structures, normal)


def _names(spec: Spec, i: int, sub: str) -> list[str]:
    """Canonical names of a sub-layer's matrices."""
    return [f"layers.{i}.{n}" for n in spec.linear_shapes(i) if n.startswith(sub)]


def _measured_widths(priced: Iterable[float]) -> dict[float, tuple[float, ...]]:
    """Width that is measured -> widths whose prices it scales."""
    scales: dict[float, tuple[float, ...]] = {bits: (bits,) for bits in narrow_widths(tuple(priced))}
    return scales | {2: BIT_WIDTHS}


def _sublayers(spec: Spec) -> Iterator[tuple[int, str]]:
    for i, layer in enumerate(spec.layers):
        if layer.kv_heads:
            yield i, "attn"
        if layer.ffn:
            yield i, "mlp"


def _measure_tables(
    teacher: Model, raw: dict, cache: RoundedCache, forward: PartialForward, matrices: dict[str, dict[float, float]]
) -> None:
    """Embedding and head: every rounded width is measured, being few and a fifth of a small model's bytes."""
    tables = [name for name in raw if is_table(name)]
    jobs = [(name, bits) for name in tables for bits in (*narrow_widths(tuple(raw[name])), *ROUNDED_BITS)]
    found: dict[tuple[str, float], float] = {}
    for name, bits in jobs[parallel.rank() :: parallel.world()]:
        module = getattr(teacher, name)
        original = module.weight.data
        module.weight.data = cache.weight(name, bits)
        found[name, bits] = forward.heldout.kl_of(teacher)
        module.weight.data = original
    for (name, bits), kl in ((job, kl) for part in parallel.gathered(found) for job, kl in part.items()):
        matrices[name][bits] = kl
    for name in tables:
        for bits in BIT_WIDTHS:
            if bits not in ROUNDED_BITS:
                matrices[name][bits] = matrices[name][4] * raw[name][bits] / raw[name][4]


def _with_weights(teacher: Model, i: int, names: list[str], cache: RoundedCache, bits: float) -> AnyLayer:
    """Layer i with the named matrices rounded to `bits`."""
    layer = prune_layer(teacher, i, all_kept(teacher.spec)[i])
    for name in names:
        sub, part = name.split(".")[2:]
        getattr(getattr(layer, sub), part).weight.data = cache.weight(name, bits)
    return layer


def _structure(
    teacher: Model, stats: Statistics, forward: PartialForward, i: int, sub: str, group_size: int
) -> StructurePrice:
    """Removal prices of one sub-layer: gates give the order and shape, two measured points the size."""
    gates = stats.gates[f"layers.{i}.{sub}"][1:].cpu()
    order = torch.argsort(gates, stable=True)
    cumulative = torch.cat([torch.zeros(1), gates[order].cumsum(0)])
    units = len(order)
    whole = forward.kl(i, _without(teacher, i, sub, order.tolist()))
    if sub == "attn":
        step, half = 1, max(1, units // 2)
    else:
        step, half = ffn_step(units, group_size), units // 2
    if units == 1:
        return StructurePrice((0,), (0.0, whole), 1)
    measured = forward.kl(i, _without(teacher, i, sub, order[:half].tolist()))
    # Below the measured half: the gates' shape; above it: a power law through both measured points.
    scale = measured / max(float(cumulative[half]), 1e-12)
    power = max(1.0, float(np.log(max(whole, 1e-9) / max(measured, 1e-9)) / np.log(units / half)))
    removal = [float(cumulative[n]) * scale if n <= half else measured * (n / half) ** power for n in range(units + 1)]
    removal[-1] = whole  # measured, so nothing on the way may cost more
    return StructurePrice(
        tuple(order.tolist()), tuple(np.maximum.accumulate(np.minimum(removal, whole)).tolist()), step
    )


def ffn_step(channels: int, group_size: int) -> int:
    """Channels removed together: whole groups of the down projection, about a twelfth of the width."""
    unit = wide_group_size(channels, min(group_size, max(32, channels // FFN_STEPS)))  # narrower ones in a narrow MLP
    return max(unit, round(channels / FFN_STEPS / unit) * unit)


def _without(teacher: Model, i: int, sub: str, units: list[int]) -> Callable[[Tensor, AnyContext], Tensor]:
    whole, gone = all_kept(teacher.spec)[i], set(units)
    if sub == "attn":
        choice = LayerChoice(tuple(h for h in whole.kv_heads if h not in gone), whole.channels)
    else:
        choice = LayerChoice(whole.kv_heads, tuple(c for c in whole.channels if c not in gone))
    return prune_layer(teacher, i, choice)
