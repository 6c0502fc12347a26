"""One cell of the study as a compressed model: the repository's walk through the layers, with this method's sweeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb

import numpy as np
from torch import Tensor

from jpq_export.compress.apply import COLUMNS_OF, Compressor, LayerChoice, Recipe, Stream, all_kept
from jpq_export.compress.decoder import Decoder
from jpq_export.compress.grid import Grid
from jpq_export.compress.model import AnyContext
from jpq_export.compress.rounding import Rounded
from jpq_export.compress.statistics import Progress, Statistics
from jpq_export.compress.student import to_compressed
from jpq_export.errors import UsageError
from jpq_export.format.compressed import CompressedModel
from jpq_export.format.encoder_spec import is_table
from jpq_export.format.spec import ModelSpec
from jpq_export.methods.srcr.points import DENSE, Cell, neighbours
from jpq_export.methods.srcr.structure import choose_structure, layer_weights
from jpq_export.methods.srcr.sweep import prune_and_round, prune_then_round
from jpq_export.numerics.affine import QuantizedWeight
from jpq_export.numerics.row_blocks import RowLayout
from jpq_export.numerics.scheme import Scheme, choose_group_size

GROUP_SIZE = 64
TABLE_BITS = 8  # the paper's rate counts the layers only; embedding and head are rounded alike in all cells


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a cell takes. `zeros`: share of the layers' original weights that are gone or exactly zero, counted.

    stored_bytes: the whole file as this project stores it: every kept code, scales, zero points, embedding and head.
    layer_bytes: the linears of the layers in it. theoretical_bytes: those by the rate alone. original_bytes: in fp16.
    indexed_bytes: those with zeros left out and an index of what is kept instead; no file here is written so.
    """

    zeros: float
    stored_bytes: int
    layer_bytes: int
    theoretical_bytes: int
    indexed_bytes: int
    original_bytes: int


class SparseCompressor(Compressor):
    """Prunes and rounds by a cell: "A", "B", or GPTQ alone; all tokens weigh the same, as published."""

    def __init__(self, teacher: Decoder, cell: Cell, recipe: Recipe, stats: Statistics, sequences: np.ndarray) -> None:
        super().__init__(teacher, recipe, stats, sequences)
        self.cell, self.in_layers = cell, False
        # What a removed column did, the kept ones of its matrix take over: SparseGPT's update, for all of them at once.
        self.refits = cell.pattern == "structural"

    def _attention(self, i: int, teacher_stream: Stream, student_stream: Stream, contexts: list[AnyContext]) -> None:
        super()._attention(i, self._inputs(student_stream), student_stream, contexts)

    def _mlp(self, i: int, teacher_stream: Stream, student_stream: Stream) -> None:
        super()._mlp(i, self._inputs(student_stream), student_stream)

    def _inputs(self, student_stream: Stream) -> Stream:
        """What the whole layer reads where it is asked: the compressed prefix too, as SparseGPT does.

        From the original's activations a refit would also correct what earlier layers did wrong, and structural cells
        alone would have that. It makes little difference: SmolLM2-135M, 50% and 8 bits, perplexity 216.6 instead of
        217.4, the original's 71.7.
        """
        return list(student_stream) if self.refits else []

    def _linears(self, i: int, parts: tuple[str, ...], old_in: Stream, new_in: Stream) -> None:
        self.in_layers, refits = True, self.refits
        self.refits = refits and parts[0] in COLUMNS_OF
        super()._linears(i, parts, old_in, new_in)
        self.in_layers, self.refits = False, refits

    def _stored_alike(self, i: int, parts: tuple[str, ...]) -> list[list[str]]:
        """Each matrix by itself, as published: what is pruned is chosen among its own weights."""
        return [[part] for part in parts]

    def _round(self, W: Tensor, H: Tensor, scheme: Scheme | RowLayout, grid: Grid) -> Rounded:
        # a table, or nothing to prune; no cell has rows of several widths
        if not self.in_layers or self.cell.zeros.share == 0 or isinstance(scheme, RowLayout):
            return super()._round(W, H, scheme, grid)
        return (prune_then_round if self.cell.case == "A" else prune_and_round)(W, H, self.cell.zeros, scheme)


