"""The operators for onnxruntime's CUDA provider: compiled by nvcc for the GPU that is here, kept in the cache.

Used only where onnxruntime has the provider and the driver shows a GPU; `reason_against` says what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jpq_export.cache import cache_root
from jpq_export.engine.cuda import Cuda, CudaError
from jpq_export.runtime import native
from jpq_export.runtime.native import NativeError

PROVIDER = "CUDAExecutionProvider"
LIBRARY = "libjpq_cuda_ops.so"
SOURCES = ("onnxruntime/cuda_ops.cu", "core/low_bit_cuda.cu")
KINDS = (".cu", ".cuh", ".h")
FLAGS = ("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-ldl")
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"
OLDEST_SM = 80  # the many-row kernel's tensor-core instruction


@dataclass(frozen=True, slots=True)
class CudaLibrary:
    """A compiled library and the GPU generation it is for."""

    path: Path
    sm: int


def reason_against() -> str | None:
    """Why there is no GPU for sessions here, in words; None when there is one."""
    import onnxruntime

    if PROVIDER not in onnxruntime.get_available_providers():
        return f"this onnxruntime has no {PROVIDER}; install onnxruntime-gpu instead of onnxruntime"
    try:
        sm = Cuda().sm
    except CudaError as error:
        return str(error)
    if sm < OLDEST_SM:
        return f"the GPU is sm_{sm}, the kernels need sm_{OLDEST_SM} or later"
    return None


def register(options: Any) -> CudaLibrary:
    """Put the operators into onnxruntime's session `options`.

    Raises:
        NativeError: no GPU (see `reason_against`), no nvcc, it fails, or the cache cannot be written.
    """
    if reason := reason_against():
        raise NativeError(f"CUDA kernels: {reason}")
    library = cuda_library(Cuda().sm)
    # For what onnxruntime may put on the CPU all the same; a domain's operators must come from one library.
    options.add_session_config_entry("jpq.cpu_library", str(native.cpu_library().path))
    options.register_custom_ops_library(str(library.path))
    return library


def cuda_library(sm: int) -> CudaLibrary:
    """The library for GPUs of generation `sm`, compiled if it is not in the cache yet; needs nvcc but no GPU.

    A cached file whose sha256 is not the one recorded when it was built is not loaded but built again.

    Raises:
        NativeError: no nvcc, it fails, or the cache cannot be written.
    """
    nvcc = _nvcc()
    if nvcc is None:
        raise NativeError("CUDA kernels: no nvcc; install the CUDA toolkit or put nvcc on PATH")
    folder, flags = native.sources_folder(), (*FLAGS, f"-arch=sm_{sm}")
    home = cache_root() / "native" / _key(folder, nvcc, flags)
    if not native.untouched(home, LIBRARY):
        if (home / LIBRARY).exists():
            native.logger.warning("%s: not the file that was built (sha256 differs); building it again", home / LIBRARY)
        native.logger.warning("compiling the CUDA kernels for sm_%d with %s, once (about a minute)", sm, nvcc)
        native.keep(home, LIBRARY, lambda out: _compile(folder, nvcc, flags, out), {"compiler": nvcc, "flags": flags})
    return CudaLibrary(home / LIBRARY, sm)


def _nvcc() -> str | None:
    return shutil.which(os.environ.get("NVCC", "nvcc")) or shutil.which(USUAL_NVCC)


def _key(folder: Path, nvcc: str, flags: tuple[str, ...]) -> str:
    """Changes with any source, nvcc or its version, or the flags."""
    command = [nvcc, "--version"]
    version = subprocess.run(command, capture_output=True, check=False, timeout=native.TIMEOUT_SECONDS).stdout
    digest = hashlib.sha256(json.dumps([nvcc, flags, LIBRARY]).encode() + version)
    for part in native.FOLDERS:
        for path in sorted(path for path in (folder / part).iterdir() if path.suffix in KINDS):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:24]


def _compile(folder: Path, nvcc: str, flags: tuple[str, ...], out: Path) -> None:
    command = [nvcc, *flags, "-o", str(out), *(str(folder / source) for source in SOURCES)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=native.TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise NativeError(f"CUDA kernels: {nvcc} took more than {native.TIMEOUT_SECONDS} s; try again") from error
    if done.returncode:
        told = done.stderr + done.stdout
        lines = (
            [line for line in told.splitlines() if "error" in line.lower() or "fatal" in line]
            or told.splitlines()
            or ["?"]
        )
        raise NativeError(
            f"CUDA kernels: {nvcc} fails ({lines[0].strip()}); it must know this GPU and its host compiler"
        )
