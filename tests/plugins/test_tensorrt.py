"""The TensorRT plugins: called as TensorRT calls them (kernels by the host shim), and loaded by NVIDIA's own registry.

Nothing here runs an engine: that needs TensorRT and a GPU.
"""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from jpq_export.engine.contents import add_device_files
from jpq_export.engine.plugin import PluginError, choose, compile_plugin
from jpq_export.engine.prebuilt import add_prebuilt
from jpq_export.engine.settings import Settings
from jpq_export.format.bundle import hash_file
from jpq_export.numerics.reference import low_bit_gather, low_bit_matmul
from jpq_export.numerics.scheme import TERNARY, kernel_bits
from jpq_export.runtime import native

HERE = Path(__file__).parent
FLOAT, HALF, INT8, INT32, UINT8, INT64 = 0, 1, 2, 3, 5, 8  # nvinfer1::DataType
TYPES = {
    np.dtype(k): v for k, v in (("f4", FLOAT), ("f2", HALF), ("i1", INT8), ("i4", INT32), ("u1", UINT8), ("i8", INT64))
}
TOLERANCE = {np.float32: 2e-6, np.float16: 4e-4}  # as in test_cuda.py
DISPATCH = "tensorrt_dispatch_bindings"


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dims", ctypes.c_int64 * 8),
        ("rank", ctypes.c_int32),
        ("type", ctypes.c_int32),
    )


class Call(ctypes.Structure):
    _fields_ = (
        ("library", ctypes.c_char_p),
        ("op", ctypes.c_char_p),
        *((name, ctypes.c_int32) for name in ("bits", "K", "N", "group_size", "symmetric", "wide_fields")),
        ("tensors", Tensor * 6),
        ("inputs", ctypes.c_int32),
        ("workspace_missing", ctypes.c_int32),
        ("out_dims", ctypes.c_int64 * 8),
        ("out_rank", ctypes.c_int32),
        ("workspace_bytes", ctypes.c_int64),
    )


def tensorrt_headers():
    """TensorRT's headers: JPQ_TENSORRT_INCLUDE, the package kernel-lens, or the system's."""
    folders = [
        os.environ.get("JPQ_TENSORRT_INCLUDE", ""),
        "/usr/include/x86_64-linux-gnu",
        "/usr/include/aarch64-linux-gnu",
    ]
    if spec := importlib.util.find_spec("kernel_lens"):
        folders.insert(1, str(Path(spec.submodule_search_locations[0]) / "include" / "tensorrt"))
    for folder in folders:
        if folder and (Path(folder) / "NvInferRuntime.h").is_file():
            return folder
    pytest.skip("no TensorRT headers: pip install --no-deps kernel-lens==2.0.1, or set JPQ_TENSORRT_INCLUDE")


def cuda_headers():
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    toolkits = {Path(nvcc).parents[1], Path(nvcc).resolve().parents[1], Path("/usr/local/cuda")} if nvcc else set()
    for folder in (
        *(toolkit / "include" for toolkit in sorted(toolkits)),
        Path(sysconfig.get_paths()["purelib"]) / "nvidia",
    ):
        for found in (folder / "cuda_runtime_api.h", *sorted(folder.glob("*/include/cuda_runtime_api.h"))):
            if found.is_file():
                return str(found.parent)
    pytest.skip("no CUDA headers: install the CUDA toolkit")


