"""Every implementation of the CPU kernels against the reference, at awkward shapes, with outputs that start as NaN."""

import ctypes
import mmap
import sys
from dataclasses import replace

import numpy as np
import pytest

from jpq_export.numerics.packing import pack_codes
from jpq_export.numerics.reference import low_bit_gather, low_bit_matmul
from jpq_export.numerics.scheme import KERNEL_NORMAL, KERNEL_WIDTHS

IMPLEMENTATIONS = ("avx512-vnni", "avx512", "avx2", "neon", "scalar")
FP32, INT8, INT16 = 0, 1, 2
TERNARY = 16  # as the kernels count bits
OK, BAD_WEIGHT, BAD_INDEX, NOT_HERE = 0, 1, 3, 4
# Implementations that round X when allowed: groups and rows for which they do, and the largest integer they round to.
FIFTEEN_BITS = {INT8: 127 * 128, INT16: 127 * 128}
ROUNDING = {
    "avx512-vnni": ((8, 16, 48, 64, 128, 256, 208, 704), (1, 2, 3, 7, 16, 63, 128), {INT8: 127, INT16: 127 * 128}),
    "avx2": ((16, 48, 64, 128), (1, 2, 3, 7, 8), FIFTEEN_BITS),
    "neon": ((8, 16, 48, 64, 128), (1, 2, 3, 7, 8), FIFTEEN_BITS),
}
LONGEST_GROUP = {"avx2": 4096, "neon": 4096}  # that is multiplied in fixed point; 16384 of others
ROWS = (1, 2, 3, 4, 7, 16, 63, 128)
# K is a whole number of groups, not always of the 64 to 256 codes a block holds; 1088 is more than one panel; 16 groups
# come together, so some have more than twice as many.
SHAPES = {16: 544, 32: 96, 48: 816, 64: 1088, 128: 256, 192: 384, 24: 912, 8: 408, 40: 40, 5: 35}
# Groups of whole blocks of 256, or of a row: with a block that is filled up, and one that is not.
SHAPES |= {256: 768, 512: 1536, 80: 80, 176: 176, 208: 208, 576: 576, 704: 704, 832: 832}
VECTOR_GROUPS = {"avx512-vnni": 8, "avx512": 16, "avx2": 8, "neon": 8, "scalar": 1}
TOLERANCE = 2e-6  # relative RMS of an fp32 sum of a hundred terms, see `tolerance`


def tolerance(group_size, bits=8):
    """A group is one fp32 sum, whose rounding grows like the root of its terms.

    Codes are multiplied before their zero is taken off: evenly spaced ones are twice as large (RMS) as what is left,
    levels about 128, here of codes that are all as likely, 2.6 times, in a sample of 13 up to 3.
    """
    return TOLERANCE * max(1, group_size / 128) ** 0.5 * (1.5 if bits > KERNEL_NORMAL else 1)


def distance(got, expected):
    return float(np.sqrt(np.mean(np.square(got - expected)) / np.mean(np.square(expected))))


def flipped(stored, row, column):
    """The weight with one code changed by one."""
    codes = stored.codes()
    codes[row, column] = codes[row, column] - 1 if codes[row, column] else 1
    return replace(stored, packed=pack_codes(codes, stored.scheme.bits))


def fixed_point(x, group_size, largest):
    """X as the rounding modes see it: per row and group, integers up to `largest` times a scale."""
    grouped = x.reshape(len(x), -1, group_size)
    most = np.abs(grouped).max(-1, keepdims=True)
    step = (most / np.float32(largest)).astype(np.float64)
    rounded = np.rint(grouped * (np.float32(largest) / most)) * step  # ties and near ties as fp32 sees them
    return rounded.reshape(x.shape), np.broadcast_to(step, grouped.shape).reshape(x.shape)


def address(array):
    return None if array is None else array.ctypes.data


def groups_of(name):
    """The group sizes an implementation takes; it leaves the others to others."""
    return [(group_size, k) for group_size, k in SHAPES.items() if group_size % VECTOR_GROUPS[name] == 0]


