"""Stored weights: the record holds together, and codes mean scale * (code - zero)."""

from dataclasses import replace

import numpy as np
import pytest

from jpq_export.numerics.affine import QuantizedWeight, store, with_stored_zeros
from jpq_export.numerics.reference import low_bit_gather, low_bit_matmul
from jpq_export.numerics.scheme import ALL_WIDTHS, TERNARY, Scheme


def random_weight(scheme, n=5, k=24, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, scheme.max_code + 1, (n, k)).astype(np.uint8)
    scales = rng.uniform(0.01, 0.1, (n, k // scheme.group_size)).astype(np.float16)
    zeros = rng.integers(0, scheme.max_code + 1, scales.shape).astype(np.uint8)
    return codes, scales, None if scheme.symmetric else zeros


def by_hand(codes, scales, zeros, scheme):
    """The weight one number at a time, in Python floats."""
    out = np.zeros(codes.shape)
    for row, column in np.ndindex(*codes.shape):
        group = column // scheme.group_size
        zero = scheme.max_code / 2 if zeros is None else int(zeros[row, group])
        out[row, column] = float(scales[row, group]) * (int(codes[row, column]) - zero)
    return out


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", ALL_WIDTHS)
@pytest.mark.parametrize("group_size", [8, 3, 24])
def test_dequantize_is_scale_times_code_minus_zero(bits, group_size, symmetric):
    scheme = Scheme(bits, group_size, symmetric)
    parts = random_weight(scheme)
    weight = store(*parts, scheme)
    np.testing.assert_array_equal(weight.codes(), parts[0])
    np.testing.assert_allclose(weight.dequantize(), by_hand(*parts, scheme), rtol=1e-6, atol=1e-9)
    assert weight.nbytes == scheme.weight_bytes(5, 24)


def test_scales_shifted_by_one_group_are_another_weight():
    scheme = Scheme(4, 8)
    codes, scales, zeros = random_weight(scheme)
    weight, shifted = store(codes, scales, zeros, scheme), store(codes, np.roll(scales, 1, 1), zeros, scheme)
    error = np.sqrt(np.mean((weight.dequantize() - shifted.dequantize()) ** 2) / np.mean(weight.dequantize() ** 2))
    assert error > 0.1


def test_two_bit_symmetric_levels_are_centred():
    weight = store(np.array([[0, 1, 2, 3]], np.uint8), np.array([[2.0]], np.float16), None, Scheme(2, 4))
    assert weight.dequantize().tolist() == [[-3.0, -1.0, 1.0, 3.0]]


@pytest.mark.parametrize(("bits", "expected"), [(1, [-1.0, 1.0]), (TERNARY, [-2.0, 0.0, 2.0])])
def test_the_symmetric_levels_of_the_narrowest_widths(bits, expected):
    codes = np.arange(len(expected), dtype=np.uint8)[None]
    weight = store(codes, np.array([[2.0]], np.float16), None, Scheme(bits, len(expected)))
    assert weight.dequantize().tolist() == [expected]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("packed", np.zeros((5, 11), np.uint8)),
        ("packed", np.zeros((5, 12), np.int8)),
        ("scales", np.zeros((5, 3), np.float32)),
        ("scales", np.zeros((3, 5), np.float16)),
        ("zeros", None),
        ("zeros", np.zeros((5, 3), np.uint8)),
    ],
)
def test_a_record_that_does_not_hold_together_is_refused(field, value):
    scheme = Scheme(4, 8, symmetric=False)
    weight = store(*random_weight(scheme), scheme)
    with pytest.raises(ValueError, match=field):
        replace(weight, **{field: value})


def test_a_symmetric_record_with_zeros_is_refused():
    weight = store(*random_weight(Scheme(4, 8)), Scheme(4, 8))
    with pytest.raises(ValueError, match="stores no zeros"):
        QuantizedWeight(weight.scheme, weight.shape, weight.packed, weight.scales, np.zeros((5, 2), np.uint8))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_reference_matmul_keeps_the_type_and_adds_the_bias(dtype):
    scheme = Scheme(3, 8)
    parts = random_weight(scheme)
    x = np.random.default_rng(1).normal(size=(2, 4, 24)).astype(dtype)
    bias = np.arange(5, dtype=np.float32)
    y = low_bit_matmul(x, store(*parts, scheme), bias)
    expected = x.astype(np.float64) @ by_hand(*parts, scheme).T + bias
    assert y.dtype == dtype
    np.testing.assert_allclose(y, expected, rtol=2e-3 if dtype == np.float16 else 1e-5, atol=1e-5)
    assert np.abs(low_bit_matmul(x, store(*parts, scheme)) - expected).max() > 1  # without the bias


def test_reference_gather_looks_rows_up():
    scheme = Scheme(5, 8, symmetric=False)
    parts = random_weight(scheme)
    rows = low_bit_gather(np.array([[4, 0], [1, 1]]), store(*parts, scheme))
    np.testing.assert_allclose(rows, by_hand(*parts, scheme)[[[4, 0], [1, 1]]], rtol=1e-6, atol=1e-9)


def test_ternary_with_an_integer_zero_is_the_symmetric_kind():
    weight = store(*random_weight(Scheme(TERNARY, 8, integer_zero=True)), Scheme(TERNARY, 8, integer_zero=True))
    again = with_stored_zeros(weight)
    assert again.scheme == Scheme(TERNARY, 8)
    np.testing.assert_array_equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_stored_zeros_mean_the_same_numbers(bits):
    scheme = Scheme(bits, 8, integer_zero=True)
    weight = store(*random_weight(scheme), scheme)
    again = with_stored_zeros(weight)
    assert not again.scheme.symmetric
    np.testing.assert_array_equal(again.dequantize(), weight.dequantize())
    half = QuantizedWeight(Scheme(bits, 8), weight.shape, weight.packed, weight.scales)  # the twin: another zero
    assert with_stored_zeros(half) is half
    assert np.abs(half.dequantize() - weight.dequantize()).min() > 0
