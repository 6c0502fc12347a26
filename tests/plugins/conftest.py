"""The functions of the compiled library, on numpy arrays."""

import ctypes
import importlib.util
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jpq_export.numerics.affine import QuantizedWeight, store
from jpq_export.numerics.levels import normal_bytes
from jpq_export.numerics.packing import pack_codes
from jpq_export.numerics.scheme import KERNEL_NORMAL, Scheme, from_kernel_bits, kernel_bits, levels, row_bytes
from jpq_export.runtime import native

FP32, INT8, INT16 = 0, 1, 2
OK, BAD_WEIGHT, NO_MEMORY, BAD_INDEX, NOT_HERE = range(5)
GUARD = 64  # floats behind an output that nobody may write


class Weight(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("n", "k")),
        *((name, ctypes.c_int32) for name in ("bits", "group_size")),
    )


class Product(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.POINTER(Weight)),
        *((name, ctypes.c_void_p) for name in ("x", "bias", "y")),
        ("m", ctypes.c_int64),
        ("activations", ctypes.c_int32),
        ("implementation", ctypes.c_char_p),
        ("chosen", ctypes.c_void_p),
        ("parts", ctypes.c_int),
        ("prepared", ctypes.c_void_p),
        ("borrowed", ctypes.c_int),
    )


INT8 = ("key_codes", "value_codes", "key_scales", "value_scales")


class Attention(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "cos", "sin", "mask", "keys", "values", "y")),
        *((name, ctypes.c_void_p) for name in (*(f"fresh_{part}" for part in INT8), *INT8)),
        *((name, ctypes.c_int64) for name in ("batch", "seq", "total", "heads", "kv_heads", "dim")),
        ("scale", ctypes.c_float),
        ("implementation", ctypes.c_char_p),
        ("chosen", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "tiles", "chunks", "heads_of_task", "tasks")),
        *((name, ctypes.c_void_p) for name in ("turned", "partial")),
    )


def address(array):
    assert array is None or array.flags.c_contiguous
    return None if array is None else array.ctypes.data


def make_weight(stored: QuantizedWeight, **changes):
    """The C struct of a stored weight, with some fields changed."""
    fields = {
        **{name: address(getattr(stored, name)) for name in ("packed", "scales", "zeros")},
        **dict(zip(("n", "k"), stored.shape, strict=True)),
        "bits": kernel_bits(stored.scheme.bits, normal=stored.scheme.normal),
        "group_size": stored.scheme.group_size,
    }
    return Weight(**(fields | changes))


def flipped(stored, row, column):
    """The weight with one code changed by one."""
    codes = stored.codes()
    codes[row, column] = codes[row, column] - 1 if codes[row, column] else 1
    return replace(stored, packed=pack_codes(codes, stored.scheme.bits))


