"""What a study recommends at one stored size: of the dense and structural cells that fit, the one that keeps most.

Scattered and semi-structured zeros stay in a file as codes: at equal stored bytes they only lose against the dense cell
of their width, so they are not asked. Embedding and head, which the paper's rate leaves out, are stored at 4 bits here:
at 8 they alone would be two thirds of SmolLM2-135M's file at 2.5 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from jpq_export.compress.apply import LayerChoice
from jpq_export.compress.decoder import Decoder
from jpq_export.compress.statistics import collect, plain_statistics
from jpq_export.compress.student import dequantized
from jpq_export.compress.tune import heldout_kl
from jpq_export.errors import BudgetError
from jpq_export.format.compressed import CompressedModel
from jpq_export.format.spec import ModelSpec
from jpq_export.methods.srcr.compress import compress_cell, schemes_for, structure_of, with_structure
from jpq_export.methods.srcr.points import Cell
from jpq_export.progress import Stages

WIDTHS = (2, 3, 4)
TABLE_BITS = 4
MOST = 0.75  # of the layers' weights: the paper's sparsest
STEPS = 12  # of the bisection: sparsity to within 0.02%


@dataclass(frozen=True, slots=True)
class Fitting:
    """A cell with its structure, whose file is within the budget."""

    cell: Cell
    layers: tuple[LayerChoice, ...]
    stored_bytes: int


def stored_bytes(spec: ModelSpec, layers: tuple[LayerChoice, ...], bits: int) -> int:
    """Of the whole file: codes, scales, zero points, tables, vectors."""
    kept = with_structure(spec, layers)
    schemes, shapes = schemes_for(kept, bits, TABLE_BITS), kept.matrices()
    return sum(s.weight_bytes(*shapes[name]) for name, s in schemes.items()) + 4 * sum(kept.vectors().values())


def cells_at(spec: ModelSpec, gates: Mapping[str, Tensor], budget: int) -> list[Fitting]:
    """For every width the least sparsity that fits `budget` bytes; BudgetError where none does."""
    found = [cell for bits in WIDTHS if (cell := _sparsest_needed(spec, gates, bits, budget)) is not None]
    if not found:
        raise BudgetError(
            f"srcr: {budget} bytes: without {MOST:.0%} of the layers' weights, {WIDTHS[0]} bits are still not enough; "
            "ask for more"
        )
    dense = [each for each in found if each.cell.sparsity == 0]
    return [each for each in found if each not in dense[:-1]]  # of dense cells only the widest


def _sparsest_needed(spec: ModelSpec, gates: Mapping[str, Tensor], bits: int, budget: int) -> Fitting | None:
    def at(sparsity: float) -> Fitting:
        cell = Cell(sparsity, bits, "structural", "A") if sparsity else Cell(0.0, bits)
        layers = structure_of(spec, cell, gates)
        return Fitting(cell, layers, stored_bytes(spec, layers, bits))

    if (dense := at(0.0)).stored_bytes <= budget:
        return dense
    low, best = 0.0, at(MOST)
    if best.stored_bytes > budget:
        return None
    for _ in range(STEPS):
        middle = at((low + best.cell.sparsity) / 2)
        if middle.stored_bytes <= budget:
            best = middle
        else:
            low = middle.cell.sparsity
    return best


def recommended(
    model: Decoder, calibration: np.ndarray, heldout: np.ndarray, budget: int, *, seed: int, stages: Stages
) -> tuple[CompressedModel, list[dict[str, float | str]]]:
    """The cell with the lowest held-out KL (nats a token), and what every cell measured."""
    with stages.stage("statistics", "collecting Fisher statistics") as report:
        gates = collect(model, calibration, seed=seed, progress=report).gates
    stats, rows, best = plain_statistics(model, calibration), [], None
    for each in cells_at(model.spec, gates, budget):
        with stages.stage("compress", f"{each.cell.name}: pruning and rounding, layer by layer") as report:
            compressed = compress_cell(model, each.cell, each.layers, stats, calibration, report, table_bits=TABLE_BITS)
            kl = heldout_kl(model, dequantized(compressed).to(model.embed.weight.device), heldout)
        rows.append({"cell": each.cell.name, "sparsity": each.cell.sparsity, "heldout_kl": kl})
        if best is None or kl < best[0]:
            best = kl, compressed
    assert best is not None  # cells_at gives one or raises
    return best[1], rows
