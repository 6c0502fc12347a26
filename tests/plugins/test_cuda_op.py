"""The operators for onnxruntime's CUDA provider: run on the CPU by the host shim, compiled by nvcc, registered, chosen.

Nothing here runs on a GPU: the shim's build is an operator for the CPU made of the CUDA kernels.
"""

import ctypes
import logging
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from jpq_export.engine.cuda import CudaError
from jpq_export.errors import BundleError, UsageError
from jpq_export.format.compressed import CompressedModel
from jpq_export.format.spec import LayerSpec
from jpq_export.lower.export import export_onnx
from jpq_export.numerics.affine import store
from jpq_export.numerics.reference import low_bit_gather, low_bit_matmul
from jpq_export.numerics.scheme import TERNARY, Scheme, kernel_bits
from jpq_export.runtime import native, native_cuda
from jpq_export.runtime.cache import CacheLayout, GrowingCache, PassedCache
from jpq_export.runtime.session import OrtModel

ort = pytest.importorskip("onnxruntime")
SHIM = Path(__file__).parent / "cuda_shim"
PLUGINS = native.sources_folder()
TOLERANCE = 2e-6  # an fp32 sum of some hundred terms


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[:3000]


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """The operators out of g++: the CUDA kernels on the CPU."""
    out = tmp_path_factory.mktemp("cuda_ops") / "libshim.so"
    flags = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-unknown-pragmas", f"-I{SHIM}")
    try:
        run("g++", *flags, "-x", "c++", *(PLUGINS / source for source in native_cuda.SOURCES), "-o", out, "-ldl")
    except FileNotFoundError:
        pytest.skip("no g++: the CUDA sources cannot be run on the CPU")
    return out


