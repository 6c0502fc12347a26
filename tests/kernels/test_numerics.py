"""The Triton kernels, interpreted, against the reference in fp64, at awkward shapes; outputs start as NaN."""

import numpy as np
import pytest

from jpq_export.numerics.affine import QuantizedWeight
from jpq_export.numerics.packing import pack_codes, unpack_codes
from jpq_export.numerics.reference import low_bit_gather, low_bit_matmul
from jpq_export.numerics.scheme import KERNEL_NORMAL, KERNEL_TERNARY, KERNEL_WIDTHS, TERNARY, Scheme, from_kernel_bits
from jpq_export.parity.tolerance import PEAK, dot

ROWS = (1, 2, 3, 7, 16, 63, 128)
MOST_FP32_ROWS = 16  # above, X is rounded to fp16
NORMAL = tuple(bits for bits in KERNEL_WIDTHS if bits > KERNEL_NORMAL)
HALF = 2.0**-11  # one rounding to fp16, relative
HALF_SUBNORMAL = 2.0**-25  # and below 2**-14, absolute
N = 9  # odd, and more than a tile of the kernel for few rows


def stored(arrays):
    scheme = Scheme.stated(arrays["bits"], arrays["group_size"], symmetric=arrays["zeros"] is None)
    return QuantizedWeight(scheme, arrays["shape"], arrays["packed"], arrays["scales"], arrays["zeros"])


def distance(y, x, arrays, bias=None):
    """Largest error of Y against the reference in fp64, in units of what rounding may do; passes up to 1.

    An fp32 sum of K products; X rounded to fp16 (fp32 X, many rows): at most `HALF` of every product; Y rounded to
    fp16 (fp16 X).
    """
    weight = stored(arrays)
    x64, w64 = x.astype(np.float64), weight.dequantize().astype(np.float64)
    expected = low_bit_matmul(x64, weight, bias)
    bound = PEAK * dot(x.shape[1]) * np.sqrt(x64**2 @ (w64**2).T) + 2.0**-23 * np.abs(expected)
    if x.dtype == np.float32 and len(x) > MOST_FP32_ROWS:
        bound += HALF * (np.abs(x64) @ np.abs(w64).T) + HALF_SUBNORMAL * np.abs(w64).sum(1)
    if x.dtype == np.float16:
        bound += HALF * np.abs(expected) + HALF_SUBNORMAL
    return (np.abs(y.astype(np.float64) - expected) / bound).max()


def flipped(arrays, row, column):
    """The same weight with the highest bit of one code flipped; a ternary 0 becomes 2, another 0."""
    width = from_kernel_bits(arrays["bits"])
    codes = unpack_codes(arrays["packed"], width, arrays["shape"][1])
    code = codes[row, column]
    if width == TERNARY:
        codes[row, column] = 0 if code else 2
    else:
        codes[row, column] ^= 1 << (width - 1)
    return arrays | {"packed": pack_codes(codes, width)}


def shifted(arrays):
    """The same weight with every scale taken from the next group."""
    return arrays | {"scales": np.roll(arrays["scales"], 1, axis=1)}


def case(random, bits, group_size, groups, rows, dtype, rng, *, symmetric):
    arrays = random(N, groups, bits, group_size, symmetric=symmetric, rng=rng)
    x = rng.normal(size=(rows, groups * group_size)).astype(dtype)
    return arrays, x, rng.normal(size=N).astype(np.float32) if rows % 2 else None