@pytest.mark.parametrize("group_size", SHAPES)
@pytest.mark.parametrize("bits", KERNEL_WIDTHS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_product_is_the_references(core_of, random, name, bits, group_size):
    core = core_of(name)
    if group_size % VECTOR_GROUPS[name]:
        pytest.skip(f"{name} leaves groups of {group_size} to others")
    rng, k, n = np.random.default_rng([int(10 * bits), group_size]), SHAPES[group_size], 77 if group_size == 64 else 13
    for m in ROWS:
        for symmetric in (True, False):
            stored = random(n, k, bits, group_size, symmetric, rng)
            x = rng.normal(size=(m, k)).astype(np.float32)
            bias = rng.normal(size=n).astype(np.float32) if m % 2 else None
            expected = low_bit_matmul(x.astype(np.float64), stored, bias)
            status, y = core.matmul(x, stored, name, bias=bias)
            assert status == OK
            assert distance(y, expected) < tolerance(group_size, bits), (m, symmetric)
            wrong = flipped(stored, n - 1, int(np.abs(x).max(0).argmax()))
            assert distance(core.matmul(x, wrong, name, bias=bias)[1], expected) > 4 * tolerance(group_size, bits)


@pytest.mark.parametrize(("few", "group_size"), [(7, 64), (3, 256), (3, 512), (3, 576), (3, 832)])
@pytest.mark.parametrize("bits", [b for b in KERNEL_WIDTHS if b != TERNARY])
def test_a_row_is_the_same_whatever_rows_are_beside_it(core_of, random, bits, few, group_size):
    """Among few rows, and among many; between those two sums of fp32 are made in another order."""
    core, rng = core_of("avx512-vnni"), np.random.default_rng([bits, group_size])
    stored, x = random(13, SHAPES[group_size], bits, group_size, False, rng), rng.normal(size=(64, SHAPES[group_size]))

    def product(begin, end):
        return core.matmul(x[begin:end].astype(np.float32), stored, "avx512-vnni")[1]

    assert np.array_equal(product(0, few), np.concatenate([product(i, i + 1) for i in range(few)]))
    assert np.array_equal(product(0, 64), np.concatenate([product(0, 19), product(19, 64)]))


def guarded(array):
    """A copy that ends where memory ends: to read behind it stops the process."""
    pages = mmap.PAGESIZE * -(-array.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    libc, start = ctypes.CDLL(None, use_errno=True), ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + pages), mmap.PAGESIZE, 0) == 0  # 0: PROT_NONE
    copy = np.frombuffer(memory, array.dtype, array.size, pages - array.nbytes).reshape(array.shape)
    copy[:] = array
    return copy


