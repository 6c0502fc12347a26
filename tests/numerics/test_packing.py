"""The bit layout: golden bytes, exact round trips over every code value and odd lengths, and what must be refused."""

import numpy as np
import pytest

from jpq_export.numerics.packing import pack_codes, unpack_codes
from jpq_export.numerics.scheme import ALL_WIDTHS, TERNARY, levels, row_bytes

STREAMS = [bits for bits in ALL_WIDTHS if bits != TERNARY]
# Codes 0, 1, 2, ... (modulo 2^b) written out by hand from the diagram in packing.py: code j at bits j*b of the stream.
GOLDEN = {
    1: ([0, 1, 1, 0, 1, 0, 0, 1, 1], "9601"),
    TERNARY: ([0, 1, 2, 2, 1, 2, 2, 2, 2, 2, 1, 0, 2], "37ff69"),  # ceil(256 / 243 * (52, 242, 99))
    2: ([0, 1, 2, 3, 3, 2, 1, 0, 1], "e41b01"),
    3: ([0, 1, 2, 3, 4, 5, 6, 7, 5], "88c6fa05"),
    4: ([0, 1, 2, 3, 14, 15, 7], "1032fe07"),
    5: ([0, 1, 2, 3, 4, 5, 6, 31, 17], "2088418af911"),
    6: ([0, 1, 2, 3, 63, 62, 61, 60, 33], "40200cbfdff321"),
    8: ([0, 1, 2, 254, 255], "000102feff"),
}


@pytest.mark.parametrize("bits", ALL_WIDTHS)
def test_golden_bytes(bits):
    codes, expected = GOLDEN[bits]
    assert pack_codes(np.array([codes], np.uint8), bits).tobytes().hex() == expected


@pytest.mark.parametrize("bits", STREAMS)
def test_golden_bytes_as_one_big_integer(bits):
    """The layout said a second way: a row is the integer sum of code_j * 2^(j*b), little-endian."""
    codes, expected = GOLDEN[bits]
    integer = sum(code << (j * bits) for j, code in enumerate(codes))
    assert integer.to_bytes(row_bytes(len(codes), bits), "little").hex() == expected


