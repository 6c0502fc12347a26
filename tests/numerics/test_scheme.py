"""Schemes: what they accept, and what they cost in bytes."""

import pytest

from jpq_export.numerics.scheme import (
    ALL_WIDTHS,
    TERNARY,
    Scheme,
    choose_group_size,
    from_kernel_bits,
    kernel_bits,
    levels,
    row_bytes,
    wide_group_size,
)


@pytest.mark.parametrize("bits", [0, 0.5, 1.5, 1.58, 7, 9, 16, True])
def test_refuses_other_widths(bits):
    with pytest.raises(ValueError, match=f"bits {bits} is not one of"):
        Scheme(bits, 64)


def test_refuses_an_empty_group():
    with pytest.raises(ValueError, match="group_size 0"):
        Scheme(4, 0)


def test_refuses_rows_that_groups_do_not_divide():
    with pytest.raises(ValueError, match="in_features 100 is not a multiple of group_size 64"):
        Scheme(4, 64).groups(100)


@pytest.mark.parametrize(
    ("bits", "count", "expected"),
    [
        (1, 8, 1),
        (1, 9, 2),
        (TERNARY, 5, 1),
        (TERNARY, 6, 2),
        (TERNARY, 64, 13),
        (2, 4, 1),
        (2, 5, 2),
        (3, 8, 3),
        (3, 9, 4),
        (3, 1, 1),
        (4, 3, 2),
        (5, 8, 5),
        (5, 5, 4),
        (6, 4, 3),
        (8, 7, 7),
    ],
)
def test_row_bytes(bits, count, expected):
    assert row_bytes(count, bits) == expected


def test_weight_bytes_counts_codes_scales_and_zeros():
    # 10 rows of 96 codes of 3 bits = 36 bytes, 3 scales of 2 bytes, 3 zero points of 3 bits in 2 bytes
    assert Scheme(3, 32).weight_bytes(10, 96) == 10 * (36 + 6)
    assert Scheme(3, 32, symmetric=False).weight_bytes(10, 96) == 10 * (36 + 6 + 2)
    # 96 ternary codes in 20 bytes, 3 zero points in one; 96 bits in 12 bytes
    assert Scheme(TERNARY, 32).weight_bytes(10, 96) == 10 * (20 + 6)
    assert Scheme(TERNARY, 32, symmetric=False).weight_bytes(10, 96) == 10 * (20 + 6 + 1)
    assert Scheme(1, 32, symmetric=False).weight_bytes(10, 96) == 10 * (12 + 6 + 1)


@pytest.mark.parametrize("shape", [(0, 64), (64, 0)])
def test_a_removed_weight_costs_nothing(shape):
    assert Scheme(4, 64).weight_bytes(*shape) == 0


@pytest.mark.parametrize("bits", [bits for bits in ALL_WIDTHS if bits != TERNARY])
def test_the_centre_lies_between_the_two_middle_codes(bits):
    scheme = Scheme(bits, 8)
    assert scheme.centre == (scheme.max_code // 2 + scheme.max_code // 2 + 1) / 2


@pytest.mark.parametrize("kind", [{}, {"integer_zero": True}])
def test_the_centre_of_ternary_codes_is_the_middle_one(kind):
    scheme = Scheme(TERNARY, 8, **kind)
    assert (scheme.max_code, scheme.centre, scheme.signed_bits) == (2, 1, 2)


@pytest.mark.parametrize("bits", ALL_WIDTHS)
def test_kernels_state_every_width_as_an_integer_of_its_own(bits):
    stated = kernel_bits(bits)
    assert type(stated) is int
    assert from_kernel_bits(stated) == bits
    assert (stated == bits) == (bits != TERNARY)
    assert levels(bits) == {1: 2, TERNARY: 3, 2: 4, 3: 8, 4: 16, 5: 32, 6: 64, 8: 256}[bits]


@pytest.mark.parametrize(
    ("in_features", "expected"), [(576, 64), (1536, 64), (128, 64), (640, 64), (160, 80), (48, 48), (12, 12), (7, 7)]
)
def test_choose_group_size(in_features, expected):
    assert choose_group_size(in_features) == expected


@pytest.mark.parametrize(
    ("in_features", "least", "expected"),
    [
        *((k, 128, g) for k, g in ((576, 192), (1536, 128), (640, 128), (960, 160), (384, 128), (192, 192), (96, 96))),
        *((k, 128, g) for k, g in ((64, 64), (32, 32), (200, 200), (1184, 32), (7, 7))),
        *(
            (k, 512, g)
            for k, g in ((576, 576), (1536, 512), (1408, 704), (2144, 2144), (4096, 512), (960, 960), (256, 256))
        ),
        *((k, 64, g) for k, g in ((576, 64), (160, 160), (480, 96))),
        *((k, 32, g) for k, g in ((96, 32), (128, 32), (100, 25), (12, 12))),
    ],
)
def test_wide_group_size(in_features, least, expected):
    assert wide_group_size(in_features, least) == expected


@pytest.mark.parametrize("in_features", [1, 7, 13, 36, 100, 1100, 1536])
def test_a_chosen_group_divides_the_row(in_features):
    assert in_features % choose_group_size(in_features) == 0
    assert in_features % wide_group_size(in_features, 128) == 0


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_an_integer_zero_makes_codes_signed_integers_of_the_same_width(bits):
    scheme = Scheme(bits, 8, integer_zero=True)
    assert scheme.centre == 1 << (bits - 1)
    assert scheme.signed_bits == bits
    assert scheme.weight_bytes(3, 16) == Scheme(bits, 8).weight_bytes(3, 16)
    with pytest.raises(ValueError, match="integer_zero is a kind of symmetric"):
        Scheme(bits, 8, symmetric=False, integer_zero=True)


@pytest.mark.parametrize("bits", ALL_WIDTHS)
@pytest.mark.parametrize("kind", [{}, {"integer_zero": True}, {"symmetric": False}])
def test_signed_bits_hold_every_code_less_its_zero_and_one_bit_less_does_not(bits, kind):
    scheme = Scheme(bits, 8, **kind)
    zeros = [scheme.centre] if scheme.symmetric else [0, scheme.max_code]
    step = 2 if scheme.symmetric and scheme.centre % 1 else 1
    values = [step * (code - zero) for code in (0, scheme.max_code) for zero in zeros]
    assert all(value == int(value) for value in values)
    for width, fits in ((scheme.signed_bits, True), (scheme.signed_bits - 1, False)):
        half = (1 << width) // 2
        low, high = -half, max(half - 1, 0)  # nothing but 0 in no bits
        assert (low <= min(values) and max(values) <= high) is fits