@pytest.mark.skipif(sys.platform == "win32", reason="no mprotect")
@pytest.mark.parametrize("bits", KERNEL_WIDTHS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_nothing_is_read_behind_a_weight(core_of, random, name, bits):
    core, rng = core_of(name), np.random.default_rng(int(10 * bits))
    for group_size, k in groups_of(name):
        for n, m, symmetric in ((1, 1, True), (6, 1, False), (7, 3, False), (33, 20, True)):
            stored = random(n, k, bits, group_size, symmetric, rng)
            x = rng.normal(size=(m, k)).astype(np.float32)
            zeros = None if stored.zeros is None else guarded(stored.zeros)
            edge = replace(stored, packed=guarded(stored.packed), scales=guarded(stored.scales), zeros=zeros)
            for activations in (FP32, INT16, INT8):
                status, y = core.matmul(guarded(x), edge, name, activations=activations)
                assert status == OK
                assert np.array_equal(y, core.matmul(x, stored, name, activations=activations)[1])


@pytest.mark.parametrize("activations", [INT8, INT16], ids=["int8", "int16"])
@pytest.mark.parametrize("bits", KERNEL_WIDTHS)
@pytest.mark.parametrize("name", ROUNDING)
def test_rounded_activations_are_exactly_the_promised_fixed_point(core_of, random, name, bits, activations):
    core = core_of(name)
    rng, n = np.random.default_rng(int(10 * bits)), 9
    groups, rows, largest = ROUNDING[name]
    for group_size in groups:
        for m in rows:
            k = 3 * group_size
            stored = random(n, k, bits, group_size, bool(m % 2), rng)
            x = rng.normal(size=(m, k)).astype(np.float32) * np.exp(rng.normal(size=k)).astype(np.float32)
            # A byte a part in long groups, and of many rows.
            bytewise = name == "avx512-vnni" and (m > 16 or (group_size == 256 and bits != TERNARY))
            most = 127 * 256 if bytewise and activations == INT16 else largest[activations]
            rounded, step = fixed_point(x, group_size, most)
            status, y = core.matmul(x, stored, name, activations=activations)
            assert status == OK
            assert distance(y, low_bit_matmul(rounded, stored)) < tolerance(group_size, bits), (group_size, m)
            exact = low_bit_matmul(x.astype(np.float64), stored)
            weight = np.abs(stored.dequantize().astype(np.float64))
            assert (np.abs(y - exact) <= 0.5001 * step @ weight.T + 1e-4).all()
            assert distance(y, exact) > 4 * tolerance(group_size, bits), "not rounded at all"


@pytest.mark.parametrize("activations", [FP32, INT16, INT8], ids=["fp32", "int16", "int8"])
@pytest.mark.parametrize("bits", KERNEL_WIDTHS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_largest_sums_of_the_longest_group_do_not_overflow(core_of, random, name, bits, activations):
    """Neither that of the products nor that of X, which the zeros are multiplied by."""
    core, k = core_of(name), LONGEST_GROUP.get(name, 16384)
    for symmetric in (True, False):
        stored = random(5, k, bits, k, symmetric, np.random.default_rng(0))
        full = replace(stored, packed=np.full_like(stored.packed, 255))
        if stored.zeros is not None:
            full = replace(full, zeros=pack_codes(np.full((5, 1), int(bits > 1), np.uint8), stored.scheme.bits))
        for value in (1.0, -1.0, 0.7):
            x = np.full((2, k), value, np.float32)
            x[1, 0] = 1.3  # digits of the others are no round numbers
            expected = low_bit_matmul(x.astype(np.float64), full)
            y = core.matmul(x, full, name, activations=activations)[1]
            many = core.matmul(np.tile(x, (20, 1)), full, name, activations=activations)[1]
            assert np.abs(many / np.tile(expected, (20, 1)) - 1).max() < 0.01, (symmetric, value)
            # Equal numbers are all rounded the same way, to 1.3 / 127 of which half; a sum that overflows is far off.
            assert np.abs(y / expected - 1).max() < 0.01, (symmetric, value)


@pytest.mark.parametrize("activations", [INT8, INT16], ids=["int8", "int16"])
@pytest.mark.parametrize("name", ["avx512", "avx2", "neon", "scalar"])
def test_many_rows_are_not_rounded_where_that_saves_nothing(core_of, random, name, activations):
    core, rng = core_of(name), np.random.default_rng(10)
    stored, x = random(70, 128, 4, 64, True, rng), rng.normal(size=(33, 128)).astype(np.float32)
    y = core.matmul(x, stored, name, activations=activations)[1]
    assert distance(y, low_bit_matmul(x.astype(np.float64), stored)) < TOLERANCE


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rounding_is_a_permission_other_implementations_do_not_use(core_of, random, name):
    core = core_of(name)
    if name in ROUNDING:
        pytest.skip("it uses it")
    rng = np.random.default_rng(1)
    stored, x = random(5, 64, 4, 16, True, rng), rng.normal(size=(2, 64)).astype(np.float32)
    assert np.array_equal(core.matmul(x, stored, name, activations=INT8)[1], core.matmul(x, stored, name)[1])


def pack_plainly(codes, bits):
    """The layout once more, in words of its own: a bit stream, or five ternary digits as a fraction of 256."""
    n, k = codes.shape
    if bits != TERNARY:
        stream = np.unpackbits(codes[:, :, None], axis=2, bitorder="little")[:, :, :bits].reshape(n, k * bits)
        return np.packbits(stream, axis=1, bitorder="little")
    digits = np.zeros((n, -(-k // 5) * 5), np.int64)
    digits[:, :k] = codes
    value = digits.reshape(n, -1, 5) @ [81, 27, 9, 3, 1]
    return ((256 * value + 242) // 243).astype(np.uint8)


@pytest.mark.parametrize("bits", [1, 7, TERNARY])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_layout_stated_twice(core_of, random, name, bits):
    core, rng = core_of(name), np.random.default_rng(int(10 * bits))
    levels = 3 if bits == TERNARY else 1 << bits
    for group_size, k in groups_of(name):
        host = random(7, k, 8, group_size, True, rng)
        codes = rng.integers(0, levels, (7, k)).astype(np.uint8)
        zeros = rng.integers(0, levels, host.scales.shape).astype(np.uint8)
        packed, packed_zeros = pack_plainly(codes, bits), pack_plainly(zeros, bits)
        scales = np.repeat(host.scales.astype(np.float64), group_size, axis=1)
        for m in ROWS:
            x = rng.normal(size=(m, k)).astype(np.float32)
            for zero, stored in (((levels - 1) / 2, None), (np.repeat(zeros, group_size, axis=1), packed_zeros)):
                weight = core.weight(host, packed=address(packed), bits=bits, zeros=address(stored))
                if (name, bits) == ("avx512-vnni", 7):  # not compiled: no model has this width
                    assert core.matmul(x, host, name, weight=weight)[0] == NOT_HERE
                    continue
                expected = x @ ((codes - 1.0 * zero) * scales).T
                assert distance(core.matmul(x, host, name, weight=weight)[1], expected) < tolerance(group_size), (
                    group_size,
                    m,
                )
                turned = core.weight(host, packed=address(packed[::-1].copy()), bits=bits, zeros=address(stored))
                assert distance(core.matmul(x, host, name, weight=turned)[1], expected) > 4 * tolerance(group_size)


@pytest.mark.parametrize(("group_size", "k"), [(64, 128), (576, 576), (512, 1536)])
@pytest.mark.parametrize("activations", [FP32, INT8])
@pytest.mark.parametrize("m", [1, 9, 40])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_bad_number_spoils_its_row_only(core_of, random, name, m, activations, group_size, k):
    core = core_of(name)
    rng = np.random.default_rng(2)
    stored, x = random(7, k, 3, group_size, False, rng), rng.normal(size=(m + 1, k)).astype(np.float32)
    for bad in (np.nan, np.inf):
        x[m, 70] = bad
        y = core.matmul(x, stored, name, activations=activations)[1]
        assert not np.isfinite(y[m]).any()
        assert np.isfinite(y[:m]).all()


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e30])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_tiny_and_huge_activations(core_of, random, name, size, m):
    core = core_of(name)
    rng = np.random.default_rng(3)
    stored, bias = random(7, 128, 4, 64, True, rng), rng.normal(size=7).astype(np.float32)
    x = np.full((m, 128), size, np.float32)
    x[:, ::3] *= -1
    y = core.matmul(x, stored, name, bias=bias)[1]
    assert distance(y, low_bit_matmul(x.astype(np.float64), stored, bias)) < TOLERANCE


@pytest.mark.parametrize(
    ("bits", "group_size", "k"), [(5, 32, 96), (3, 576, 576), (3, 512, 1536), (4, 576, 576), (35, 512, 1536)]
)
@pytest.mark.parametrize("activations", [FP32, INT8])
@pytest.mark.parametrize("m", [1, 17])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_ranges_of_rows_make_the_same_product(core_of, random, name, m, activations, bits, group_size, k):
    core = core_of(name)
    rng = np.random.default_rng(4)
    stored, x = random(150, k, bits, group_size, False, rng), rng.normal(size=(m, k)).astype(np.float32)
    whole = core.matmul(x, stored, name, activations=activations)[1]
    if activations == FP32:
        assert distance(whole, low_bit_matmul(x.astype(np.float64), stored)) < tolerance(group_size, bits)
    parts = core.matmul(x, stored, name, activations=activations, ranges=[(50, 150), (0, 7), (7, 50)])[1]
    if (
        k > 640 and m > 8 and name in ("avx512", "avx2", "neon")
    ):  # tiles add panels of 640 columns, the rows at an end do not
        assert distance(parts, whole) < TOLERANCE
    else:
        assert np.array_equal(whole, parts)
    missing = core.matmul(x, stored, name, activations=activations, ranges=[(0, 7), (8, 150)])[1]
    assert np.isnan(missing[:, 7]).all()


@pytest.mark.parametrize("activations", [FP32, INT16, INT8], ids=["fp32", "int16", "int8"])
@pytest.mark.parametrize("m", [1, 2, 40])
@pytest.mark.parametrize(("group_size", "k"), [(64, 576), (576, 576), (512, 1536)])
def test_products_of_one_x_share_what_they_want_alike_only(core, random, group_size, k, m, activations):
    """Every width first, then every width after it: none gets X in the order of another's codes."""
    rng = np.random.default_rng(k)
    several = [random(9, k, bits, group_size, False, rng) for bits in KERNEL_WIDTHS]
    x = rng.normal(size=(m, k)).astype(np.float32)
    alone = [core.matmul(x, stored, activations=activations)[1] for stored in several]
    for first in range(len(several)):
        order = [first, *range(len(several))]
        together = core.matmul_together(x, [several[i] for i in order], activations=activations)
        assert all(np.array_equal(y, alone[i]) for y, i in zip(together, order, strict=True)), KERNEL_WIDTHS[first]


@pytest.mark.parametrize("bits", KERNEL_WIDTHS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_are_looked_up_bit_for_bit(core_of, random, name, bits):
    core, rng = core_of(name), np.random.default_rng(int(10 * bits))
    for group_size, k in groups_of(name):
        stored = random(11, k, bits, group_size, group_size == 32, rng)
        indices = np.array([10, 0, 3, -1, -11])
        status, rows = core.gather(indices, stored, name)
        assert status == OK
        assert np.array_equal(rows, low_bit_gather(indices, stored))
        wrong = flipped(stored, 3, k - 1)
        assert not np.array_equal(core.gather(indices, wrong, name)[1], rows)


def test_an_index_out_of_range_is_refused(core, random):
    stored = random(11, 32, 4, 16, True, np.random.default_rng(5))
    for index in (11, -12):
        assert core.gather(np.array([0, index]), stored)[0] == BAD_INDEX


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 0},
        {"bits": 9},
        {"bits": 15},
        {"bits": 17},
        {"bits": 34},
        {"bits": 39},
        {"group_size": 0},
        {"group_size": 17},
        {"k": 0},
        {"packed": None},
    ],
)
def test_a_weight_of_the_wrong_shape_is_refused(core, random, change):
    stored = random(5, 32, 4, 16, True, np.random.default_rng(6))
    x = np.ones((1, 32), np.float32)
    assert core.matmul(x, stored)[0] == OK
    status, y = core.matmul(x, stored, weight=core.weight(stored, **change))
    assert status == BAD_WEIGHT
    assert np.isnan(y).all()


def test_an_implementation_that_cannot_is_not_silently_replaced(core, random):
    stored, x = random(5, 35, 4, 5, True, np.random.default_rng(7)), np.ones((1, 35), np.float32)
    assert core.matmul(x, stored)[0] == OK  # whichever is best
    for name in set(core.names) - {"scalar"}:
        assert core.matmul(x, stored, name)[0] == NOT_HERE
    assert core.matmul(x, stored, "no such")[0] == NOT_HERE