def compile_with(compiler, out, *arguments):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    done = subprocess.run(
        [compiler, "-std=c++17", "-o", str(out), *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[:4000]
    return out


def host_flags():
    """Warnings are errors in our own sources; NVIDIA's headers are system headers."""
    strict = ("-Wall", "-Wextra", "-Werror", "-Wno-deprecated-declarations")
    return (*strict, "-fPIC", "-fvisibility=hidden", "-isystem", tensorrt_headers(), "-isystem", cuda_headers())


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """The plugin library with kernels that run on the CPU."""
    folder, source = tmp_path_factory.mktemp("tensorrt"), native.sources_folder()
    parts = []
    for name in ("low_bit_plugin", "creators"):
        parts.append(folder / f"{name}.o")
        compile_with("g++", parts[-1], "-O1", "-c", *host_flags(), source / "tensorrt" / f"{name}.cpp")
    shim = ("-O2", "-fPIC", "-Wno-unknown-pragmas", "-x", "c++", f"-I{HERE / 'cuda_shim'}")
    parts.append(compile_with("g++", folder / "kernels.o", "-c", *shim, source / "core" / "low_bit_cuda.cu"))
    return compile_with("g++", folder / "libjpq_tensorrt.so", "-shared", "-Wl,--no-undefined", *parts, "-ldl")


@pytest.fixture(scope="module")
def harness(plugin):
    source, out = HERE / "tensorrt_harness.cpp", plugin.with_name("libharness.so")
    flags = (*(f for f in host_flags() if f not in ("-fvisibility=hidden", "-Werror")), "-O1", "-shared")
    c = ctypes.CDLL(str(compile_with("g++", out, *flags, source, "-ldl")))
    c.harness_log.restype = ctypes.c_char_p

    def run(op, stored, inputs, output, **changes):
        """Step that failed (0: none), the finished call, the plugin's last word; `output` is written."""
        scheme = stored.scheme
        fields = {"bits": kernel_bits(scheme.bits), "K": stored.shape[1], "N": stored.shape[0]}
        fields |= {"group_size": scheme.group_size, "symmetric": scheme.symmetric}
        call = Call(str(plugin).encode(), op.encode(), inputs=len(inputs), **(fields | changes))
        for i, array in enumerate((*inputs, output)):
            dims = (ctypes.c_int64 * 8)(*array.shape)
            call.tensors[i] = Tensor(array.ctypes.data, dims, array.ndim, TYPES[array.dtype])
        return c.harness_run(ctypes.byref(call)), call, c.harness_log().decode()

    return run


def weight_inputs(stored):
    return [part for part in (stored.packed, stored.scales, stored.zeros) if part is not None]


def distance(got, expected):
    return float(np.sqrt(np.mean(np.square(got - expected)) / np.mean(np.square(expected))))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize(
    ("bits", "symmetric", "biased"),
    [
        (4, True, True),
        (3, False, True),
        (6, False, False),
        (TERNARY, True, False),
        (TERNARY, False, True),
        (1, True, True),
    ],
)
def test_a_product_through_build_serialisation_and_run(harness, random, flip, bits, symmetric, biased, rows, dtype):
    rng = np.random.default_rng([int(10 * bits), rows])
    stored = random(9, 1120, bits, 32, symmetric, rng)
    x = rng.normal(size=(1, rows, 1120)).astype(dtype)
    bias = [rng.normal(size=9).astype(dtype)] if biased else []
    y = np.full((1, rows, 9), np.nan, dtype)
    step, call, log = harness("LowBitMatMul", stored, [x, *weight_inputs(stored), *bias], y, wide_fields=rows == 3)
    assert (step, log) == (0, "")
    assert list(call.out_dims[: call.out_rank]) == [1, rows, 9]
    assert call.workspace_bytes == 2 * min(rows, 16) * 9 * 4  # K has two chunks, N is small: both are split
    expected = low_bit_matmul(x[0].astype(np.float64), stored, *bias)
    assert distance(y[0].astype(np.float64), expected) < TOLERANCE[dtype]
    wrong = flip(stored, 8, int(np.abs(x[0]).max(0).argmax()))
    harness("LowBitMatMul", stored, [x, *weight_inputs(wrong), *bias], y)
    assert distance(y[0, :, 8].astype(np.float64), expected[:, 8]) > TOLERANCE[dtype]


@pytest.mark.parametrize("index_type", [np.int32, np.int64])
@pytest.mark.parametrize("bits", [5, TERNARY])
def test_rows_are_looked_up(harness, random, index_type, bits):
    stored = random(11, 96, bits, 32, False, np.random.default_rng(1))
    indices = np.array([[10, 0, 3]], index_type)
    out = np.full((1, 3, 96), np.nan, np.float32)
    step, call, log = harness("LowBitGather", stored, [indices, *weight_inputs(stored)], out)
    assert (step, log) == (0, "")
    assert list(call.out_dims[: call.out_rank]) == [1, 3, 96]
    assert np.array_equal(out, low_bit_gather(indices, stored))
    assert not np.array_equal(out, low_bit_gather(indices[:, ::-1], stored))


def test_packed_bytes_may_be_declared_int8(harness, random):
    rng = np.random.default_rng(2)
    stored, x = random(5, 64, 4, 32, True, rng), rng.normal(size=(2, 64)).astype(np.float32)
    y = np.full((2, 5), np.nan, np.float32)
    assert harness("LowBitMatMul", stored, [x, stored.packed.view(np.int8), stored.scales], y)[0] == 0
    assert distance(y, low_bit_matmul(x.astype(np.float64), stored)) < TOLERANCE[np.float32]


CREATE, CONFIGURE, RUN, FORMAT = 2, 6, 10, 100


@pytest.mark.parametrize(
    ("changes", "step", "word"),
    [
        ({"bits": 9}, CREATE, "bits must be 1 to 8"),
        ({"group_size": 16}, CREATE, "group_size 16 is not a multiple of 32"),
        ({"symmetric": 2}, CREATE, "symmetric"),
        ({"N": 6}, CONFIGURE, ""),
        ({"K": 1184}, CONFIGURE, ""),
        ({"bits": 3}, CONFIGURE, ""),
        ({"bits": 16}, CONFIGURE, ""),
        ({"workspace_missing": 1}, RUN, ""),
    ],
)
def test_what_does_not_fit_is_refused(harness, random, changes, step, word):
    stored = random(5, 1120, 4, 32, True, np.random.default_rng(3))
    x, y = np.ones((2, 1120), np.float32), np.full((2, 5), np.nan, np.float32)
    inputs = [x, *weight_inputs(stored)]
    assert harness("LowBitMatMul", stored, inputs, y)[0] == 0
    y[:] = np.nan
    got, _, log = harness("LowBitMatMul", stored, inputs, y, **changes)
    assert got == step
    assert word in log
    assert np.isnan(y).all()


@pytest.mark.parametrize(("place", "dtype"), [(0, np.int32), (1, np.float16), (2, np.float32), (3, np.float16)])
def test_a_type_it_does_not_take_is_refused(harness, random, place, dtype):
    stored = random(5, 64, 4, 32, True, np.random.default_rng(4))
    tensors = [np.ones((2, 64), np.float32), *weight_inputs(stored), np.ones((2, 5), np.float32)]
    tensors[place] = tensors[place].astype(dtype)
    assert harness("LowBitMatMul", stored, tensors[:-1], tensors[-1])[0] == FORMAT + place


REGISTRY = f"""
import sys
import {DISPATCH} as trt
registry = trt.get_plugin_registry()
ops = ("LowBitMatMul", "LowBitGather")
print([registry.get_creator(op, "1", "jpq") is None for op in ops])
handle = registry.load_library(sys.argv[1])
for op in ops:
    creator = registry.get_creator(op, "1", "jpq")
    print(creator.name, creator.plugin_version, creator.plugin_namespace, [f.name for f in creator.field_names])
print(registry.get_creator("LowBitMatMul", "2", "jpq") is None)
"""


def registered(library):
    """Load a library into NVIDIA's registry; skips without it."""
    if importlib.util.find_spec(DISPATCH) is None:
        pytest.skip("no TensorRT registry: pip install tensorrt-dispatch-cu13-bindings tensorrt-dispatch-cu13-libs")
    done = subprocess.run([sys.executable, "-c", REGISTRY, library], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    fields = "['bits', 'K', 'N', 'group_size', 'symmetric']"
    assert done.stdout.splitlines() == [
        "[True, True]",
        f"LowBitMatMul 1 jpq {fields}",
        f"LowBitGather 1 jpq {fields}",
        "True",
    ]


def test_nvidias_registry_loads_it(plugin):
    registered(plugin)


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """A bundle's sources, where the compilers and headers of a board are; skips where one is missing."""
    tools = {"cmake": shutil.which("cmake"), "nvcc": shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")}
    if missing := [name for name, path in tools.items() if path is None]:
        pytest.skip(f"no {' and '.join(missing)}: the plugin is NOT compiled for a GPU in this run")
    folder = tmp_path_factory.mktemp("bundle")
    add_device_files(folder, native.sources_folder(), tensorrt="10.3", bounds={}, prompt=1, tokens=2)
    return Settings(folder, folder / "device" / "model.engine"), tools


@pytest.fixture(scope="module")
def built(board):
    """The whole plugin as `jpq-export build` compiles it: by its own commands, kernels of every width, for sm_87."""
    settings, tools = board
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMAKE_INCLUDE_PATH", tensorrt_headers())  # on a board they lie where CMake looks
        return compile_plugin(settings, tools, sm=87, machine="here", say=lambda _text: None)


def test_the_whole_plugin_builds_as_on_a_board_and_is_registered(board, built):
    settings, _ = board
    assert built.reason_against(87, "here") is None
    assert built.reason_against(110, "here") == "for sm_87"
    assert choose(settings, {}, sm=87, machine="here") == built  # not compiled a second time
    registered(built.path)


def test_it_holds_code_for_the_gpu_it_was_built_for_only(built):
    triton = importlib.util.find_spec("triton")
    folders = triton.submodule_search_locations if triton else []
    places = [Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump" for folder in folders]
    tool = shutil.which("cuobjdump") or next((str(place) for place in places if place.is_file()), None)
    if tool is None:
        pytest.skip("no cuobjdump, neither CUDA's nor Triton's")
    elf = subprocess.run([tool, "--list-elf", built.path], capture_output=True, text=True, check=True).stdout
    assert "sm_87" in elf
    assert not [line for line in elf.splitlines() if "sm_" in line and "sm_87" not in line]


def test_twin_changed_sources_are_compiled_again_and_broken_ones_said(board, built, monkeypatch):
    settings, tools = board
    source = settings.bundle / "plugins" / "tensorrt" / "creators.cpp"
    whole = source.read_text()
    monkeypatch.setenv("CMAKE_INCLUDE_PATH", tensorrt_headers())
    try:
        source.write_text(whole + "\nbroken\n")
        assert choose(settings, {}, sm=87, machine="here") is None
        with pytest.raises(PluginError, match=r"creators\.cpp.*error"):
            compile_plugin(settings, tools, sm=87, machine="here", say=lambda _text: None)
    finally:
        source.write_text(whole)


def test_no_symbol_of_tensorrt_or_its_registry_is_needed(plugin):
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    symbols = subprocess.run(["nm", "-D", "-C", plugin], capture_output=True, text=True, check=True).stdout.splitlines()
    needed = [line for line in symbols if " U " in line]
    assert needed
    assert not [line for line in needed if "nvinfer" in line or "getPlugin" in line or "getLogger" in line]
    exported = {line.split(" T ")[1] for line in symbols if " T " in line}
    assert {"getCreators", "setLoggerFinder"} <= exported
    assert not [name for name in exported if "jpq_tensorrt::" in name]


def test_the_host_code_compiles_for_aarch64(tmp_path):
    compiler = "aarch64-linux-gnu-g++"
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}: apt-get install g++-aarch64-linux-gnu")
    for name in ("low_bit_plugin", "creators"):
        source = native.sources_folder() / "tensorrt" / f"{name}.cpp"
        built = compile_with(compiler, tmp_path / f"{name}.o", "-O1", "-c", *host_flags(), source)
        assert built.read_bytes()[18:20] == b"\xb7\x00"  # e_machine of an ELF file: EM_AARCH64


LOADER = """
#include <dlfcn.h>
#include <NvInferRuntime.h>
int main(int, char **names) {
  void *library = dlopen(names[1], RTLD_NOW);
  if (!library) return 1;
  using Creators = nvinfer1::IPluginCreatorInterface *const *(*)(int32_t &);
  int32_t count = 0;
  const Creators creators = reinterpret_cast<Creators>(dlsym(library, "getCreators"));
  return creators && creators(count) && count == 2 ? 0 : 2;
}
"""


@pytest.fixture(scope="module")
def thor(tmp_path_factory):
    """The plugin as an export for Thor puts it into two bundles; skips where a tool is missing.

    JPQ_AARCH64_CUDA: folder of libcudart_static.a for aarch64, as the package nvidia-cuda-runtime for it has.
    """
    binaries, said = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JPQ_TENSORRT_INCLUDE", tensorrt_headers())
        for _ in range(2):
            folder = tmp_path_factory.mktemp("bundle")
            add_device_files(folder, native.sources_folder(), tensorrt="10.13", bounds={}, prompt=1, tokens=2)
            records = add_prebuilt(folder, sm=110, tensorrt="10.13", cuda="13.0", say=said.append)
            if "not found" in said[-1]:
                pytest.skip(f"{said[-1]}: the plugin is NOT cross-compiled in this run")
            assert records, said
            binaries.append((folder / records[0]["file"], records[0]))
    return binaries


def test_the_plugin_cross_compiled_for_thor_is_the_same_twice(thor):
    (path, record), (other, second) = thor
    assert path.read_bytes() == other.read_bytes()
    assert record == second
    assert (record["sms"], record["tensorrt"], record["cuda"], record["machine"]) == ([110], 10, 13, "aarch64")
    assert hash_file(path).sha256 == record["sha256"]


def test_the_plugin_cross_compiled_for_thor_loads_in_an_emulator(thor, tmp_path):
    compiler, emulator = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("no qemu-aarch64: the cross-compiled plugin is NOT loaded in this run")
    library = thor[0][0]
    (tmp_path / "loader.cpp").write_text(LOADER)
    flags = ("-isystem", tensorrt_headers(), "-isystem", cuda_headers(), tmp_path / "loader.cpp", "-ldl")
    loader = compile_with(compiler, tmp_path / "loader", *flags)
    root = subprocess.run([compiler, "-print-file-name=libc.so.6"], capture_output=True, text=True, check=True).stdout
    folders = ["-L", str(Path(root.strip()).resolve().parents[1])]  # where the emulator finds ld.so and the C library
    run = [emulator, *folders, str(loader)]
    assert subprocess.run([*run, str(library)], timeout=60, check=False).returncode == 0
    assert subprocess.run([*run, str(loader)], timeout=60, check=False).returncode == 1, "loads anything"
