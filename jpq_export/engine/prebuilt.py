"""The TensorRT plugin compiled while exporting, for an aarch64 board, where the cross compilers for it are at hand.

The board uses it when its GPU, TensorRT and CUDA driver are those it was made for, and compiles the sources otherwise.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jpq_export.engine.device import find_tool
from jpq_export.engine.plugin import ABI, BUILD_SECONDS, LIBRARY, PluginError
from jpq_export.format.bundle import hash_file

FOLDER = "plugins/prebuilt"
MACHINE, COMPILER = "aarch64", "aarch64-linux-gnu-g++"
TENSORRT_INCLUDE, CUDA_LIBRARIES = "JPQ_TENSORRT_INCLUDE", "JPQ_AARCH64_CUDA"  # environment: where to look first
HEADER_FOLDERS = ("/usr/include/aarch64-linux-gnu", "/usr/include/x86_64-linux-gnu", "/usr/include")
TOOLKITS = Path("/usr/local")  # where NVIDIA's packages put cuda-12.6 and others
RUNTIME = "libcudart_static.a"
EM_AARCH64 = b"\xb7\x00"
# Ubuntu 22.04's, which JetPack 6 is; JetPack 7 has newer ones. A library that needs more would not load on the board.
NEWEST = {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13)}


@dataclass(frozen=True, slots=True)
class CrossTools:
    """What compiles for the board. `cuda`: major version of nvcc and of the runtime that goes into the library."""

    nvcc: str
    compiler: str
    cuda: int
    tensorrt_include: Path
    cuda_include: Path
    runtime: Path


def add_prebuilt(
    folder: Path, *, sm: int, tensorrt: str, cuda: str | None, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Compile the sources of the bundle `folder` for a board; records for the manifest, none when tools are missing.

    `sm`, `tensorrt`, `cuda`: the target's. `say` gets a line for each step.
    """
    shutil.rmtree(folder / FOLDER, ignore_errors=True)  # of a killed run
    try:
        tools = find_cross_tools(tensorrt=tensorrt, cuda=cuda)
        say(f"compiling the plugin for {MACHINE}, sm_{sm} (about half a minute)")
        path = cross_compile(folder, tools, sm=sm)
    except PluginError as error:
        say(f"no prebuilt plugin in the bundle ({error}): the board compiles its sources")
        return []
    say(f"plugin compiled for {MACHINE}, sm_{sm}, CUDA {tools.cuda}: {path.stat().st_size / 1e6:.1f} MB, not run")
    entry = {"file": path.relative_to(folder).as_posix(), "sha256": hash_file(path).sha256, "sms": [sm], "abi": ABI}
    return [{**entry, "machine": MACHINE, "tensorrt": major_of(tensorrt), "cuda": tools.cuda}]


def major_of(version: str) -> int:
    """'10.3' -> 10."""
    return int(version.split(".")[0])


def find_cross_tools(*, tensorrt: str, cuda: str | None) -> CrossTools:
    """Compilers, headers and CUDA runtime for a board; PluginError lists everything that is missing, in one line."""
    if cuda is None:
        raise PluginError("the target file names no cuda version")
    need = major_of(cuda)
    nvcc, compiler, include = _nvcc(need), shutil.which(COMPILER), _tensorrt_include(major_of(tensorrt))
    toolkit = Path(nvcc).resolve().parents[1] if nvcc else Path("/usr/local/cuda")
    # NVIDIA has two aarch64 platforms; the boards moved from one to the other with CUDA 13.
    platform = "sbsa-linux" if need > 12 else "aarch64-linux"
    places = (os.environ.get(CUDA_LIBRARIES), toolkit / "targets" / platform / "lib")
    runtime = next((file for place in places if place and (file := Path(place) / RUNTIME).is_file()), None)
    missing = {
        f"nvcc of CUDA {need}": nvcc,
        f"{COMPILER} (apt install g++-aarch64-linux-gnu)": compiler,
        f"headers of TensorRT {major_of(tensorrt)} (set {TENSORRT_INCLUDE})": include,
        f"{RUNTIME} for aarch64 (apt install cuda-cross-aarch64 or -sbsa, or set {CUDA_LIBRARIES})": runtime,
    }
    if absent := [name for name, found in missing.items() if found is None]:
        raise PluginError("not found: " + ", ".join(absent))
    assert nvcc
    assert compiler
    assert include
    assert runtime
    return CrossTools(nvcc, compiler, need, include, toolkit / "include", runtime)