class Core:
    """The C functions on numpy arrays. Outputs start as NaN, with a guard behind them."""

    def __init__(self, library):
        self.path, self.names = library.path, library.implementations
        self.c = ctypes.CDLL(str(library.path))
        self.c.jpq_matmul_rows.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        self.c.jpq_attention_task.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self.c.jpq_gather.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_char_p,
        ]

    def weight(self, stored: QuantizedWeight, **changes):
        return make_weight(stored, **changes)

    def matmul(self, x, stored, name=None, *, activations=FP32, bias=None, ranges=None, weight=None):
        """Status and y [m, n]; `ranges` of rows of the weight, each a call of its own."""
        weight = weight or self.weight(stored)
        m, n = len(x), stored.shape[0]
        y = np.full(m * n + GUARD, np.nan, np.float32)
        product = Product(
            ctypes.pointer(weight), address(x), address(bias), address(y), m, activations, name and name.encode()
        )
        if ranges is None:
            status = self.c.jpq_matmul(ctypes.byref(product))
        else:
            status = self.c.jpq_prepare(ctypes.byref(product))
            for first, last in ranges:
                status = status or self.c.jpq_matmul_rows(ctypes.byref(product), first, last)
            self.c.jpq_release(ctypes.byref(product))
        assert np.isnan(y[m * n :]).all(), "written past the end"
        return status, y[: m * n].reshape(m, n)

    def matmul_together(self, x, several, *, activations=FP32):
        """y [m, n] of each weight, of one X that is prepared for the first and for others only where it has to be."""
        weights = [self.weight(stored) for stored in several]
        outputs = [np.full((len(x), stored.shape[0]), np.nan, np.float32) for stored in several]
        products = [
            Product(ctypes.pointer(weight), address(x), None, address(y), len(x), activations, None)
            for weight, y in zip(weights, outputs, strict=True)
        ]
        for product in products:
            if product is products[0]:
                assert self.c.jpq_prepare(ctypes.byref(product)) == OK
            else:
                assert self.c.jpq_prepare_like(ctypes.byref(product), ctypes.byref(products[0])) == OK
        for product, weight in zip(products, weights, strict=True):
            assert self.c.jpq_matmul_rows(ctypes.byref(product), 0, weight.n) == OK
        for product in reversed(products):
            self.c.jpq_release(ctypes.byref(product))
        return outputs

    def gather(self, indices, stored, name=None):
        weight = self.weight(stored)
        out = np.full(len(indices) * stored.shape[1] + GUARD, np.nan, np.float32)
        status = self.c.jpq_gather(
            ctypes.byref(weight), address(indices), len(indices), address(out), name and name.encode()
        )
        assert np.isnan(out[-GUARD:]).all(), "written past the end"
        return status, out[:-GUARD].reshape(len(indices), -1)

    def attend(self, arrays, sizes, name):
        """Status, y, keys, values. `arrays`: q, k, v, cos, sin, mask, keys, values; `sizes`: batch ... dim, scale."""
        y = np.full(arrays[0].size + GUARD, np.nan, np.float32)
        keys, values = arrays[6].copy(), arrays[7].copy()
        given = *arrays[:6], keys, values, y, *[None] * 8
        status = self._attend(Attention(*(address(a) for a in given), *sizes, name.encode()))
        assert np.isnan(y[-GUARD:]).all(), "written past the end"
        return status, y[:-GUARD].reshape(arrays[0].shape), keys, values

    def attend_int8(self, arrays, sizes, name):
        """Status, y, the cache. `arrays`: q, cos, sin, mask, then codes and scales, four that are new, four cached."""
        q, cos, sin, mask, *parts = arrays
        y = np.full(q.size + GUARD, np.nan, np.float32)
        cache = [part.copy() for part in parts[4:]]
        given = q, None, None, cos, sin, mask, None, None, y, *parts[:4], *cache
        status = self._attend(Attention(*(address(a) for a in given), *sizes, name.encode()))
        assert np.isnan(y[-GUARD:]).all(), "written past the end"
        return status, y[:-GUARD].reshape(q.shape), cache

    def to_int8(self, key, value, rotary, *, kv_heads):
        """Status, codes and scales of keys and values [batch, seq, kv_heads * dim]."""
        batch, seq, width = key.shape
        shape = batch, seq, kv_heads, width // kv_heads
        out = [np.full(shape, 99, np.int8) for _ in range(2)]
        out += [np.full((*shape[:3], 1), np.nan, np.float32) for _ in range(2)]
        places = (ctypes.c_void_p * 4)(*(address(a) for a in out))
        inputs = (ctypes.c_void_p(address(a)) for a in (key, value, *(rotary or (None, None))))
        return self.c.jpq_to_int8(*inputs, *(ctypes.c_int64(n) for n in (batch * seq, *shape[2:])), places), out

    def _attend(self, request):
        status = self.c.jpq_attention_begin(ctypes.byref(request))
        for i in range(request.tasks if status == OK else 0):
            status = status or self.c.jpq_attention_task(ctypes.byref(request), i)
        if status == OK:
            self.c.jpq_attention_finish(ctypes.byref(request))
        self.c.jpq_attention_end(ctypes.byref(request))
        return status


def arm_compiler():
    """A C compiler for aarch64, as a command: the system's, or that of the package ziglang."""
    if found := shutil.which("aarch64-linux-gnu-gcc"):
        return [found]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl"]
    return pytest.skip("no aarch64-linux-gnu-gcc and no package ziglang: nothing compiles for ARM here")


def arm_emulator():
    """What runs its programs: qemu, or our own on the package unicorn."""
    if found := shutil.which("qemu-aarch64"):
        return [found]
    if importlib.util.find_spec("unicorn"):
        return [sys.executable, str(Path(__file__).with_name("arm_emulator.py"))]
    return pytest.skip("no qemu-aarch64 and no package unicorn: nothing runs ARM's programs here")


