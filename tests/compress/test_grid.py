"""Points of rows: the nearest one, whatever is mixed."""

import numpy as np
import pytest
import torch

from jpq_export.compress.grid import Grid
from jpq_export.compress.rounding import nearest, search_scales
from jpq_export.numerics.levels import NORMAL_WIDTHS, normal_bytes
from jpq_export.numerics.scheme import ALL_WIDTHS, Scheme

KINDS = [Scheme(bits, 8) for bits in ALL_WIDTHS] + [Scheme(bits, 8, normal=True) for bits in NORMAL_WIDTHS]


def points_of(scheme: Scheme) -> np.ndarray:
    """What a row of this scheme may be rounded to."""
    return normal_bytes(scheme.bits).astype(float) if scheme.normal else np.arange(scheme.max_code + 1.0)


@pytest.mark.parametrize("shape", [(), (50,), (5, 10)])
def test_the_nearest_point_of_rows_of_every_kind(shape) -> None:
    grid = Grid.of([(scheme, 2) for scheme in KINDS], torch.device("cpu"))
    places = torch.from_numpy(np.random.default_rng(0).uniform(-20, 280, (len(grid), *shape))).float()
    found = grid.nearest()(places.clone())
    for row, scheme in enumerate(np.repeat(np.array(KINDS, object), 2)):
        points = points_of(scheme)
        wanted = points[np.abs(places[row].numpy()[..., None] - points).argmin(-1)]
        assert np.array_equal(found[row].numpy(), wanted), scheme


def test_a_part_and_a_whole_and_what_is_joined() -> None:
    even, mixed = Grid(torch.tensor([3.0, 15.0])), Grid.of([(KINDS[3], 1), (KINDS[-1], 1)], torch.device("cpu"))
    assert even.table is None
    joined = Grid.joined([even, mixed])
    assert len(joined) == 4
    places = torch.full((4,), 9.3)
    assert joined.nearest()(places.clone()).tolist() == [3.0, 9.0, 7.0, 20.0]
    assert joined[1:3].nearest()(places[:2].clone()).tolist() == [9.0, 7.0]
    assert [len(part) for part in joined.split(3)] == [3, 1]
    assert joined.view(2, 2)[:, 1:].nearest()(torch.full((2, 1), 1000.0)).flatten().tolist() == [15.0, 236.0]


@pytest.mark.parametrize("group_size", [32, 128, 576])
@pytest.mark.parametrize("bits", NORMAL_WIDTHS)
def test_normal_levels_beat_even_ones_in_groups_of_every_size(bits, group_size) -> None:
    W = torch.from_numpy(np.random.default_rng(0).normal(size=(64, 576 if group_size == 576 else 512))).float()
    error = {}
    for normal in (False, True):
        grid = Grid.of([(Scheme(bits, group_size, normal=normal), 64)], W.device)
        scales, zeros = search_scales(W, torch.ones(W.shape[1]), grid, group_size, symmetric=True)
        error[normal] = float((nearest(W, scales, zeros, grid).dequantize() - W).square().mean())
    assert error[True] < error[False] * 0.96


def test_middles_and_reaches_are_those_of_the_schemes() -> None:
    grid = Grid.of([(scheme, 1) for scheme in KINDS], torch.device("cpu"))
    assert grid.middle(integer_zero=False).tolist() == [scheme.centre for scheme in KINDS]
    assert grid.reach().tolist() == [points_of(scheme)[-1] - scheme.centre for scheme in KINDS]
