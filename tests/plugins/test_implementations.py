"""Every implementation of `jpq::LowBitMatMul` this machine has, against the reference in fp64, on the same cases.

All widths, groups of 32 to 512, two or three a row, or one of 576, and five rows, so that no block of 64 codes or tile
of rows comes out even; up to 512 rows of X, fp32 and where taken fp16, outputs that start as NaN. Each output is also
held against the reference of two wrong weights, one code changed or the scales moved by one group (or row): the bound
must see them.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from jpq_export.numerics.affine import QuantizedWeight, store
from jpq_export.numerics.levels import normal_bytes
from jpq_export.numerics.scheme import KERNEL_NORMAL, KERNEL_WIDTHS, Scheme, from_kernel_bits, kernel_bits

CPU = ("avx512-vnni", "avx512", "avx2", "neon", "scalar")
ROWS = (1, 2, 3, 7, 16, 63, 128, 512)
N = 5
GROUPS = {32: 3, 64: 3, 128: 3, 512: 2, 576: 1}  # of a row, by their size
INTERPRETED = "triton", "cuda-shim"  # of long rows these take too long to see more than MOST
MOST = 63
# Relative RMS: an fp32 sum of some hundred terms; a result (or X) rounded to the 11 bits of fp16.
FP32, FP16 = 2e-6, 2.0**-11
TYPES = (np.float32, np.float16)


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A weight, X [512, K], and per type of X the expected Y of this weight and of wrong ones, fp64 [512, N]."""

    stored: QuantizedWeight
    x: np.ndarray
    expected: dict[type, np.ndarray]
    wrong: dict[type, list[np.ndarray]]


def make_case(bits, group_size) -> Case:
    width, k = from_kernel_bits(bits), GROUPS[group_size] * group_size
    rng = np.random.default_rng([group_size, int(10 * width), *([1] if bits > KERNEL_NORMAL else [])])
    symmetric = bits > KERNEL_NORMAL or bool((KERNEL_WIDTHS.index(bits) + group_size // 64) % 2)
    scheme = Scheme.stated(bits, group_size, symmetric=symmetric)
    levels = scheme.max_code + 1
    points = normal_bytes(scheme.bits) if scheme.normal else np.arange(levels, dtype=np.uint8)
    codes = rng.integers(0, levels, (N, k)).astype(np.uint8)
    scales = rng.uniform(0.01, 0.1, (N, GROUPS[group_size])).astype(np.float16)
    zeros = None if scheme.symmetric else rng.integers(0, levels, scales.shape).astype(np.uint8)
    x = rng.normal(size=(ROWS[-1], k)).astype(np.float32)
    x[:, -1] = 1.5  # the changed code is multiplied by something in every row
    stored = store(points[codes], scales, zeros, scheme)
    codes[-1, -1] = (int(codes[-1, -1]) + levels // 2) % levels
    twins = [
        store(points[codes], scales, zeros, scheme),
        replace(stored, scales=np.roll(stored.scales, 1, axis=int(GROUPS[group_size] > 1))),
    ]
    wide = {dtype: x.astype(dtype).astype(np.float64) for dtype in TYPES}
    return Case(
        stored,
        x,
        {dtype: wide[dtype] @ stored.dequantize().astype(np.float64).T for dtype in TYPES},
        {dtype: [wide[dtype] @ twin.dequantize().astype(np.float64).T for twin in twins] for dtype in TYPES},
    )


@pytest.fixture(scope="module")
def cases():
    return {(bits, group_size): make_case(bits, group_size) for bits in KERNEL_WIDTHS for group_size in GROUPS}


def load(path):
    """Another test file's helpers."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def onnx_product(model, library=None):
    """x -> Y of a model of one node, into memory that holds NaN."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if library:
        options.register_custom_ops_library(str(library.path))
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def product(x):
        y, binding = np.full((1, len(x), N), np.nan, np.float32), session.io_binding()
        binding.bind_cpu_input("x", x[None])
        binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
        session.run_with_iobinding(binding)
        return y[0]

    return product


@pytest.fixture(scope="module")
def cuda(tmp_path_factory, weight_of):
    """The CUDA kernels on the host shim: a fiber for every thread, so few rows take longest."""
    module = load(Path(__file__).with_name("test_cuda.py"))
    source = module.native.sources_folder() / "core" / "low_bit_cuda.cu"
    out = tmp_path_factory.mktemp("shim") / "libjpq_shim.so"
    return module.CudaCore(module.compile_shim(out, "-O1", "-fPIC", "-shared", "-x", "c++", str(source)), weight_of)


@pytest.fixture(scope="module")
def triton(conftest_of):
    pytest.importorskip("triton")
    process = conftest_of("kernels").Interpreted()
    yield process
    process.close()


@pytest.fixture
def product_of(request, core_of, tmp_path):
    """`product_of(name, stored)`: a function x -> Y of that implementation, and the types of X it takes."""

    def cpu(name, stored):
        core = core_of(name)
        return lambda x: core.matmul(x, stored, name)[1]

    def body(stored, library=None):
        model = load(Path(__file__).parents[1] / "lower" / "test_functions.py").model_of("LowBitMatMul", stored)
        return onnx_product(model.SerializeToString(), library)

    def interpreted(stored):
        process, names = request.getfixturevalue("triton"), ("packed", "scales", "zeros", "shape")
        arrays = {name: getattr(stored, name) for name in names}
        bits = kernel_bits(stored.scheme.bits, normal=stored.scheme.normal)
        arrays |= {"bits": bits, "group_size": stored.scheme.group_size}
        return lambda x: process.matmul(x, arrays)[0]

    def shim(stored):
        cuda = request.getfixturevalue("cuda")
        return lambda x: cuda.matmul(x, stored)[1]

    def find(name, stored):
        if name in CPU:
            return cpu(name, stored)
        if name == "function-body":
            return body(stored)
        if name == "custom-op":
            return body(stored, request.getfixturevalue("library"))
        return interpreted(stored) if name == "triton" else shim(stored)

    return find


def tolerance(name, rows, dtype, group_size):
    """What the arithmetic loses: Triton multiplies many rows of fp32 as fp16; a group is one fp32 sum, whose rounding
    grows like the root of its terms.
    """
    half = dtype == np.float16 or (name == "triton" and rows > 16)
    return FP16 if half else FP32 * max(1, group_size / 128) ** 0.5


def rows_of(name, bits, group_size):
    """An interpreter chooses among words of levels slowly, code by code."""
    if name == "triton" and bits > KERNEL_NORMAL:
        return (1, 3, 20)
    return ROWS if group_size <= 128 or name not in INTERPRETED else ROWS[: ROWS.index(MOST) + 1]


def distance(got, expected):
    return float(np.sqrt(np.mean(np.square(got - expected)) / np.mean(np.square(expected))))


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", KERNEL_WIDTHS)
@pytest.mark.parametrize("name", [*CPU, "custom-op", "function-body", "triton", "cuda-shim"])
def test_an_implementation_means_the_reference(cases, product_of, name, bits, group_size):
    case = cases[bits, group_size]
    product = product_of(name, case.stored)
    for dtype in TYPES if name in INTERPRETED else (np.float32,):
        for rows in rows_of(name, bits, group_size):
            bound = tolerance(name, rows, dtype, group_size)
            y = product(case.x[:rows].astype(dtype)).astype(np.float64)
            assert distance(y, case.expected[dtype][:rows]) < bound, (rows, dtype)
            for wrong in case.wrong[dtype]:
                assert distance(y, wrong[:rows]) > 4 * bound, (rows, dtype, "a wrong weight would pass")
