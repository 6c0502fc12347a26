"""What this board is: GPU, TensorRT, memory, disk, build tools. Only looks; what is missing is said, not raised."""

from __future__ import annotations

import importlib
import platform
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jpq_export.engine.cuda import Cuda, CudaError

MODEL = Path("/proc/device-tree/model")
JETPACK = Path("/etc/nv_tegra_release")
MEMORY = Path("/proc/meminfo")
NVCC_FOLDERS = ("/usr/local/cuda/bin",)  # JetPack installs nvcc there and leaves it off the PATH
TOOLS = ("cmake", "nvcc")


@dataclass(frozen=True, slots=True)
class Device:
    """A board as found. `sm` and `tensorrt` are None when absent, and `*_missing` says why.

    `free_memory_bytes` is what Linux can give without swapping (MemAvailable): on Jetson the GPU shares it.
    `tools`: full paths of cmake and nvcc where they are.
    """

    board: str
    machine: str
    python: str
    free_memory_bytes: int | None
    free_disk_bytes: int
    sm: int | None = None
    gpu: str | None = None
    cuda: str | None = None
    gpu_missing: str | None = None
    tensorrt: str | None = None
    tensorrt_missing: str | None = None
    release: str | None = None
    tools: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For device.json."""
        return asdict(self)


def read_device(out: Path) -> Device:
    """Describe this machine; `out` is where the engine will be written."""
    gpu = _gpu()
    module, missing = import_tensorrt()
    return Device(
        board=_text(MODEL) or platform.node() or "unknown",
        machine=platform.machine(),
        python=platform.python_version(),
        free_memory_bytes=free_memory(),
        free_disk_bytes=shutil.disk_usage(_existing(out)).free,
        tensorrt=getattr(module, "__version__", None),
        tensorrt_missing=missing,
        release=(_text(JETPACK) or "").split(", GCID")[0].removeprefix("# ") or None,
        tools={name: path for name in TOOLS if (path := find_tool(name))},
        **gpu,
    )


def import_tensorrt(name: str = "tensorrt") -> tuple[Any, str | None]:
    """TensorRT's module, or another of it; None and why it cannot be imported."""
    try:
        return importlib.import_module(name), None
    except ImportError as error:  # also a module whose libnvinfer is missing
        return None, str(error).splitlines()[0]


def free_memory(path: Path = MEMORY) -> int | None:
    """MemAvailable in bytes; None where the system does not say."""
    for line in (_text(path) or "").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def find_tool(name: str) -> str | None:
    """Full path of a program, CUDA's own folder included."""
    return shutil.which(name) or next((p for f in NVCC_FOLDERS if (p := shutil.which(name, path=f))), None)


def _gpu() -> dict[str, Any]:
    try:
        cuda = Cuda()
        return {"sm": cuda.sm, "gpu": cuda.name, "cuda": cuda.version}
    except CudaError as error:
        return {"gpu_missing": str(error)}


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return None


def _existing(path: Path) -> Path:
    """The path or the nearest folder above that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
