"""The study's recommendation at one size: the least sparsity that fits, counted in the bytes a file really takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from jpq_export.compress.decoder import Decoder
from jpq_export.compress.load import load_model
from jpq_export.compress.statistics import collect, plain_statistics
from jpq_export.errors import BudgetError
from jpq_export.methods.srcr.at_size import TABLE_BITS, WIDTHS, cells_at, stored_bytes
from jpq_export.methods.srcr.compress import compress_cell, structure_of
from jpq_export.methods.srcr.points import Cell


@pytest.fixture
def model(tiny_folder: Callable[..., Path]) -> Decoder:
    """A tiny model with random weights."""
    found = load_model(str(tiny_folder("llama_tied", num_key_value_heads=4))).model
    assert isinstance(found, Decoder)
    return found


@pytest.fixture
def tokens() -> np.ndarray:
    """Random tokens [4, 32]."""
    return np.random.default_rng(0).integers(0, 256, (4, 32))


def test_every_width_gets_the_least_sparsity_that_fits(model: Decoder, tokens: np.ndarray) -> None:
    gates = collect(model, tokens, seed=0).gates
    dense = structure_of(model.spec, Cell(0.0, 3), gates)
    budget = int(stored_bytes(model.spec, dense, 3) * 0.93)
    found = cells_at(model.spec, gates, budget)
    assert {each.cell.bits for each in found} <= set(WIDTHS)
    assert any(each.cell.sparsity > 0 for each in found)
    for each in found:
        assert each.stored_bytes <= budget
        if each.cell.sparsity:  # the twin: with all of its structure the width does not fit
            whole = structure_of(model.spec, Cell(0.0, each.cell.bits), gates)
            assert stored_bytes(model.spec, whole, each.cell.bits) > budget


def test_of_dense_cells_only_the_widest_is_asked(model: Decoder, tokens: np.ndarray) -> None:
    gates = collect(model, tokens, seed=0).gates
    found = cells_at(model.spec, gates, 10**9)
    assert [(each.cell.bits, each.cell.sparsity) for each in found] == [(WIDTHS[-1], 0.0)]


def test_counted_bytes_are_the_files(model: Decoder, tokens: np.ndarray) -> None:
    gates = collect(model, tokens, seed=0).gates
    cell = Cell(0.25, 3, "structural", "A")
    layers = structure_of(model.spec, cell, gates)
    stats = plain_statistics(model, tokens)
    made = compress_cell(model, cell, layers, stats, tokens, table_bits=TABLE_BITS)
    assert made.weight_bytes == stored_bytes(model.spec, layers, 3)
    assert made.weight_bytes != compress_cell(model, cell, layers, stats, tokens).weight_bytes  # tables at 8 bits


def test_a_budget_below_all_is_said(model: Decoder) -> None:
    gates = {
        f"layers.{i}.{sub}": torch.ones(1 + n)
        for i, layer in enumerate(model.spec.layers)
        for sub, n in (("attn", layer.kv_heads), ("mlp", layer.ffn))
    }
    with pytest.raises(BudgetError, match="2 bits are still not enough; ask for more"):
        cells_at(model.spec, gates, 100)
