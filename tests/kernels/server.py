"""Runs the Triton kernels for the tests, in a process of its own: whether Triton interprets is fixed by its import.

Reads pickled (function name, arguments) from standard input, writes pickled results, until the input ends.
"""

import pickle
import sys

import numpy as np
import torch
from jpq_kernels import low_bit_gather, low_bit_matmul, weight

GUARD = 64  # numbers behind an output that nobody may write


def device_weight(arrays, offset=0):
    """The weight on the CPU; `offset`: bytes by which its codes miss their alignment."""
    tensors = {name: None if arrays[name] is None else torch.from_numpy(arrays[name]) for name in ("scales", "zeros")}
    packed = arrays["packed"]
    buffer = torch.zeros(packed.size + offset, dtype=torch.uint8)
    buffer[offset:] = torch.from_numpy(packed.reshape(-1))
    facts = {name: arrays[name] for name in ("bits", "group_size", "shape")}
    return weight.DeviceWeight(**facts, packed=buffer[offset:].view(packed.shape), **tensors)


def poisoned(count, dtype):
    return torch.full((count + GUARD,), float("nan"), dtype=dtype)


def matmul(x, stored, bias=None, *, multiprocessors=1, offset=0):
    """Y, and into how many parts K was split. Output and workspace start as NaN; what lies behind them must stay."""
    on_device, x = device_weight(stored, offset), torch.from_numpy(x)
    (n, k), bias = on_device.shape, None if bias is None else torch.from_numpy(bias)
    low_bit_matmul.check_operands(x, on_device, bias)
    rows = x.numel() // k
    plan = low_bit_matmul.plan(max(rows, 1), on_device, x.dtype, multiprocessors)
    size = plan.workspace_size(rows, n)
    out, workspace = poisoned(rows * n, x.dtype), poisoned(size, torch.float32)
    y = low_bit_matmul.low_bit_matmul(
        x,
        on_device,
        bias,
        out=out[: rows * n].view(*x.shape[:-1], n),
        workspace=workspace[:size],
        multiprocessors=multiprocessors,
    )
    assert bool(out[rows * n :].isnan().all() & workspace[size:].isnan().all()), "written past the end"
    assert not workspace[:size].isnan().any() or bool(y.isnan().any()), "a part of K left out"
    return y.numpy(), plan.splits


def gather(indices, stored, *, offset=0, dtype="float32"):
    on_device, indices = device_weight(stored, offset), torch.from_numpy(indices)
    k, dtype = on_device.shape[1], getattr(torch, dtype)
    out = poisoned(indices.numel() * k, dtype)
    rows = low_bit_gather.low_bit_gather(indices, on_device, dtype=dtype, out=out[:-GUARD].view(*indices.shape, k))
    assert bool(out[-GUARD:].isnan().all()), "written past the end"
    return rows.numpy()


def element_bits(stored, offset=0):
    return device_weight(stored, offset).layout.unit.element_bits


def answer(name, args, kwargs):
    try:
        return True, FUNCTIONS[name](*args, **kwargs)
    except (ValueError, AssertionError) as error:
        return False, error


FUNCTIONS = {"matmul": matmul, "gather": gather, "element_bits": element_bits}

if __name__ == "__main__":
    np.seterr(over="ignore", invalid="ignore")  # infinities are what some tests ask for
    replies, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        pickle.dump(answer(*request), replies)
        replies.flush()
