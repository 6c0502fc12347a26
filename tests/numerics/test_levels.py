"""Levels for normal weights: the best there are, symmetric, and stored as codes."""

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest

from jpq_export.compress.prices import EVEN_ERROR, NORMAL_ERROR
from jpq_export.numerics.affine import store
from jpq_export.numerics.levels import MIDDLE, NORMAL_WIDTHS, normal_bytes, normal_levels
from jpq_export.numerics.scheme import ALL_WIDTHS, Scheme

SAMPLE = np.array([NormalDist().inv_cdf((i + 0.5) / 20000) for i in range(20000)])
# Squared errors of the best quantizers of a normal distribution (Max, 1960, table I, to 5 bits; 6 bits by iteration).
BEST = {3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 0.000643}
EVEN = {3: 0.03744, 4: 0.01154, 5: 0.003495, 6: 0.001041}  # Max, 1960, table II; 6 bits likewise


def least_error(levels: np.ndarray) -> float:
    """Of the sample, over scales."""

    def error(scale: float) -> float:
        points = levels * scale
        return float(np.square(points[np.searchsorted((points[1:] + points[:-1]) / 2, SAMPLE)] - SAMPLE).mean())

    return min(error(reach / levels[-1]) for reach in np.linspace(1.8, 4.6, 281))


@pytest.mark.parametrize("bits", NORMAL_WIDTHS)
def test_they_are_the_best_levels_rounded(bits: int) -> None:
    levels = normal_levels(bits)
    assert len(levels) == 1 << bits
    assert np.array_equal(levels, -levels[::-1])
    assert levels[-1] < MIDDLE
    assert (np.diff(levels.astype(int)) > 0).all()
    assert least_error(levels) == pytest.approx(BEST[bits], rel=0.04 if bits == 6 else 0.015)
    even = np.arange(1 << bits) - ((1 << bits) - 1) / 2
    assert least_error(even) == pytest.approx(EVEN[bits], rel=0.03)


def test_prices_expect_those_errors() -> None:
    for bits, error in NORMAL_ERROR.items():
        assert error == pytest.approx(least_error(normal_levels(bits)), rel=0.02)  # the sample has no far tails
    for bits, error in EVEN_ERROR.items():
        if bits < 8:  # of 256 levels the sample's own steps are a part
            assert error == pytest.approx(EVEN[bits], rel=0.01)
    assert 3 < EVEN_ERROR[6] / EVEN_ERROR[8] / 3.6 < 4  # two bits


@pytest.mark.parametrize("bits", NORMAL_WIDTHS)
def test_codes_stand_for_levels(bits: int) -> None:
    rng = np.random.default_rng(0)
    points = rng.choice(normal_bytes(bits), (6, 32))
    scales = rng.uniform(0.1, 1, (6, 2)).astype(np.float16)
    weight = store(points, scales, None, Scheme(bits, 16, normal=True))
    assert weight.codes().max() < 1 << bits
    assert np.array_equal(weight.points(), points)
    expected = (points.astype(np.float32) - MIDDLE).reshape(6, 2, 16) * scales.astype(np.float32)[:, :, None]
    assert np.array_equal(weight.dequantize(), expected.reshape(6, 32))
    even = replace(weight, scheme=Scheme(bits, 16))
    assert even.nbytes == weight.nbytes
    assert not np.allclose(even.dequantize(), weight.dequantize())


def test_what_is_no_level_is_refused() -> None:
    points = np.full((1, 16), normal_bytes(4)[3] + 1, np.uint8)
    with pytest.raises(ValueError, match="no level of 4 bits"):
        store(points, np.ones((1, 1)), None, Scheme(4, 16, normal=True))


@pytest.mark.parametrize("bits", sorted(set(ALL_WIDTHS) - set(NORMAL_WIDTHS)))
def test_other_widths_have_none(bits: float) -> None:
    with pytest.raises(ValueError, match="normal levels are symmetric, of"):
        Scheme(bits, 16, normal=True)


def test_they_have_no_zero_points() -> None:
    for kind in ({"symmetric": False}, {"integer_zero": True}):
        with pytest.raises(ValueError, match="normal levels are symmetric"):
            Scheme(4, 16, normal=True, **kind)
