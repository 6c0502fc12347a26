"""Launch every Triton kernel once at awkward shapes, for compute-sanitizer; argument `y`: Y is one row short (twin).

compute-sanitizer --tool memcheck python tools/gpu_steps/launches.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tools")]

import numpy as np  # noqa: E402 the repository is on the path from here on
import torch  # noqa: E402
from jpq_kernels import low_bit_matmul  # noqa: E402

from gpu_steps.cases import Shape, random_problem  # noqa: E402
from gpu_steps.triton_set import TritonKernels, device_weight  # noqa: E402

BITS = (2, 3, 5, 36)


def main() -> None:
    """Few rows, many rows, split K, look-up; nothing is compared, the sanitizer looks for bad addresses only."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if sys.argv[1:] == ["y"]:
        too_short(device)
    rng, kernels = np.random.default_rng(0), TritonKernels()
    for bits in BITS:
        for rows, dtype in ((1, "fp16"), (3, "fp32"), (17, "fp16")):
            shape = Shape(bits, 32, 33, 13, rows, dtype, symmetric=rows == 1 or bits == 36, biased=rows == 3)
            problem = random_problem(shape, rng, device)
            out = torch.empty(rows, shape.n, dtype=problem.x.dtype, device=device)
            kernels.matmul(problem.x, problem.weight, problem.bias, out)
        indices = torch.tensor([0, 12, -1], device=device)
        kernels.gather(indices, problem.weight, torch.empty(3, shape.k, device=device))
    if device == "cuda":
        torch.cuda.synchronize()
    sys.stdout.write(f"launched the Triton kernels at {BITS} bits on {device}\n")


def too_short(device: str) -> None:
    """A product of three rows into a Y of two: past the checks, as `run` takes what it is given."""
    problem = random_problem(Shape(3, 32, 33, 13, 3, "fp16"), np.random.default_rng(0), device)
    weight, space = device_weight(problem.weight), torch.empty(0, device=device)
    launch = low_bit_matmul.plan(3, weight, torch.float16, 1)
    assert launch.splits == 1, "Y would be written by another kernel"
    low_bit_matmul.run(launch, problem.x, weight, None, torch.empty(2, 13, dtype=torch.float16, device=device), space)


if __name__ == "__main__":
    main()
