"""Blocks of output rows with their own widths: order, bytes, refusals."""

import numpy as np
import pytest

from jpq_export.numerics.affine import store
from jpq_export.numerics.row_blocks import RowBlocks, RowLayout, layout_of
from jpq_export.numerics.scheme import Scheme

WIDE, NARROW = Scheme(4, 8), Scheme(2, 8)
LAYOUT = RowLayout(((WIDE, 2), (NARROW, 3)), (3, 1, 0, 4, 2))


def parts(layout, rows=5, columns=16, seed=0):
    rng = np.random.default_rng(seed)
    codes = (rng.random((rows, columns)) * (layout.max_codes()[:, None] + 1)).astype(np.uint8)
    return codes, rng.random((rows, columns // 8)).astype(np.float16)


def test_every_row_comes_back_in_its_own_width_at_its_own_place():
    codes, scales = parts(LAYOUT)
    assert LAYOUT.max_codes().tolist() == [3, 15, 3, 15, 3]
    weight = LAYOUT.store(codes, scales, None)
    np.testing.assert_array_equal(weight.codes(), codes)
    np.testing.assert_array_equal(weight.scales, scales)
    for row, top in enumerate(LAYOUT.max_codes()):
        alone = store(codes[row : row + 1], scales[row : row + 1], None, WIDE if top == 15 else NARROW)
        np.testing.assert_array_equal(weight.dequantize()[row], alone.dequantize()[0])
    assert layout_of(weight) == LAYOUT


def test_twin_other_positions_are_another_weight():
    codes, scales = parts(LAYOUT)
    weight = LAYOUT.store(codes, scales, None)
    assert weight.positions is not None
    wrong = RowBlocks(weight.blocks, np.argsort(weight.positions).astype(np.int32))
    assert not np.array_equal(wrong.dequantize(), weight.dequantize())


def test_bytes_are_those_of_the_blocks_and_the_positions():
    codes, scales = parts(LAYOUT)
    two, three = WIDE.weight_bytes(2, 16), NARROW.weight_bytes(3, 16)
    assert LAYOUT.store(codes, scales, None).nbytes == LAYOUT.weight_bytes(16) == two + three + 5 * 4
    in_order = RowLayout(LAYOUT.blocks)
    assert in_order.store(*parts(in_order), None).nbytes == in_order.weight_bytes(16) == two + three


def test_stored_zeros_stay_with_their_rows():
    layout = RowLayout(((Scheme(4, 8, symmetric=False), 1), (Scheme(2, 8, symmetric=False), 2)), (1, 2, 0))
    codes, scales = parts(layout, rows=3)
    zeros = np.array([[1, 2], [12, 13], [3, 0]], np.uint8)
    np.testing.assert_array_equal(layout.store(codes, scales, zeros).zero_points(), zeros)


@pytest.mark.parametrize("positions", [np.array([0, 1, 2, 3, 3], np.int32), np.arange(5), np.arange(4, dtype=np.int32)])
def test_positions_that_are_no_order_are_refused(positions):
    weight = LAYOUT.store(*parts(LAYOUT), None)
    with pytest.raises(ValueError, match="each of 5 rows once"):
        RowBlocks(weight.blocks, positions)


def test_blocks_of_different_groups_are_refused():
    weight = LAYOUT.store(*parts(LAYOUT), None)
    other = RowLayout(((Scheme(4, 16), 5),)).store(parts(LAYOUT)[0], np.ones((5, 1), np.float16), None)
    with pytest.raises(ValueError, match="group size"):
        RowBlocks((*weight.blocks, *other.blocks))