def with_structure(spec: ModelSpec, layers: tuple[LayerChoice, ...]) -> ModelSpec:
    """The model's shapes after pruning."""
    return spec.with_layers(
        tuple(
            type(old)(len(new.kv_heads), len(new.channels), old.window, old.rope)
            for old, new in zip(spec.layers, layers, strict=True)
        )
    )


def schemes_for(spec: ModelSpec, bits: int, table_bits: int = TABLE_BITS) -> dict[str, Scheme]:
    """Layers at `bits` with stored whole zero points, so that a zero weight is exactly zero; tables at `table_bits`."""
    return {
        name: Scheme(table_bits if is_table(name) else bits, choose_group_size(columns, GROUP_SIZE), is_table(name))
        for name, (_, columns) in spec.matrices().items()
    }


def structure_of(spec: ModelSpec, cell: Cell, gates: Mapping[str, Tensor]) -> tuple[LayerChoice, ...]:
    """What a cell keeps of the layers."""
    if cell.pattern != "structural":
        return all_kept(spec)
    return choose_structure(spec, gates, cell.sparsity, group_size=GROUP_SIZE)


def compress_cell(
    teacher: Decoder,
    cell: Cell,
    layers: tuple[LayerChoice, ...],
    stats: Statistics,
    sequences: np.ndarray,
    progress: Progress | None = None,
    *,
    table_bits: int = TABLE_BITS,
) -> CompressedModel:
    """The cell's model from calibration sequences int64 [n, length]; `stats`: plain ones of the teacher."""
    kept = with_structure(teacher.spec, layers)
    schemes: dict[str, Scheme | RowLayout] = {**schemes_for(kept, cell.bits, table_bits)}
    compressor = SparseCompressor(teacher, cell, Recipe(layers, schemes, "gptq"), stats, sequences)
    return to_compressed(compressor.run(progress), schemes)


def check_columns(spec: ModelSpec, cells: tuple[Cell, ...]) -> None:
    """UsageError when the neighbours of a semi-structured pattern would not divide a row."""
    for cell in cells:
        numbers = neighbours(cell.pattern)
        for name, (_, columns) in spec.matrices().items() if numbers else ():
            if not is_table(name) and numbers and columns % numbers[1]:
                raise UsageError(
                    f"--patterns {cell.pattern}: {name} has {columns} columns, not a multiple of {numbers[1]}; leave "
                    "the pattern out for this model"
                )


def sizes(compressed: CompressedModel, teacher: ModelSpec, cell: Cell) -> Sizes:
    """Counted on the model, not taken from the cell's name."""
    layers = {
        name: weight
        for name, weight in compressed.quantized.items()
        if not is_table(name) and isinstance(weight, QuantizedWeight)
    }
    total = layer_weights(teacher)
    kept = sum(int(np.count_nonzero(_nonzero(weight))) for weight in layers.values())
    held = sum(weight.shape[0] * weight.shape[1] for weight in layers.values())
    codes = sum(weight.packed.nbytes for weight in layers.values())
    layer_bytes = sum(weight.nbytes for weight in layers.values())
    if cell.pattern in (DENSE, "structural"):
        indexed, zeros = layer_bytes, 1 - held / total
    else:
        zeros = 1 - kept / total
        indexed = round(layer_bytes - codes + held * ((1 - cell.sparsity) * cell.bits + _index_bits(cell)) / 8)
    theoretical = round(total * 2 * (1 - cell.rate))
    return Sizes(zeros, compressed.weight_bytes, layer_bytes, theoretical, indexed, teacher.parameters() * 2)


def _nonzero(weight: QuantizedWeight) -> np.ndarray:
    codes = weight.codes().reshape(weight.shape[0], -1, weight.scheme.group_size)  # [N, K/g, g]
    return codes != weight.zero_points()[:, :, None]


def _index_bits(cell: Cell) -> float:
    """Bits a weight that say which are kept: one without structure; log2 of the choices within n:m, in whole bits."""
    numbers = neighbours(cell.pattern)
    if numbers is None:
        return 1.0
    return (comb(numbers[1], numbers[0]) - 1).bit_length() / numbers[1]
