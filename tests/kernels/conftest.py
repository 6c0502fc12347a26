"""The Triton kernels, interpreted, in a process of their own (`server.py`), and random weights for them."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jpq_export.numerics.packing import pack_codes
from jpq_export.numerics.scheme import KERNEL_NORMAL, from_kernel_bits, levels

ROOT = Path(__file__).parents[2]


def environment(*, interpret):
    """This process's, with the kernels importable and Triton's interpreter on or off."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), env.get("PYTHONPATH", "")])
    return env | ({"TRITON_INTERPRET": "1"} if interpret else {})


class Interpreted:
    """The functions of `server.py`, called in the other process."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(interpret=True),
        )

    def __getattr__(self, name):
        def call(*args, **kwargs):
            pickle.dump((name, args, kwargs), self.process.stdin)
            self.process.stdin.flush()
            worked, result = pickle.load(self.process.stdout)
            if not worked:
                raise result
            return result

        return call

    def close(self):
        self.process.stdin.close()
        assert self.process.wait(timeout=30) == 0


@pytest.fixture(scope="session")
def kernels():
    pytest.importorskip("triton")
    process = Interpreted()
    yield process
    process.close()


@pytest.fixture(scope="session")
def compiler_environment(tmp_path_factory):
    return environment(interpret=False) | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}


def random_weight(n, groups, bits, group_size, *, symmetric, rng):
    """A stored weight [n, groups * group_size], as `DeviceWeight`'s arrays; also of widths no scheme has yet.

    `bits` as kernels state it; normal levels are symmetric whatever is asked for.
    """
    width = from_kernel_bits(bits)
    count, symmetric = levels(width), symmetric or bits > KERNEL_NORMAL
    codes = rng.integers(0, count, (n, groups * group_size)).astype(np.uint8)
    zeros = None if symmetric else pack_codes(rng.integers(0, count, (n, groups)).astype(np.uint8), width)
    return {
        "bits": bits,
        "group_size": group_size,
        "shape": codes.shape,
        "packed": pack_codes(codes, width),
        "scales": (rng.random((n, groups)) * 0.1 + 0.01).astype(np.float16),
        "zeros": zeros,
    }


@pytest.fixture(scope="session")
def random():
    return random_weight
