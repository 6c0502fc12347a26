"""A cell as a model: structural cells make up for what they removed, sizes are counted, indexes cost what they must."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jpq_export.compress.load import load_model
from jpq_export.compress.statistics import collect, plain_statistics
from jpq_export.compress.student import dequantized
from jpq_export.errors import UsageError
from jpq_export.evaluate.text_quality import evaluate_text
from jpq_export.methods.srcr.compress import (
    SparseCompressor,
    check_columns,
    compress_cell,
    schemes_for,
    sizes,
    structure_of,
)
from jpq_export.methods.srcr.points import Cell


@pytest.fixture
def loaded(tiny_folder: Callable[..., Path]) -> object:
    return load_model(str(tiny_folder("llama_tied", num_key_value_heads=4)))


def sequences() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 64))


def test_what_removed_channels_did_the_kept_ones_take_over(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, cell = loaded.model, sequences(), Cell(0.5, 8, "structural", "A")
    layers = structure_of(model.spec, cell, collect(model, ids, seed=0).gates)
    stats = plain_statistics(model, ids)

    def error() -> float:
        kl = evaluate_text(dequantized(compress_cell(model, cell, layers, stats, ids)), model, ids).kl_mean
        assert kl is not None
        return kl

    taken_over = error()
    whole = SparseCompressor.__init__

    def without(self, *args) -> None:
        whole(self, *args)
        self.refits = False

    monkeypatch.setattr(SparseCompressor, "__init__", without)
    assert taken_over < 0.95 * error()


def test_sizes_are_counted_and_an_index_has_its_price(loaded) -> None:
    model, ids = loaded.model, sequences()
    stats, whole = plain_statistics(model, ids), structure_of(model.spec, Cell(0.0, 4), {})
    found = {}
    for pattern, share in (("unstructured", 0.5), ("2:4", 0.5), ("2:8", 0.25)):
        cell = Cell(share, 4, pattern, "B")
        compressed = compress_cell(model, cell, whole, stats, ids)
        assert compressed.quantized["layers.0.attn.q"].scheme == schemes_for(model.spec, 4)["layers.0.attn.q"]
        found[pattern] = sizes(compressed, model.spec, cell)
        assert found[pattern].stored_bytes == compressed.weight_bytes
        assert share <= found[pattern].zeros < share + 0.15  # some weights round to zero by themselves
        own = {n: float((compressed.weight(n) == 0).mean()) for n in compressed.quantized if n.startswith("layers")}
        assert all(share - 0.02 <= zeros < share + 0.2 for zeros in own.values()), own  # those that read the same, too
    total = sum(a * b for n, (a, b) in model.spec.matrices().items() if n.startswith("layers"))
    saved = {name: found["2:4"].layer_bytes - size.indexed_bytes for name, size in found.items()}
    # of 4 bits a weight stay 2 and an index of 1 bit; six ways to choose 2 of 4 take 3 bits; 28 of 2 in 8 take 5
    assert saved == {"unstructured": total / 8, "2:4": total * 1.25 / 8, "2:8": total * 0.375 / 8}


def test_rows_that_do_not_divide_are_refused_by_name(loaded) -> None:
    check_columns(loaded.model.spec, (Cell(0.5, 4, "2:4", "B"), Cell(0.5, 4)))
    with pytest.raises(UsageError, match=r"--patterns 32:64: layers.0.mlp.down has 96 columns, not a multiple of 64"):
        check_columns(loaded.model.spec, (Cell(0.5, 4, "32:64", "B"),))


def test_tables_have_eight_bits_in_every_cell(loaded) -> None:
    for bits in (2, 8):
        schemes = schemes_for(loaded.model.spec, bits)
        assert schemes["embed"].bits == 8
        assert schemes["layers.0.mlp.up"].bits == bits
        assert not schemes["layers.0.mlp.up"].symmetric
