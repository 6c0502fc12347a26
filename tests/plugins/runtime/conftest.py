"""The C runtime compiled with the sanitizers into one program, tiny bundles for it, a stand-in for a GPU."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from jpq_export.runtime import native

HERE = Path(__file__).parent
FLAGS = ("-std=c99", "-D_POSIX_C_SOURCE=200809L", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")
CPP = ("-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


@pytest.fixture(scope="session")
def onnxruntime_library():
    """The shared library inside the installed wheel."""
    capi = Path(pytest.importorskip("onnxruntime").__file__).parent / "capi"
    found = sorted(capi.glob("libonnxruntime.so*"))
    return found[0] if found else pytest.skip(f"no libonnxruntime.so in {capi}")


def compile_runtime(folder, *flags):
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    source, out = native.sources_folder() / "runtime", folder / "harness"
    files = [Path(__file__).with_name("harness.c"), *sorted((source / "src").glob("*.c"))]
    command = ["gcc", *FLAGS, *flags, f"-I{source / 'include'}", *files, "-o", out, "-ldl", "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture
def plain_harness(tmp_path):
    """The program without the sanitizers, which keep a record of every stack."""
    return compile_runtime(tmp_path)


@pytest.fixture(scope="session")
def harness(tmp_path_factory, onnxruntime_library):
    """`harness("ids", kernels, folder, ...)`: the finished process."""
    out = compile_runtime(tmp_path_factory.mktemp("harness"), *SANITIZE)

    def run(what, kernels, folder, *arguments, input=None, **environment):
        # The kernels' library leaves its operator domain to the process: leaks are looked for without it.
        sanitizer = {"ASAN_OPTIONS": f"detect_leaks={int(kernels == 'none')}"}
        return subprocess.run(
            [out, what, onnxruntime_library, kernels, folder, *map(str, arguments)],
            capture_output=True,
            input=input,
            timeout=200,
            env={**os.environ, **sanitizer, **environment},
        )

    return run


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory, conftest_of):
    """A finished bundle; do not change it."""
    return conftest_of("runtime").write_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def own_bundle(bundle_folder, tmp_path):
    """A bundle of one's own."""
    return Path(shutil.copytree(bundle_folder, tmp_path / "own"))


@pytest.fixture(scope="session")
def stand_in():
    """What test files cannot import: stand_in.py."""
    return module(HERE / "stand_in.py")


def module(path):
    place = importlib.util.spec_from_file_location(path.stem, path)
    assert place
    assert place.loader
    loaded = importlib.util.module_from_spec(place)
    place.loader.exec_module(loaded)
    return loaded


def finish(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def nvidia_headers():
    """Compiler options for TensorRT's and CUDA's headers; skips without them."""
    found = module(HERE.parent / "test_tensorrt.py")
    return ("-isystem", found.tensorrt_headers(), "-isystem", found.cuda_headers())


@pytest.fixture(scope="session")
def gpu(nvidia_headers, stand_in, tmp_path_factory):
    """A folder with the stand-in under the names of the driver and of TensorRT."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "all.cpp").write_text("#include <NvInferRuntime.h>\n")
    text = finish("g++", "-std=c++17", "-E", "-P", *nvidia_headers, folder / "all.cpp")
    (folder / "fake_stubs.h").write_text(stand_in.stub_classes(text))
    quiet = ("-Wno-deprecated-declarations", "-Wno-unused-parameter")
    flags = ("-std=c++17", *CPP, *quiet, "-fPIC", "-shared", f"-I{HERE}", f"-I{folder}", *nvidia_headers)
    finish("g++", *flags, HERE / "fake_tensorrt.cpp", HERE / "fake_cuda.cpp", "-o", folder / "libcuda.so.1")
    (folder / "libnvinfer.so.10").symlink_to("libcuda.so.1")
    return folder


@pytest.fixture(scope="session")
def tensorrt_harness(nvidia_headers, tmp_path_factory):
    """harness.c with the runtime, TensorRT backend included, under the sanitizers."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    folder, source = tmp_path_factory.mktemp("backend"), native.sources_folder() / "runtime"
    c = (*FLAGS, *SANITIZE, "-DJPQ_HAVE_TENSORRT", f"-I{source / 'include'}")
    for path in (HERE / "harness.c", *sorted(source.glob("src/*.c")), *sorted(source.glob("src/tensorrt/*.c"))):
        finish("gcc", *c, "-c", path, "-o", folder / f"{path.stem}.o")
    cpp = ("-std=c++17", *CPP, *SANITIZE, "-fno-exceptions", "-fno-rtti", "-Wno-deprecated-declarations")
    finish("g++", *cpp, *nvidia_headers, "-c", source / "src/tensorrt/trt_engine.cpp", "-o", folder / "trt_engine.o")
    finish("g++", *SANITIZE, "-pthread", *sorted(folder.glob("*.o")), "-o", folder / "harness", "-ldl", "-lm")
    return folder / "harness"


@pytest.fixture
def device_bundle(stand_in, conftest_of, tmp_path):
    """A bundle with the stand-in's engine in device/, as `jpq-export build` leaves one."""
    return stand_in.write_bundle(tmp_path / "bundle", conftest_of("engine").SPEC, conftest_of("runtime"))


@pytest.fixture
def backend(tensorrt_harness, gpu, tmp_path):
    """`backend("ids", folder, count, *ids, library="", kernels="", **environment)`: the process and recorded calls."""
    log = tmp_path / "calls"

    def run(what, folder, *arguments, library="", kernels="", **environment):
        log.write_text("")
        own = {"LD_LIBRARY_PATH": str(gpu), "FAKE_LOG": str(log), **environment}
        command = [tensorrt_harness, what, library, kernels, folder, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, timeout=200, env={**os.environ, **own}, check=False)
        return done, log.read_text().splitlines()

    return run