@pytest.mark.parametrize("group_size", [32, 64, 128, 576])
@pytest.mark.parametrize("bits", KERNEL_WIDTHS)
def test_matmul(kernels, random, bits, group_size):
    rng = np.random.default_rng(int(bits))
    for i, rows in enumerate((1, 3, 20) if bits in NORMAL else ROWS):  # levels are looked up slowly here
        for dtype in (np.float16, np.float32):
            symmetric = bool((i + (dtype == np.float16) + group_size // 64) % 2)
            groups = 1 + rows % 3 if group_size <= 128 else 1  # of longer rows the bound would miss a flipped code
            arrays, x, bias = case(random, bits, group_size, groups, rows, dtype, rng, symmetric=symmetric)
            y, _ = kernels.matmul(x, arrays, bias)
            assert distance(y, x, arrays, bias) <= 1, (rows, dtype, symmetric)
            wrong = flipped(arrays, N - 1, int(np.abs(x).max(0).argmax()))
            assert distance(y, x, wrong, bias) > 4, "the bound would miss a flipped code"
            if len(arrays["scales"][0]) > 1:
                assert distance(y, x, shifted(arrays), bias) > 4, "the bound would miss shifted scales"


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("bits", KERNEL_WIDTHS)
def test_twin_wrong_weights_give_a_wrong_product(kernels, random, bits, rows):
    rng = np.random.default_rng(int(bits))
    arrays, x, bias = case(random, bits, 32, 2, rows, np.float32, rng, symmetric=False)
    wrongs = [flipped(arrays, N - 1, int(np.abs(x).max(0).argmax())), shifted(arrays)]
    if bits in NORMAL:
        wrongs.append(arrays | {"bits": bits % 32})
    else:
        wrongs.append(arrays | {"zeros": np.roll(arrays["zeros"], 1, axis=0)})
    for wrong in wrongs:
        assert distance(kernels.matmul(x, wrong, bias)[0], x, arrays, bias) > 4


@pytest.mark.parametrize(
    ("bits", "group_size", "groups", "rows", "dtype"),
    [
        (4, 64, 19, 1, np.float16),
        (8, 32, 17, 2, np.float32),
        (3, 128, 34, 1, np.float32),
        (5, 64, 9, 7, np.float16),
        (3, 32, 9, 20, np.float32),
        (KERNEL_TERNARY, 64, 37, 1, np.float16),
        (KERNEL_TERNARY, 32, 9, 20, np.float32),
    ],
)
def test_k_is_split_the_same_way_every_time(kernels, random, bits, group_size, groups, rows, dtype):
    rng = np.random.default_rng(int(bits))
    arrays, x, _ = case(random, bits, group_size, groups, rows, dtype, rng, symmetric=True)
    bias = rng.normal(size=N).astype(np.float32)
    y, splits = kernels.matmul(x, arrays, bias, multiprocessors=4)
    assert splits > 1
    assert distance(y, x, arrays, bias) <= 1
    again, _ = kernels.matmul(x, arrays, bias, multiprocessors=4)
    assert np.array_equal(y, again)
    last = x.copy()
    last[:, -group_size:] = 0
    assert distance(y, last, arrays, bias) > 4, "the bound would miss a part left out"


@pytest.mark.parametrize(
    ("bits", "group_size", "offset", "element_bits"),
    [
        *((4, 48, 0, 32), (4, 40, 0, 32), (3, 40, 0, 8), (6, 20, 0, 8), (8, 9, 0, 8), (5, 64, 1, 8), (2, 32, 3, 8)),
        *(
            (1, 32, 0, 32),
            (1, 48, 0, 8),
            (KERNEL_TERNARY, 40, 0, 8),
            (KERNEL_TERNARY, 9, 0, 8),
            (KERNEL_TERNARY, 64, 3, 8),
        ),
    ],
)
def test_groups_that_are_not_whole_words_and_codes_that_are_not_aligned(
    kernels, random, bits, group_size, offset, element_bits
):
    rng = np.random.default_rng(int(bits))
    for rows, dtype in ((1, np.float32), (2, np.float16), (7, np.float16), (20, np.float32)):
        arrays, x, bias = case(random, bits, group_size, 3, rows, dtype, rng, symmetric=rows == 2)
        assert kernels.element_bits(arrays, offset) == element_bits
        y, _ = kernels.matmul(x, arrays, bias, offset=offset)
        assert distance(y, x, arrays, bias) <= 1, (rows, dtype)
        wrong = flipped(arrays, N - 1, int(np.abs(x).max(0).argmax()))
        assert distance(kernels.matmul(x, wrong, bias, offset=offset)[0], x, arrays, bias) > 4
        indices = np.arange(N)
        assert np.array_equal(kernels.gather(indices, arrays, offset=offset), low_bit_gather(indices, stored(arrays)))


@pytest.mark.parametrize("bits", [7])
def test_widths_no_scheme_has_yet(kernels, random, bits):
    rng = np.random.default_rng(int(bits))
    arrays = random(N, 2, bits, 32, symmetric=True, rng=rng)
    codes = unpack_codes(arrays["packed"], bits, 64)
    weight = (codes - ((1 << bits) - 1) / 2) * np.repeat(arrays["scales"].astype(np.float64), 32, axis=1)
    for rows in (2, 20):
        x = rng.normal(size=(rows, 64)).astype(np.float32)
        allowed = (HALF if rows == 20 else PEAK * dot(64)) * (np.abs(x) @ np.abs(weight).T)
        assert (np.abs(kernels.matmul(x, arrays)[0] - x @ weight.T) <= allowed).all()
        wrong = flipped(arrays, 0, int(np.abs(x).max(0).argmax()))
        assert not (np.abs(kernels.matmul(x, wrong)[0] - x @ weight.T) <= allowed).all()


@pytest.mark.parametrize("bits", KERNEL_WIDTHS)
def test_rows_are_looked_up_bit_for_bit(kernels, random, bits):
    rng = np.random.default_rng(int(bits))
    indices = np.array([[10, 0, 3], [-1, -11, 3]])
    for group_size in (32, 64, 128):
        arrays = random(11, 3, bits, group_size, symmetric=group_size == 64, rng=rng)
        expected = low_bit_gather(indices, stored(arrays))
        assert np.array_equal(kernels.gather(indices, arrays), expected)
        half = kernels.gather(indices.astype(np.int32), arrays, dtype="float16")
        assert np.array_equal(half, expected.astype(np.float16))
        wrong = kernels.gather(indices, flipped(arrays, 3, arrays["shape"][1] - 1))
        assert (wrong != expected).sum() == 2  # row 3 is asked for twice
        assert not np.array_equal(kernels.gather(indices, shifted(arrays)), expected)


def test_an_index_out_of_range_gives_a_row_of_nan(kernels, random):
    arrays = random(11, 2, 4, 32, symmetric=True, rng=np.random.default_rng(0))
    rows = kernels.gather(np.array([11, 0, -12, -1]), arrays)
    assert np.isnan(rows).all(1).tolist() == [True, False, True, False]
    assert np.isfinite(rows[[1, 3]]).all()


@pytest.mark.parametrize("rows", [1, 20])
def test_a_bad_number_spoils_its_row_only(kernels, random, rows):
    rng = np.random.default_rng(1)
    arrays = random(N, 2, 3, 64, symmetric=False, rng=rng)
    x = rng.normal(size=(rows + 1, 128)).astype(np.float32)
    for bad in (np.nan, np.inf):
        x[rows, 70] = bad
        y, _ = kernels.matmul(x, arrays)
        weight = stored(arrays).dequantize()[:, 70]
        assert not np.isfinite(y[rows, weight != 0]).any()
        assert np.isfinite(y[:rows]).all()


def test_leading_dimensions_and_no_rows(kernels, random):
    rng = np.random.default_rng(2)
    arrays, x, bias = case(random, 4, 32, 2, 6, np.float32, rng, symmetric=True)
    flat, _ = kernels.matmul(x, arrays, bias)
    shaped, _ = kernels.matmul(x.reshape(2, 3, 64), arrays, bias)
    assert np.array_equal(shaped, flat.reshape(2, 3, N))
    assert kernels.matmul(x[:0], arrays, bias)[0].shape == (0, N)
    assert kernels.gather(np.zeros((2, 0), np.int64), arrays).shape == (2, 0, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 24}, "in_features 64 is not a multiple of group_size 24"),
        ({"bits": 9}, "bits 9 is not one of .*7, 8, 16"),
        ({"bits": 5}, r"packed: expected uint8 \(9, 40\) on cpu, got uint8 \(9, 32\)"),
        ({"scales": np.ones((9, 3), np.float16)}, r"scales: expected float16 \(9, 2\)"),
        ({"scales": np.ones((9, 2), np.float32)}, "scales: expected float16 .* got float32"),
        ({"zeros": np.ones((9, 2), np.uint8)}, r"zeros: expected uint8 \(9, 1\)"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(kernels, random, change, message):
    arrays = random(N, 2, 4, 32, symmetric=True, rng=np.random.default_rng(3))
    x = np.ones((1, 64), np.float32)
    assert np.isfinite(kernels.matmul(x, arrays)[0]).all()
    with pytest.raises(ValueError, match=message):
        kernels.matmul(x, arrays | change)


def test_a_group_that_cuts_a_byte_is_refused_with_a_way_out(kernels, random):
    arrays = random(N, 2, 3, 12, symmetric=True, rng=np.random.default_rng(4))
    with pytest.raises(ValueError, match="group_size 12 is not made of whole bytes at 3 bits; use a multiple of 8"):
        kernels.matmul(np.ones((1, 24), np.float32), arrays)


def test_operands_that_do_not_fit_are_refused(kernels, random):
    arrays = random(N, 2, 4, 32, symmetric=True, rng=np.random.default_rng(5))
    x = np.ones((2, 64), np.float32)
    with pytest.raises(ValueError, match=r"last dimension must be the weight's in_features 64, got shape \(2, 32\)"):
        kernels.matmul(x[:, :32].copy(), arrays)
    with pytest.raises(ValueError, match=r"x: expected float32 or float16 .* got float64"):
        kernels.matmul(x.astype(np.float64), arrays)
    with pytest.raises(ValueError, match=r"bias: expected float32 \(9,\)"):
        kernels.matmul(x, arrays, np.ones(8, np.float32))
    with pytest.raises(ValueError, match=r"indices: expected int64 or int32 .* got int16"):
        kernels.gather(np.zeros(2, np.int16), arrays)