def _nvcc(major: int) -> str | None:
    """The first nvcc of this major version, in its toolkit: another one's CUDA runtime asks for another driver."""
    installed = sorted(str(path) for path in TOOLKITS.glob("cuda*/bin/nvcc"))
    for path in (find_tool("nvcc"), *installed):
        headers = Path(path).resolve().parents[1] / "include" / "cuda_runtime.h" if path else None
        if path and headers and headers.is_file() and f"release {major}." in _output([path, "--version"]):
            return path
    return None


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _tensorrt_include(major: int) -> Path | None:
    """Folder of TensorRT's headers of this major version."""
    for place in (os.environ.get(TENSORRT_INCLUDE), *HEADER_FOLDERS):
        folder = Path(place or "/nowhere")
        if not (folder / "NvInferRuntime.h").is_file() or not (folder / "NvInferVersion.h").is_file():
            continue
        text = (folder / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
        if re.search(rf"#define (NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) {major}\b", text):
            return folder
    return None


def commands(tools: CrossTools, sources: Path, folder: Path, *, sm: int) -> list[list[str]]:
    """What `cross_compile` runs: kernels, host code and library, with the options of the CMake files."""
    kernels = [
        "-std=c++17",
        "-O3",
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden",
        *f"-gencode arch=compute_{sm},code=sm_{sm}".split(),
    ]
    host = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wno-deprecated-declarations"]
    include = ["-isystem", str(tools.tensorrt_include), "-isystem", str(tools.cuda_include)]
    out = [[tools.nvcc, "-ccbin", tools.compiler, *kernels, f"-I{tools.cuda_include}"]]
    out[0] += ["-c", str(sources / "core" / "low_bit_cuda.cu"), "-o", str(folder / "kernels.o")]
    for path in sorted((sources / "tensorrt").glob("*.cpp")):
        out.append([tools.compiler, *host, *include, "-c", str(path), "-o", str(folder / f"{path.stem}.o")])
    objects = [str(folder / "kernels.o"), *(command[-1] for command in out[1:])]
    # -s: nvcc's local names hold random parts, and the same inputs are to give the same bytes.
    link = ["-shared", "-s", "-Wl,--no-undefined", "-Wl,--exclude-libs,ALL", *objects, str(tools.runtime)]
    return [*out, [tools.compiler, *link, "-ldl", "-lpthread", "-lrt", "-o", str(folder / LIBRARY)]]


def cross_compile(bundle: Path, tools: CrossTools, *, sm: int) -> Path:
    """Put the library into the bundle; PluginError: a compiler's first error, or no board could load it."""
    target = bundle / FOLDER / f"{MACHINE}-sm_{sm}" / LIBRARY
    with tempfile.TemporaryDirectory() as folder:
        for command in commands(tools, bundle / "plugins", Path(folder), sm=sm):
            _run(command)
        built = Path(folder) / LIBRARY
        if reason := reason_against(built.read_bytes()):
            raise PluginError(f"the library {reason}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, target)
    return target


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PluginError(f"{command[0]} did not finish: {error}") from error
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line.lower()]
        raise PluginError(f"{Path(command[0]).name} fails: {(lines or [f'exit code {done.returncode}'])[0].strip()}")


def reason_against(content: bytes) -> str | None:
    """Why no board would load a library: another processor, or symbols newer than its system has."""
    if content[:4] != b"\x7fELF" or content[18:20] != EM_AARCH64:
        return f"is not for {MACHINE}"
    for name, version in re.findall(rb"\b(GLIBC|GLIBCXX|CXXABI)_(\d+(?:\.\d+)+)\b", content):
        newest = NEWEST[name.decode()]
        if tuple(map(int, version.split(b"."))) > newest:
            has = ".".join(map(str, newest))
            return f"needs {name.decode()} {version.decode()}, and boards have {has}; use an older {COMPILER}"
    return None
