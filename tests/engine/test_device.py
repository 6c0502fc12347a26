"""What a board is, read from files and a stand-in for the CUDA driver; no driver runs here."""

import ctypes
from types import SimpleNamespace

import pytest

from jpq_export.engine import device
from jpq_export.engine.cuda import MAJOR, MINOR, Cuda, CudaError


def driver(fails: str = "") -> SimpleNamespace:
    """A stand-in for libcuda of an Orin; `fails` names a function that returns error 100."""

    def write(value):
        def call(pointer, *_rest):
            pointer._obj.value = value
            return 0

        return call

    def attribute(pointer, which, _device):
        pointer._obj.value = {MAJOR: 8, MINOR: 7}[which.value]
        return 0

    def name(buffer, size, _device):
        ctypes.memmove(buffer, b"Orin\0", 5)
        return 0

    calls = {
        "cuInit": lambda _flags: 0,
        "cuDeviceGet": write(0),
        "cuDeviceGetName": name,
        "cuDeviceGetAttribute": attribute,
        "cuDriverGetVersion": write(12060),
    }
    if fails:
        calls[fails] = lambda *_: 100
    return SimpleNamespace(**calls)


def test_the_driver_says_what_the_gpu_is():
    cuda = Cuda(driver())
    assert (cuda.name, cuda.sm, cuda.version) == ("Orin", 87, "12.6")


@pytest.mark.parametrize("function", ["cuInit", "cuDeviceGet"])
def test_twin_a_driver_without_a_gpu_is_one_line(function):
    with pytest.raises(CudaError, match=f"{function} failed with error 100"):
        Cuda(driver(function))


def test_no_driver_is_said_and_not_raised(monkeypatch, tmp_path):
    def missing(*_arguments, **_options):
        raise OSError("no such file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    found = device.read_device(tmp_path / "not" / "there" / "model.engine")
    assert found.sm is None
    assert found.gpu_missing is not None
    assert "libcuda.so.1 not found" in found.gpu_missing
    assert found.free_disk_bytes > 0


def test_free_memory_is_what_linux_can_give(tmp_path):
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:  7990000 kB\nMemFree:  100 kB\nMemAvailable:    5000000 kB\n")
    assert device.free_memory(path) == 5_000_000 * 1024
    path.write_text("MemTotal:  7990000 kB\n")
    assert device.free_memory(path) is None
    assert device.free_memory(tmp_path / "none") is None


def test_a_tensorrt_that_cannot_load_its_library_is_missing(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "tensorrt", raising=False)
    module, reason = device.import_tensorrt()
    assert module is None
    assert reason == "libnvinfer.so.10: cannot open shared object file"