@pytest.mark.parametrize("bits", ALL_WIDTHS)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 63, 65])
def test_round_trip(bits, count):
    codes = np.random.default_rng(count).integers(0, levels(bits), (3, count)).astype(np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.flags.c_contiguous  # as files and C functions take it
    assert packed.shape == (3, row_bytes(count, bits))
    assert packed.flags.c_contiguous  # kernels take its address
    np.testing.assert_array_equal(unpack_codes(packed, bits, count), codes)


@pytest.mark.parametrize("bits", ALL_WIDTHS)
def test_round_trip_of_every_code_value_at_every_position(bits):
    values = np.arange(levels(bits), dtype=np.uint8)
    codes = np.stack([np.roll(np.resize(values, 8 + levels(bits)), shift) for shift in range(8)])
    np.testing.assert_array_equal(unpack_codes(pack_codes(codes, bits), bits, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", STREAMS)
def test_padding_bits_are_zero_and_ignored(bits):
    codes = np.full((2, 5), (1 << bits) - 1, np.uint8)
    packed = pack_codes(codes, bits)
    used = 5 * bits % 8
    if used:
        assert packed[0, -1] >> used == 0
        packed[:, -1] |= np.uint8(0xFF << used & 0xFF)
    np.testing.assert_array_equal(unpack_codes(packed, bits, 5), codes)


@pytest.mark.parametrize("bits", STREAMS)
def test_one_flipped_bit_changes_exactly_one_code(bits):
    codes = np.random.default_rng(0).integers(0, 1 << bits, (1, 16)).astype(np.uint8)
    packed = pack_codes(codes, bits)
    for bit in range(16 * bits):
        damaged = packed.copy()
        damaged[0, bit // 8] ^= 1 << (bit % 8)
        different = np.flatnonzero(unpack_codes(damaged, bits, 16)[0] != codes[0])
        assert different.tolist() == [bit // bits]


def test_a_big_endian_reading_is_not_the_layout():
    """Twin of the golden bytes: the other natural bit order gives other bytes."""
    codes = np.array([GOLDEN[3][0]], np.uint8)
    stream = np.unpackbits(codes[:, :, None], axis=2, bitorder="big")[:, :, -3:].reshape(1, -1)
    assert np.packbits(stream, axis=1, bitorder="big").tobytes().hex() != GOLDEN[3][1]


def test_every_ternary_byte_by_division():
    """Ternary codes said a second way: the digits of v in base 3; the 13 bytes that no v makes are never written."""
    codes = np.stack(np.unravel_index(np.arange(243), (3,) * 5), axis=1).astype(np.uint8)
    packed = pack_codes(codes, TERNARY)
    assert packed[:, 0].tolist() == [-(-256 * v // 243) for v in range(243)]
    assert len(set(packed[:, 0].tolist())) == 243
    np.testing.assert_array_equal(unpack_codes(packed, TERNARY, 5), codes)


def test_ternary_bytes_rounded_down_are_not_the_layout():
    """Twin: v / 243 rounded the other way loses digits."""
    codes = np.stack(np.unravel_index(np.arange(243), (3,) * 5), axis=1).astype(np.uint8)
    down = (256 * np.arange(243) // 243).astype(np.uint8)[:, None]
    assert (unpack_codes(down, TERNARY, 5) != codes).any(axis=1).mean() > 0.9


def test_missing_ternary_codes_are_zero_and_ignored():
    codes = np.full((1, 7), 2, np.uint8)
    packed = pack_codes(codes, TERNARY)
    assert packed[0, 1] == pack_codes(np.array([[2, 2, 0, 0, 0]], np.uint8), TERNARY)[0, 0]
    packed[0, 1] = pack_codes(np.array([[2, 2, 1, 2, 0]], np.uint8), TERNARY)[0, 0]
    np.testing.assert_array_equal(unpack_codes(packed, TERNARY, 7), codes)


@pytest.mark.parametrize("count", [1, 5, 9, 14, 640])
def test_a_wrong_ternary_byte_changes_codes_of_that_byte_only(count):
    codes = np.random.default_rng(count).integers(0, 3, (1, count)).astype(np.uint8)
    damaged = pack_codes(codes, TERNARY)
    damaged[0, -1] = 255 if damaged[0, -1] < 128 else 0
    different = np.flatnonzero(unpack_codes(damaged, TERNARY, count)[0] != codes[0])
    assert len(different)
    assert different.min() >= 5 * (damaged.shape[1] - 1)


@pytest.mark.parametrize("bits", [1, TERNARY, 2, 3, 4, 5, 6])
def test_refuses_a_code_that_does_not_fit(bits):
    with pytest.raises(ValueError, match="does not fit"):
        pack_codes(np.array([[levels(bits)]], np.uint8), bits)


@pytest.mark.parametrize("codes", [np.zeros((2, 3), np.int64), np.zeros(3, np.uint8)])
def test_refuses_other_arrays(codes):
    with pytest.raises(ValueError, match="codes must be uint8"):
        pack_codes(codes, 3)


@pytest.mark.parametrize(("bits", "count"), [(3, 9), (TERNARY, 9), (1, 25)])
def test_refuses_a_row_of_the_wrong_length(bits, count):
    with pytest.raises(ValueError, match=f"for {count} codes of {bits} bits"):
        unpack_codes(np.zeros((1, 3), np.uint8), bits, count)


def test_a_copy_is_returned_at_8_bits():
    codes = np.array([[1, 2]], np.uint8)
    pack_codes(codes, 8)[0, 0] = 9
    unpack_codes(codes, 8, 2)[0, 0] = 9
    assert codes.tolist() == [[1, 2]]
