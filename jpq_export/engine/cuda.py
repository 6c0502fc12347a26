"""The few CUDA driver calls the device side needs, through ctypes: no CUDA package is needed on the board."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from jpq_export.errors import JpqError

LIBRARY = "libcuda.so.1"
MAJOR, MINOR = 75, 76  # CUdevice_attribute: compute capability
NAME_BYTES = 128
INSTALL = "it comes with JetPack (elsewhere with the NVIDIA driver); inside a container start it with --runtime nvidia"


class CudaError(JpqError):
    """There is no usable CUDA driver, or a call of it failed."""


class Cuda:
    """The first GPU. Raises CudaError when the driver or the GPU is missing."""

    def __init__(self, library: Any = None) -> None:
        """Load the driver; `library` stands in for it in tests."""
        try:
            self._library = library if library is not None else ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise CudaError(f"CUDA driver: {LIBRARY} not found; {INSTALL}") from error
        self._device = ctypes.c_int()
        self._call("cuInit", ctypes.c_uint(0))
        self._call("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(0))
        self._stream = ctypes.c_void_p()

    def _call(self, name: str, *arguments: Any) -> None:
        """Call a driver function; they all return 0 for success."""
        code = getattr(self._library, name)(*arguments)
        if code:
            raise CudaError(f"CUDA driver: {name} failed with error {code}; try nvidia-smi or tegrastats")

    @property
    def name(self) -> str:
        """The GPU's name."""
        text = ctypes.create_string_buffer(NAME_BYTES)
        self._call("cuDeviceGetName", text, ctypes.c_int(NAME_BYTES), self._device)
        return text.value.decode(errors="replace")

    @property
    def sm(self) -> int:
        """Compute capability without the dot: 87 for Orin."""
        major, minor = (self._attribute(which) for which in (MAJOR, MINOR))
        return 10 * major + minor

    @property
    def version(self) -> str:
        """The newest CUDA the driver knows: "12.6"."""
        value = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(value))
        return f"{value.value // 1000}.{value.value % 1000 // 10}"

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(which), self._device)
        return value.value

    def open(self) -> int:
        """Enter the GPU's primary context (TensorRT uses the same one) and return a stream's handle."""
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", ctypes.byref(self._stream), ctypes.c_uint(0))
        return self._stream.value or 0

    def allocate(self, size: int) -> int:
        """Address of `size` new bytes on the GPU, at least one."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return address.value

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the GPU; done when this returns, in order with the stream."""
        self.synchronize()
        data = np.ascontiguousarray(array)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), _pointer(data), ctypes.c_size_t(data.nbytes))

    def download(self, address: int, shape: tuple[int, ...]) -> np.ndarray:
        """Copy float32 values back after everything in the stream is done."""
        self.synchronize()
        out = np.full(shape, np.nan, np.float32)
        self._call("cuMemcpyDtoH_v2", _pointer(out), ctypes.c_uint64(address), ctypes.c_size_t(out.nbytes))
        return out

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call("cuStreamSynchronize", self._stream)


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
