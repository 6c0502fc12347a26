"""Statistics, rounded weights and prices of a model, from the cache or made now."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jpq_export.compress import parallel
from jpq_export.compress.decoder import named_weights
from jpq_export.compress.heldout import PartialForward
from jpq_export.compress.model import Model
from jpq_export.compress.prepared import Prepared, load_prepared, save_prepared
from jpq_export.compress.prices import ROUNDED_BITS, measure_prices, round_all
from jpq_export.compress.statistics import Statistics
from jpq_export.compress.teaching import teaching_of
from jpq_export.format.encoder_spec import Spec, is_table
from jpq_export.format.spec import ModelSpec
from jpq_export.format.target import Target
from jpq_export.progress import Stages

# Of a matrix, where its rows allow. Scales of groups of 64 take a quarter of a bit a weight, which buys more as bits,
# most so where a rotation has left no channel that stands out. `docs/ablation` has what each does to errors and KL.
ROTATED_GROUP_SIZE, GROUP_SIZE = 512, 128
ENGINE_GROUP_SIZE = 64  # TensorRT-RTX was only ever seen to take blocks of 64 of SmolLM2's rows


def group_size_for(target: Target, spec: Spec, asked: int | None = None) -> int:
    """The group size that plans of a model for `target` start from; `asked` is the user's."""
    if asked is not None:
        return asked
    if target.engine:
        return ENGINE_GROUP_SIZE
    return ROTATED_GROUP_SIZE if isinstance(spec, ModelSpec) and spec.rotated else GROUP_SIZE


def prepare(
    teacher: Model,
    calibration: np.ndarray,
    heldout: np.ndarray,
    folder: Path,
    *,
    seed: int,
    stages: Stages,
    group_size: int,
    normal: tuple[float, ...],
    narrow: tuple[float, ...] = (),
) -> Prepared:
    """The prepared state for these inputs; `folder` names them (see prepared_folder).

    `narrow`: widths below 2 bits that are rounded too.
    """
    device = str(teacher.embed.weight.device)
    found = load_prepared(folder, device=device)
    if all(parallel.gathered(found is not None)) and found is not None:
        stages.resumed("prices", "statistics and price list")
        return found
    with stages.stage("statistics", "collecting Fisher statistics") as report:
        collect = teaching_of(teacher).collect
        stats = collect(teacher, calibration, seed=seed, progress=report)
    told = ", ".join(f"{bits:g}" for bits in (*narrow, *ROUNDED_BITS))
    with stages.stage("round", f"rounding every matrix at {told} bits") as report:
        weights, kind = named_weights(teacher), {"group_size": group_size, "normal": normal, "narrow": narrow}
        cache, raw = round_all(weights, teacher.spec, stats, **kind, progress=report)
        drop_layer_hessians(stats)
    with stages.stage("prices", "measuring what each sub-layer costs") as report:
        teaching = teaching_of(teacher)
        forward = PartialForward(teacher, teaching.heldout(teacher, teaching.priced(heldout)))
        kind = {"group_size": group_size, "normal": normal}
        prices = measure_prices(teacher, stats, raw, cache, forward, **kind, progress=report)
    prepared = Prepared(prices, cache, stats)
    parallel.once(save_prepared, folder, prepared)
    return prepared


def drop_layer_hessians(stats: Statistics) -> None:
    """Half a gigabyte at 135M parameters that nothing reads again: compression makes its own from the prefix."""
    stats.hessians = {name: H for name, H in stats.hessians.items() if is_table(name)}
