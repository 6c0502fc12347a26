"""The CUDA kernels, run by g++ and the host shim, against the reference. What the shim is blind to is in its header."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from jpq_export.numerics.packing import pack_codes
from jpq_export.numerics.reference import low_bit_gather, low_bit_matmul
from jpq_export.numerics.scheme import KERNEL_TERNARY, KERNEL_WIDTHS
from jpq_export.runtime import native

SHIM = Path(__file__).parent / "cuda_shim"
OK, BAD_WEIGHT, BAD_GROUP, BAD_PRODUCT, WORKSPACE = range(5)
F32, F16 = 0, 1
AUTO, FEW, MANY = 0, 1, 2
GUARD = 64
SHAPES = {
    32: 96,
    64: 576,
    128: 1152,
    576: 1152,
}  # 1152: over a chunk of 1024; 576 at 3 bits: rows of 216 bytes
ROWS = (1, 2, 3, 7, 16, 63, 128)
TYPES = {np.dtype(np.float32): F32, np.dtype(np.float16): F16}
# fp32: a sum of some hundred terms; fp16: what storing the result in 11 bits costs.
TOLERANCE = {np.float32: 2e-6, np.float16: 4e-4}


class Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "x", "bias", "y", "workspace")),
        ("workspace_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("x_type", "bias_type", "y_type", "path")),
    )


class Lookup(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "indices", "out", "stream")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("index_bytes", "out_type")),
    )


def compile_shim(out, *arguments):
    """Compile for the CPU with g++; skips where there is none."""
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("no g++: the CUDA sources cannot be run on the CPU")
    core = native.sources_folder() / "core"
    command = [compiler, "-std=c++17", "-Wno-unknown-pragmas", f"-I{SHIM}", f"-I{core}", *arguments, "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return out


class CudaCore:
    """The functions of low_bit_cuda.h on numpy arrays. Outputs and workspaces start as NaN, with a guard behind."""

    def __init__(self, path, weight):
        self.c, self.make_weight = ctypes.CDLL(str(path)), weight
        self.c.jpq_cuda_matmul_workspace.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self.c.jpq_cuda_matmul_workspace.restype = ctypes.c_size_t

    def matmul(self, x, stored, *, bias=None, path=AUTO, y_type=None, short=0, **changes):
        """Status and y [m, n]; `short`: bytes the workspace lacks."""
        weight = self.make_weight(stored, **changes)
        m, n = len(x), stored.shape[0]
        y = np.full(m * n + GUARD, np.nan, y_type or x.dtype)
        count = self.c.jpq_cuda_matmul_workspace(ctypes.byref(weight), m)
        workspace = np.full(count // 4 + GUARD, np.nan, np.float32)
        product = Product(
            *(ctypes.addressof(weight), x.ctypes.data, None if bias is None else bias.ctypes.data, y.ctypes.data),
            *(workspace.ctypes.data, count - short, None, m),
            *(TYPES[x.dtype], F32 if bias is None else TYPES[bias.dtype], TYPES[y.dtype], path),
        )
        status = self.c.jpq_cuda_matmul(ctypes.byref(product))
        assert np.isnan(y[m * n :]).all(), "written past the end"
        assert np.isnan(workspace[count // 4 :]).all(), "written past the workspace"
        return status, y[: m * n].reshape(m, n)

    def gather(self, indices, stored, out_type=np.float32):
        weight = self.make_weight(stored)
        out = np.full(len(indices) * stored.shape[1] + GUARD, np.nan, out_type)
        addresses = ctypes.addressof(weight), indices.ctypes.data, out.ctypes.data, None
        lookup = Lookup(*addresses, len(indices), indices.itemsize, TYPES[out.dtype])
        status = self.c.jpq_cuda_gather(ctypes.byref(lookup))
        assert np.isnan(out[-GUARD:]).all(), "written past the end"
        return status, out[:-GUARD].reshape(len(indices), -1)


@pytest.fixture(scope="session")
def cuda(tmp_path_factory, weight_of):
    source = native.sources_folder() / "core" / "low_bit_cuda.cu"
    out = tmp_path_factory.mktemp("shim") / "libjpq_shim.so"
    return CudaCore(compile_shim(out, "-O2", "-fPIC", "-shared", "-x", "c++", str(source)), weight_of)


def distance(got, expected):
    return float(np.sqrt(np.mean(np.square(got - expected)) / np.mean(np.square(expected))))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("group_size", SHAPES)
@pytest.mark.parametrize("bits", KERNEL_WIDTHS)
def test_a_product_is_the_references(cuda, random, flip, bits, group_size, dtype):
    rng, k, n = np.random.default_rng([int(10 * bits), group_size]), SHAPES[group_size], 13
    for m in ROWS:
        stored = random(n, k, bits, group_size, bool((m + int(bits)) % 2), rng)
        x = rng.normal(size=(m, k)).astype(dtype)
        bias = rng.normal(size=n).astype(dtype) if m % 3 else None
        expected = low_bit_matmul(x.astype(np.float64), stored, bias)
        status, y = cuda.matmul(x, stored, bias=bias)
        assert status == OK
        assert distance(y.astype(np.float64), expected) < TOLERANCE[dtype], m
        if m in (1, 7, 63):
            # In fp32 the result, whatever X is: one flipped bit must show.
            wrong = flip(stored, n - 1, int(np.abs(x).max(0).argmax()))
            wide = cuda.matmul(x, stored, bias=bias, y_type=np.float32)[1]
            assert distance(wide, expected) < TOLERANCE[np.float32]
            assert distance(cuda.matmul(x, wrong, bias=bias, y_type=np.float32)[1], expected) > 4e-6


# 32 codes begin at each of the five places in a byte; the last group ends in one that is not full.
@pytest.mark.parametrize("path", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("k", [32, 160, 1056, 2080])
def test_ternary_codes_at_every_place_of_a_byte(cuda, random, path, k):
    rng = np.random.default_rng(k)
    stored = random(6, k, KERNEL_TERNARY, 32, False, rng)
    x = np.eye(k, dtype=np.float32)[rng.permutation(k)[:16]]  # a product is one code, so every code can be read off
    status, y = cuda.matmul(x, stored, path=path)
    assert status == OK
    assert np.array_equal(y, low_bit_matmul(x, stored))
    shifted = stored.packed[:, ::-1].copy()
    assert not np.array_equal(cuda.matmul(x, stored, path=path, packed=shifted.ctypes.data)[1], y)


@pytest.mark.parametrize("m", [1, 3, 16, 17])
def test_a_width_no_scheme_has(cuda, random, m):
    bits, rng = 7, np.random.default_rng(7)
    stored, x = random(5, 96, 8, 32, True, rng), rng.normal(size=(m, 96)).astype(np.float32)
    codes = rng.integers(0, 1 << bits, (5, 96)).astype(np.uint8)
    packed = pack_codes(codes, bits)
    weight = (codes - ((1 << bits) - 1) / 2) * np.repeat(stored.scales.astype(np.float64), 32, axis=1)
    y = cuda.matmul(x, stored, packed=packed.ctypes.data, bits=bits)[1]
    assert distance(y, x @ weight.T) < TOLERANCE[np.float32]
    packed[4, 0] ^= 1
    assert distance(cuda.matmul(x, stored, packed=packed.ctypes.data, bits=bits)[1], x @ weight.T) > 1e-4


@pytest.mark.parametrize("k", [2048, 3104])
@pytest.mark.parametrize("m", [1, 5])
def test_long_rows_are_split_and_added_in_order(cuda, random, k, m):
    rng = np.random.default_rng(k)
    stored, x = random(5, k, 3, 32, False, rng), rng.normal(size=(m, k)).astype(np.float32)
    bias = rng.normal(size=5).astype(np.float32)
    expected = low_bit_matmul(x.astype(np.float64), stored, bias)
    status, y = cuda.matmul(x, stored, bias=bias)
    assert status == OK
    assert distance(y, expected) < TOLERANCE[np.float32]
    assert np.array_equal(y, cuda.matmul(x, stored, bias=bias)[1])
    status, untouched = cuda.matmul(x, stored, bias=bias, short=1)
    assert status == WORKSPACE
    assert np.isnan(untouched).all()


@pytest.mark.parametrize("bits", KERNEL_WIDTHS)
@pytest.mark.parametrize("path", [FEW, MANY], ids=["few", "many"])
def test_rows_and_buffers_off_a_multiple_of_16_bytes(cuda, random, bits, path):
    rng = np.random.default_rng(int(10 * bits))
    stored = random(9, 96, bits, 32, False, rng)
    space = np.zeros(stored.packed.nbytes + 1, np.uint8)
    space[1:] = stored.packed.reshape(-1)  # an odd address: not even words lie straight
    x = rng.normal(size=(3, 97)).astype(np.float32).reshape(-1)[1:289].reshape(3, 96)
    expected = low_bit_matmul(x.astype(np.float64), stored)
    status, y = cuda.matmul(x, stored, path=path, packed=space.ctypes.data + 1)
    assert status == OK
    assert distance(y, expected) < TOLERANCE[np.float32]
    assert distance(cuda.matmul(x, stored, path=path, packed=space.ctypes.data)[1], expected) > 0.1


@pytest.mark.parametrize("path", [FEW, MANY], ids=["few", "many"])
def test_a_bad_number_spoils_its_row_only(cuda, random, path):
    rng = np.random.default_rng(2)
    stored, x = random(7, 128, 3, 64, False, rng), rng.normal(size=(4, 128)).astype(np.float32)
    for bad in (np.nan, np.inf):
        x[2, 70] = bad
        y = cuda.matmul(x, stored, path=path)[1]
        assert not np.isfinite(y[2]).any()
        assert np.isfinite(np.delete(y, 2, 0)).all()


def test_more_than_16_rows_through_the_few_row_kernel(cuda, random):
    rng = np.random.default_rng(3)
    stored, x = random(6, 96, 5, 32, True, rng), rng.normal(size=(19, 96)).astype(np.float32)
    many, few = cuda.matmul(x, stored, path=MANY)[1], cuda.matmul(x, stored, path=FEW)[1]
    assert distance(few, many.astype(np.float64)) < TOLERANCE[np.float32]
    assert not np.array_equal(few, many), "the same kernel twice"


@pytest.mark.parametrize("bits", KERNEL_WIDTHS)
@pytest.mark.parametrize("index_type", [np.int32, np.int64])
def test_rows_are_looked_up_bit_for_bit(cuda, random, flip, bits, index_type):
    rng = np.random.default_rng(int(10 * bits))
    for group_size, k in SHAPES.items():
        stored = random(11, k, bits, group_size, group_size == 32, rng)
        indices = np.array([10, 0, 3, -1, -11], index_type)
        status, rows = cuda.gather(indices, stored)
        assert status == OK
        assert np.array_equal(rows, low_bit_gather(indices, stored))
        assert np.array_equal(cuda.gather(indices, stored, np.float16)[1], rows.astype(np.float16))
        assert not np.array_equal(cuda.gather(indices, flip(stored, 3, k - 1))[1], rows)


def test_an_index_out_of_range_gives_a_row_that_is_no_number(cuda, random):
    stored = random(11, 32, 4, 32, True, np.random.default_rng(5))
    rows = cuda.gather(np.array([11, 10, -12]), stored)[1]
    assert np.isnan(rows[[0, 2]]).all()
    assert np.array_equal(rows[1], stored.dequantize()[10])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        *(
            ({name: value}, BAD_WEIGHT)
            for name, value in (
                ("bits", 0),
                ("bits", 9),
                ("bits", 15),
                ("bits", 34),
                ("bits", 39),
                ("k", 0),
                ("packed", None),
            )
        ),
        ({"group_size": 24, "k": 48}, BAD_GROUP),
        ({"group_size": 33}, BAD_WEIGHT),
    ],
)
def test_a_weight_it_cannot_do_is_refused(cuda, random, change, expected):
    stored, x = random(5, 64, 4, 32, True, np.random.default_rng(6)), np.ones((1, 64), np.float32)
    assert cuda.matmul(x, stored)[0] == OK
    status, y = cuda.matmul(x, stored, **change)
    assert status == expected
    assert np.isnan(y).all()


@pytest.mark.parametrize(
    "value", [0.0, 1.0, -2.5, 65504.0, 65519.9, 65520.0, 6e-8, 2.9e-8, 3e-8, 1e-5, 0.33325, np.inf]
)
def test_the_shims_fp16_is_numpys(cuda, random, value):
    # The same sums stored as fp16 and as fp32, which numpy then rounds.
    rng = np.random.default_rng(8)
    stored = random(1, 32, 8, 32, False, rng)
    x = np.full((1, 32), np.float32(value))
    got = cuda.matmul(x, stored, y_type=np.float16)[1]
    with np.errstate(over="ignore"):
        assert np.array_equal(got, cuda.matmul(x, stored)[1].astype(np.float16), equal_nan=True)


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    out = tmp_path_factory.mktemp("edges") / "edges"
    # AddressSanitizer sees a byte past a buffer, UBSan a vector load the GPU would fault on.
    flags = ("-O1", "-g", "-fsanitize=address,alignment,shift", "-fno-sanitize-recover=all")
    source = Path(__file__).parents[2] / "tools" / "gpu_steps" / "edges.cu"  # what the GPU check runs
    return compile_shim(out, *flags, "-x", "c++", str(source))


def test_no_byte_outside_a_buffer_is_touched(checked):
    done = subprocess.run([checked], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[:2000]
    assert done.stdout.strip() == "ran 182 products and 52 look-ups"


@pytest.mark.parametrize("buffer", ["packed", "scales", "zeros", "x", "y", "indices"])
def test_twin_a_buffer_one_element_short_is_seen(checked, buffer):
    done = subprocess.run([checked, buffer], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