class Emulated:
    """The same functions as compiled for aarch64, run by an emulator: `emulated.c` answers over a pipe."""

    def __init__(self, folder):
        """Skips where a compiler or an emulator is missing."""
        compiler, emulator = arm_compiler(), arm_emulator()
        core, program = native.sources_folder() / "core", folder / "emulated"
        sources = [*sorted(core.glob("*.c")), Path(__file__).with_name("emulated.c")]
        command = [
            *compiler,
            "-std=c11",
            "-O1",
            "-ffp-contract=off",
            "-static",
            "-Werror",
            "-Wall",
            "-Wextra",
            f"-I{core}",
            *sources,
        ]
        done = subprocess.run([*command, "-o", program, "-lm"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        self.process = subprocess.Popen([*emulator, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.names = ("neon", "scalar")

    def weight(self, stored: QuantizedWeight, **changes):
        return make_weight(stored, **changes)

    def matmul(self, x, stored, name, *, activations=FP32, bias=None, ranges=(), weight=None):
        weight = weight or make_weight(stored)
        y = self._ask(weight, name, x, (0, activations), bias, ranges or (), len(x) * weight.n)
        return y[0], y[1].reshape(len(x), weight.n)

    def gather(self, indices, stored, name):
        weight = make_weight(stored)
        y = self._ask(weight, name, indices, (1, FP32), None, (), len(indices) * weight.k)
        return y[0], y[1].reshape(len(indices), weight.k)

    def attend(self, arrays, sizes, name):
        batch, seq, total, heads, kv_heads, dim, scale = sizes
        rotary, room = arrays[3] is not None, len(arrays[6])
        head = struct.pack("10q16s", 2, seq, dim, heads, kv_heads, batch, total, rotary, room, 0, name.encode())
        body = struct.pack("f", scale) + b"".join(a.tobytes() for a in arrays if a is not None)
        self.process.stdin.write(head + body)
        self.process.stdin.flush()
        status = struct.unpack("q", self.process.stdout.read(8))[0]
        counts = [arrays[0].size + GUARD, arrays[6].size, arrays[7].size]
        y, *cache = (np.frombuffer(self.process.stdout.read(4 * count), np.float32) for count in counts)
        assert np.isnan(y[-GUARD:]).all(), "written past the end"
        return status, y[:-GUARD].reshape(arrays[0].shape), *(c.reshape(arrays[6].shape) for c in cache)

    def attend_int8(self, arrays, sizes, name):
        batch, seq, total, heads, kv_heads, dim, scale = sizes
        q, cos, parts = *arrays[:2], arrays[4:]
        kind, room = 3, len(parts[4])
        head = struct.pack(
            "10q16s", kind, seq, dim, heads, kv_heads, batch, total, cos is not None, room, 0, name.encode()
        )
        body = struct.pack("f", scale) + b"".join(a.tobytes() for a in arrays if a is not None)
        self.process.stdin.write(head + body)
        self.process.stdin.flush()
        status = struct.unpack("q", self.process.stdout.read(8))[0]
        y = np.frombuffer(self.process.stdout.read(4 * (q.size + GUARD)), np.float32)
        cache = [np.frombuffer(self.process.stdout.read(a.nbytes), a.dtype).reshape(a.shape) for a in parts[4:]]
        assert np.isnan(y[-GUARD:]).all(), "written past the end"
        return status, y[:-GUARD].reshape(q.shape), cache

    def _ask(self, weight, name, x, kind, bias, ranges, count):
        gather, activations = kind
        columns, groups = (
            row_bytes(codes, from_kernel_bits(weight.bits)) for codes in (weight.k, weight.k // weight.group_size)
        )
        body = ctypes.string_at(weight.packed, weight.n * columns)
        body += ctypes.string_at(weight.scales, 2 * weight.n * (weight.k // weight.group_size))
        body += ctypes.string_at(weight.zeros, weight.n * groups) if weight.zeros else b""
        body += x.tobytes() + (b"" if bias is None else bias.tobytes())
        body += struct.pack(f"{2 * len(ranges)}q", *(end for pair in ranges for end in pair))
        shape = gather, weight.n, weight.k, weight.bits, weight.group_size, len(x), activations
        head = struct.pack("10q16s", *shape, bool(weight.zeros), bias is not None, len(ranges), name.encode())
        self.process.stdin.write(head + body)
        self.process.stdin.flush()
        status = struct.unpack("q", self.process.stdout.read(8))[0]
        y = np.frombuffer(self.process.stdout.read(4 * (count + GUARD)), np.float32)
        assert np.isnan(y[count:]).all(), "written past the end"
        return status, y[:count]


@pytest.fixture(scope="session")
def weight_of():
    return make_weight


@pytest.fixture(scope="session")
def flip():
    return flipped


@pytest.fixture(scope="session")
def core(library):
    return Core(library)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """Ends with the session; a processor that has NEON needs none."""
    emulated = Emulated(tmp_path_factory.mktemp("emulated"))
    yield emulated
    emulated.process.communicate()


@pytest.fixture(scope="session")
def core_of(core, request):
    """`core_of("neon")`: what runs that implementation here; skips where nothing does."""

    def find(name):
        if name in core.names:
            return core
        if name == "neon":
            return request.getfixturevalue("emulated")
        return pytest.skip(f"this processor does not run {name}")

    return find


def random_weight(n, k, bits, group_size, symmetric, rng):
    """`bits` as the kernels count them, or a scheme's; normal levels are symmetric whatever is asked for."""
    normal = bits > KERNEL_NORMAL
    scheme = Scheme(from_kernel_bits(bits), group_size, symmetric or normal, normal=normal)
    codes = rng.integers(0, levels(scheme.bits), (n, k)).astype(np.uint8)
    scales = (rng.random((n, k // group_size)) * 0.1 + 0.01).astype(np.float16)
    zeros = None if scheme.symmetric else rng.integers(0, levels(scheme.bits), scales.shape).astype(np.uint8)
    return store(normal_bytes(scheme.bits)[codes] if scheme.normal else codes, scales, zeros, scheme)


@pytest.fixture(scope="session")
def random():
    return random_weight
