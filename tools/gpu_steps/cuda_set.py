"""The CUDA kernels of plugins/core: compiled for the GPU that is there, called through their C interface."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch

from gpu_steps.cases import CUT, FP32_SUMS, Rounding, Shape, Stored
from gpu_steps.correctness import check_all
from gpu_steps.outcome import CannotRun, Outcome, Settings

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "plugins" / "core"
SHIM = ROOT / "tests" / "plugins" / "cuda_shim"
FLOATS = {torch.float32: 0, torch.float16: 1}  # jpq_float
FEW_ROWS = 16  # JPQ_CUDA_FEW_ROWS
X_BITS = 2.0**-22  # fp32 X as two fp16 numbers
COMPILE_SECONDS = 540


class Weight(ctypes.Structure):
    """`jpq_weight`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("n", "k")),
        *((name, ctypes.c_int32) for name in ("bits", "group_size")),
    )


class Product(ctypes.Structure):
    """`jpq_cuda_product`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "x", "bias", "y", "workspace")),
        ("workspace_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("x_type", "bias_type", "y_type", "path")),
    )


class Lookup(ctypes.Structure):
    """`jpq_cuda_lookup`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "indices", "out", "stream")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("index_bytes", "out_type")),
    )


def find_nvcc() -> str:
    """Nvcc from PATH or the usual folder; CannotRun where there is none."""
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not found:
        raise CannotRun("no nvcc: install the CUDA toolkit or put nvcc on PATH")
    return found


def compiled_for_this_gpu(source: Path, out: Path, *flags: str) -> Path:
    """`source` compiled by nvcc for the GPU that torch sees; AssertionError with nvcc's words when it fails."""
    major, minor = torch.cuda.get_device_capability()
    flags = ("-std=c++17", "-O3", "-lineinfo", f"-arch=sm_{major}{minor}", f"-I{CORE}", *flags)
    return _compiled(find_nvcc(), source, out, flags)


def compiled_for_the_cpu(source: Path, out: Path, *flags: str) -> Path:
    """`source` compiled by g++ with the host shim: the same code, without a GPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise CannotRun("no g++: the CUDA sources cannot be rehearsed on the CPU")
    return _compiled(compiler, source, out, ("-std=c++17", "-O2", "-w", "-x", "c++", f"-I{SHIM}", f"-I{CORE}", *flags))


def _compiled(compiler: str, source: Path, out: Path, flags: tuple[str, ...]) -> Path:
    command = [compiler, *flags, "-o", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_SECONDS)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise AssertionError(f"{Path(compiler).name} cannot compile {source.name}: {lines[0].strip()}")
    return out


def built_library(settings: Settings) -> Path:
    """The kernels as a shared library in the scratch folder, built once for all steps."""
    source, out = CORE / "low_bit_cuda.cu", Path(settings.scratch) / "libjpq_cuda.so"
    if out.exists():
        return out
    if settings.rehearse:
        return compiled_for_the_cpu(source, out, "-fPIC", "-shared")
    return compiled_for_this_gpu(source, out, "-Xcompiler", "-fPIC", "-shared")


class CudaKernels:
    """`jpq_cuda_matmul` and `jpq_cuda_gather` on torch's tensors and its current stream."""

    def __init__(self, library: Path) -> None:
        self.c = ctypes.CDLL(str(library))
        self.c.jpq_cuda_matmul_workspace.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self.c.jpq_cuda_matmul_workspace.restype = ctypes.c_size_t

    def matmul(self, x: torch.Tensor, weight: Stored, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """See `Kernels`; the workspace starts as NaN as well."""
        described = describe(weight)
        count = self.c.jpq_cuda_matmul_workspace(ctypes.byref(described), len(x))
        workspace = torch.full((count // 4,), float("nan"), device=x.device)
        self.queue(described, x, bias, out, workspace)

    def queue(
        self,
        described: Weight,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        workspace: torch.Tensor,
    ) -> None:
        """`matmul` with everything made beforehand, for timing."""
        product = Product(
            *(ctypes.addressof(described), x.data_ptr(), address(bias), out.data_ptr(), address(workspace)),
            *(workspace.numel() * 4, stream(x), len(x)),
            *(FLOATS[x.dtype], 0 if bias is None else FLOATS[bias.dtype], FLOATS[out.dtype], 0),
        )
        status = self.c.jpq_cuda_matmul(ctypes.byref(product))
        assert status == 0, f"jpq_cuda_matmul returned {status}"

    def workspace(self, described: Weight, rows: int, device: str) -> torch.Tensor:
        """Fp32 numbers a product of up to `rows` rows asks for."""
        return torch.empty(self.c.jpq_cuda_matmul_workspace(ctypes.byref(described), rows) // 4, device=device)

    def gather(self, indices: torch.Tensor, weight: Stored, out: torch.Tensor) -> None:
        """See `Kernels`."""
        described = describe(weight)
        addresses = ctypes.addressof(described), indices.data_ptr(), out.data_ptr(), stream(indices)
        lookup = Lookup(*addresses, indices.numel(), indices.element_size(), FLOATS[out.dtype])
        status = self.c.jpq_cuda_gather(ctypes.byref(lookup))
        assert status == 0, f"jpq_cuda_gather returned {status}"

    def rounding(self, shape: Shape) -> Rounding:
        """Many rows run on tensor cores; fp32 X loses what two fp16 numbers cannot hold."""
        if shape.rows <= FEW_ROWS:
            return FP32_SUMS
        products = 1 if shape.dtype == "fp16" else 2
        return Rounding(0.0 if shape.dtype == "fp16" else X_BITS, products * shape.group_size / 16 * CUT)


def describe(weight: Stored) -> Weight:
    """The C struct; the tensors must outlive it."""
    tensors = (weight.packed, weight.scales, weight.zeros)
    return Weight(*(address(tensor) for tensor in tensors), *weight.shape, weight.bits, weight.group_size)


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor lies; None for none or an empty one."""
    return None if tensor is None or not tensor.numel() else tensor.data_ptr()


def stream(tensor: torch.Tensor) -> int | None:
    """Torch's current stream of the tensor's GPU; None on the CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else None


def run(settings: Settings) -> Outcome:
    """The step `cuda`."""
    return check_all(CudaKernels(built_library(settings)), settings)