def session(model, library, cpu_library=None):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    if cpu_library:
        options.add_session_config_entry("jpq.cpu_library", str(cpu_library))
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def one_node(op, stored, bias=None, **changes):
    """A model of one operator, its attributes changed at will."""
    arrays = {"packed": stored.packed, "scales": stored.scales, "zeros": stored.zeros, "bias": bias}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    attributes = {"bits": kernel_bits(stored.scheme.bits), "K": stored.shape[1], "N": stored.shape[0]}
    attributes |= {"group_size": stored.scheme.group_size, "symmetric": int(stored.scheme.symmetric)} | changes
    x_type = TensorProto.FLOAT if op == "LowBitMatMul" else TensorProto.INT64
    graph = helper.make_graph(
        [helper.make_node(op, ["X", *arrays], ["Y"], domain="jpq", **attributes)],
        "one",
        [helper.make_tensor_value_info("X", x_type, None)],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("jpq", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def distance(got, expected):
    return float(np.sqrt(np.mean(np.square(got - expected)) / np.mean(np.square(expected))))


@pytest.mark.parametrize("shape", [(1120,), (1, 1120), (2, 0, 1120), (2, 3, 1120), (20, 1120)])
@pytest.mark.parametrize(("bits", "symmetric"), [(3, True), (3, False), (TERNARY, True), (TERNARY, False), (1, True)])
def test_a_product_inside_onnxruntime(shim, random, flip, shape, bits, symmetric):
    rng = np.random.default_rng(8)
    stored, bias = random(9, 1120, bits, 32, symmetric, rng), rng.normal(size=9).astype(np.float32)
    x = rng.normal(size=shape).astype(np.float32)
    y = session(one_node("LowBitMatMul", stored, bias), shim).run(None, {"X": x})[0]
    expected = low_bit_matmul(x.astype(np.float64), stored, bias)
    assert y.shape == expected.shape
    if y.size:
        assert distance(y, expected) < TOLERANCE
        wrong = flip(stored, 8, int(np.abs(x.reshape(-1, 1120)).max(0).argmax()))
        other = session(one_node("LowBitMatMul", wrong, bias), shim).run(None, {"X": x})[0]
        assert distance(other, expected) > TOLERANCE
        assert distance(session(one_node("LowBitMatMul", stored), shim).run(None, {"X": x})[0], expected) > 1e-3


@pytest.mark.parametrize("bits", [1, TERNARY, 5])
def test_rows_are_looked_up(shim, random, bits):
    stored = random(11, 96, bits, 32, False, np.random.default_rng(1))
    indices = np.array([[10, 0, 3], [-1, -11, 5]])
    rows = session(one_node("LowBitGather", stored), shim).run(None, {"X": indices})[0]
    assert np.array_equal(rows, low_bit_gather(indices, stored))
    assert not np.array_equal(rows, low_bit_gather(indices[::-1], stored))


@pytest.mark.parametrize(
    ("changes", "x", "message"),
    [
        ({"group_size": 16}, 64, "group_size must be a multiple of 32 on a GPU"),
        ({"bits": 9}, 64, "bits, K, N and group_size do not fit"),
        ({"K": 60}, 64, "bits, K, N and group_size do not fit"),
        ({"bits": 4}, 64, "must be .*packed"),
        ({"N": 49}, 64, "must be .*packed"),
        ({"symmetric": 0}, 64, "must be .*zeros"),
        ({}, 32, "last dimension of X must be K"),
    ],
)
def test_what_does_not_fit_is_an_error_not_a_crash(shim, random, changes, x, message):
    stored = random(50, 64, 3, 32, True, np.random.default_rng(9))
    with pytest.raises(Exception, match=f"jpq CUDA: .*{message}"):
        session(one_node("LowBitMatMul", stored, **changes), shim).run(None, {"X": np.ones((1, x), np.float32)})


# ---- choosing it ----


def export(conftest_of, folder, group_size, *, chained=False):
    """A tiny bundle's graph, its groups of a size the GPU's kernels take, or do not."""
    tiny = conftest_of("runtime")
    spec = replace(tiny.SPEC, layers=(LayerSpec(1, 64), LayerSpec(0, 64), LayerSpec(1, 0)))
    rng, quantized = np.random.default_rng(3), {}
    for name, (n, k) in spec.matrices().items():
        codes, scales = rng.integers(0, 8, (n, k)).astype(np.uint8), np.full((n, k // group_size), 0.05, np.float16)
        quantized[name] = store(codes, scales, None, Scheme(3, group_size))
    dense = {name: np.ones(n, np.float32) for name, n in spec.vectors().items()}
    export_onnx(CompressedModel(spec, quantized, dense), folder / "model.onnx", form="custom_op", chained=chained)
    return folder / "model.onnx"


@pytest.fixture
def pretended(shim, monkeypatch):
    """As if there were a GPU: the shim's operators in the place of the GPU's, the CPU's provider in that of CUDA's."""

    def register(options):
        options.register_custom_ops_library(str(shim))
        return native_cuda.CudaLibrary(shim, 87)

    monkeypatch.setattr(native_cuda, "reason_against", lambda: None)
    monkeypatch.setattr(native_cuda, "register", register)
    monkeypatch.setattr(native_cuda, "PROVIDER", "CPUExecutionProvider")
    monkeypatch.delenv("JPQ_KERNELS")
    original = ort.InferenceSession

    def start(path, options, providers):
        return original(path, options, providers=["CPUExecutionProvider"])  # not twice, and without its options

    monkeypatch.setattr(ort, "InferenceSession", start)


def test_a_session_takes_the_gpu_and_says_so(pretended, conftest_of, tmp_path, monkeypatch):
    path = export(conftest_of, tmp_path, 32)
    model, ids = OrtModel(path, threads=1), np.array([[3, 4, 5, 6]])
    assert model.path == "onnxruntime CUDA, jpq kernels (sm_87), activations in fp32"
    assert model.device == "cuda"
    monkeypatch.setenv("JPQ_KERNELS", "off")
    plain = OrtModel(path, threads=1)
    assert "CUDA" not in plain.path
    assert plain.device == "cpu"
    got, expected = model.forward(ids).logits, plain.forward(ids).logits
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    assert not np.array_equal(got, expected), "the same operators twice"
    monkeypatch.delenv("JPQ_KERNELS")
    assert "CUDA" not in OrtModel(path, threads=1, device="cpu").path


def test_a_graph_for_a_cpu_stays_there(pretended, conftest_of, tmp_path, caplog):
    path = export(conftest_of, tmp_path, 32, chained=True)
    model = OrtModel(path, threads=1)
    assert model.device == "cpu"
    assert "the graph was written for a CPU" in caplog.text
    with pytest.raises(UsageError, match="cannot run on a GPU: the graph was written for a CPU"):
        OrtModel(path, threads=1, device="cuda")


def test_a_cache_that_is_passed_on_is_the_one_that_grows(pretended, conftest_of, tmp_path):
    path = export(conftest_of, tmp_path, 32)
    on_gpu, on_cpu = OrtModel(path, threads=1), OrtModel(path, threads=1, device="cpu")
    passed, growing = on_gpu.new_cache(), on_cpu.new_cache()
    assert isinstance(passed, PassedCache)
    assert isinstance(growing, GrowingCache)
    passed._device = "cpu"  # where onnxruntime's outputs are to stay: it has no GPU here
    for ids in ([3, 4, 5], [6], [7]):
        got, expected = (m.step(np.array([ids]), c) for m, c in ((on_gpu, passed), (on_cpu, growing)))
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    for name in on_cpu.cache.parts:
        np.testing.assert_allclose(passed.rows(name), growing.rows(name), rtol=1e-3, atol=1e-4)
    assert np.abs(on_cpu.step(np.array([[8]]), growing) - expected).max() > 1e-2


def test_a_gpu_that_does_not_work_is_a_warning_or_an_error(pretended, conftest_of, tmp_path, caplog):
    path = export(conftest_of, tmp_path, 16)  # groups the GPU's kernels refuse
    with caplog.at_level(logging.WARNING):
        assert OrtModel(path, threads=1).device == "cpu"
    assert "group_size must be a multiple of 32 on a GPU" in caplog.text
    assert "the CPU computes instead" in caplog.text
    with pytest.raises(UsageError, match=r"cannot run on a GPU: .*multiple of 32") as caught:
        OrtModel(path, threads=1, device="cuda")
    assert "\n" not in str(caught.value)


def test_without_the_provider_the_cpu_computes_and_asking_for_the_gpu_says_why(
    conftest_of, tmp_path, caplog, monkeypatch
):
    monkeypatch.delenv("JPQ_KERNELS")
    monkeypatch.setattr(native, "register", lambda _options, _activations: None)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    path = export(conftest_of, tmp_path, 32)
    assert OrtModel(path, threads=1).device == "cpu"
    assert caplog.text == ""
    with pytest.raises(UsageError, match="no CUDAExecutionProvider; install onnxruntime-gpu"):
        OrtModel(path, threads=1, device="cuda")
    with pytest.raises(ValueError, match="'auto', 'cpu' or 'cuda', got 'gpu'"):
        OrtModel(path, threads=1, device="gpu")
    with pytest.raises(BundleError):
        OrtModel(tmp_path / "none.onnx", threads=1)


class Driver:
    """The CUDA driver as `Cuda` shows it."""

    def __init__(self, sm):
        self.sm = sm


def no_driver():
    raise CudaError("CUDA driver: libcuda.so.1 not found")


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (no_driver, r"libcuda\.so\.1 not found"),
        (lambda: Driver(75), "the GPU is sm_75, the kernels need sm_80 or later"),
        (lambda: Driver(87), None),
    ],
)
def test_the_driver_is_asked_and_not_onnxruntime_alone(monkeypatch, driver, reason):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(native_cuda, "Cuda", driver)
    found = native_cuda.reason_against()
    assert (found is None) if reason is None else re.search(reason, found)


# ---- compiling it ----


@pytest.fixture
def nvcc(monkeypatch, tmp_path):
    """A stand-in for nvcc that only writes a file."""
    path = tmp_path / "nvcc"
    path.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\nwhile [ "$1" != -o ]; do shift; done\necho library > "$2"\n'
    )
    path.chmod(0o755)
    monkeypatch.setenv("NVCC", str(path))
    monkeypatch.setenv("JPQ_CACHE", str(tmp_path / "cache"))
    return path


def test_it_is_compiled_once_a_gpu_and_again_when_touched(nvcc, caplog):
    first = native_cuda.cuda_library(87)
    assert first.path.read_text() == "library\n"
    assert caplog.text.count("compiling the CUDA kernels for sm_87") == 1
    assert native_cuda.cuda_library(87) == first
    assert native_cuda.cuda_library(110).path != first.path
    assert caplog.text.count("compiling") == 2
    first.path.write_text("touched")
    assert native_cuda.cuda_library(87).path.read_text() == "library\n"
    assert "sha256 differs" in caplog.text


def test_nvcc_that_fails_or_is_missing_is_one_line(nvcc, monkeypatch):
    nvcc.write_text("#!/bin/sh\necho \"nvcc fatal : Unsupported gpu architecture 'sm_999'\" >&2\nexit 1\n")
    with pytest.raises(native.NativeError, match=r"CUDA kernels: .*fails \(nvcc fatal.*sm_999") as caught:
        native_cuda.cuda_library(999)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("NVCC", "no-such-nvcc")
    monkeypatch.setattr(native_cuda, "USUAL_NVCC", "no-such-nvcc")
    with pytest.raises(native.NativeError, match="no nvcc; install the CUDA toolkit"):
        native_cuda.cuda_library(87)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Out of nvcc: as shipped, and one that takes it for granted that there is a GPU."""
    nvcc, folder = native_cuda._nvcc(), tmp_path_factory.mktemp("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: the CUDA operators cannot be compiled here")
    flags = ("-std=c++17", "-arch=sm_87", "-Xcompiler", "-fPIC,-fvisibility=hidden")
    ops, core = (PLUGINS / source for source in native_cuda.SOURCES)
    run(nvcc, *flags, "-O0", "-c", core, "-o", folder / "core.o")
    built = {}
    for name, define in (("shipped", ()), ("assumed", ("-DJPQ_ASSUME_GPU",))):
        run(nvcc, *flags, *define, "-c", ops, "-o", folder / f"{name}.o")
        built[name] = folder / f"lib{name}.so"
        run(nvcc, "-shared", folder / f"{name}.o", folder / "core.o", "-o", built[name], "-ldl")
    return built


def logits(run_session):
    ids = np.array([[3, 4, 5, 6]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(4)[None]}
    feeds |= {f"past.{name}": value for name, value in CacheLayout.of(run_session).none(1).items()}
    return run_session.run(["logits"], feeds)[0]


def test_the_compiled_library_loads_and_leaves_a_session_without_a_gpu_alone(compiled, library, conftest_of, tmp_path):
    path = export(conftest_of, tmp_path, 32)
    for built in compiled.values():
        assert ctypes.CDLL(str(built)).RegisterCustomOps
    expected = logits(session(path, library.path))
    # No GPU is seen: it registers nothing, and the function bodies compute.
    assert distance(logits(session(path, compiled["shipped"])), expected) < 0.1
    # As on a machine with one, where onnxruntime puts all on the CPU: the CPU's kernels compute, but for attention's.
    assert distance(logits(session(path, compiled["assumed"], library.path)), expected) < TOLERANCE
    assert distance(logits(session(path, compiled["shipped"])), expected) > TOLERANCE


def test_twin_operators_for_a_gpu_alone_break_such_a_session(compiled, conftest_of, tmp_path):
    path = export(conftest_of, tmp_path, 32)
    with pytest.raises(Exception, match="LowBit"):
        session(path, compiled["assumed"])
    with pytest.raises(Exception, match="cannot be loaded"):
        session(path, compiled["assumed"], tmp_path / "none.so")
