"""Random weights at awkward shapes, what they mean in fp64, and how far a right kernel may be from that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from jpq_export.numerics.levels import MIDDLE, normal_bytes
from jpq_export.numerics.packing import pack_codes
from jpq_export.numerics.scheme import KERNEL_NORMAL, KERNEL_TERNARY, from_kernel_bits, levels

TERNARY = KERNEL_TERNARY
BITS = (1, TERNARY, 2, 3, 4, 5, 6, 7, 8, 35, 36, 37, 38)  # as the kernels count them, normal levels last
GROUP_SIZES = (32, 64, 128, 576)
ROWS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 63, 64, 65, 129, 300)
QUICK_ROWS = (1, 3, 17, 129)
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
# Few and odd rows of W, one more than tiles of 4, 8 and 64, more than one tile.
OUT_FEATURES = (1, 13, 65, 257)
# Groups of 32 a row: less than a chunk of 1024 codes; one unit more than it; enough for K to be split.
GROUPS_OF_32 = (4, 36, 132)

UNIT_ROUNDOFF = 2.0**-24
PEAK = 8.0  # the largest of some 10**5 numbers over their RMS: 5 sigma, and half as much again
HALF = 2.0**-11  # one rounding to fp16, relative
HALF_SUBNORMAL = 2.0**-25  # and below 2**-14, absolute
# Tensor cores cut their sums off instead of rounding them, 16 products at a time: a last bit each, and one for safety.
CUT = 2.0**-22


@dataclass(frozen=True, slots=True)
class Shape:
    """One product Y [rows, n] = X [rows, k] · W [n, k]ᵀ (+ bias), or a look-up in W."""

    bits: int
    group_size: int
    groups: int
    n: int
    rows: int
    dtype: str = "fp16"
    symmetric: bool = True
    biased: bool = False

    @property
    def k(self) -> int:
        """Columns of W."""
        return self.groups * self.group_size

    @property
    def levels(self) -> int:
        """Number of different codes."""
        return levels(from_kernel_bits(self.bits))

    def __str__(self) -> str:
        """For a report."""
        kind = "symmetric" if self.symmetric else "asymmetric"
        return (
            f"{width_name(self.bits)}, groups of {self.group_size}, {kind}, W [{self.n}, {self.k}], "
            f"{self.rows} rows of {self.dtype}{', bias' if self.biased else ''}"
        )


@dataclass(frozen=True, slots=True)
class Rounding:
    """What a kernel may lose: of each number of X, relative; of each group's sum, relative to its terms' sizes."""

    x: float = 0.0
    sums: float = 0.0


FP32_SUMS = Rounding()


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A weight [n, k] as stored, on a device, beside what it was made of.

    packed: uint8 [n, bytes of k codes]; scales: float16 [n, k/g]; zeros: packed like codes, or None when symmetric.
    codes: uint8 [n, k] and zero_points: float64 [n, k/g], for the reference only; nothing unpacks what was packed.
    """

    bits: int
    group_size: int
    codes: np.ndarray
    zero_points: np.ndarray
    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes a product must read of it."""
        parts = (self.packed, self.scales, self.zeros)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def dense(self) -> torch.Tensor:
        """The weight, scale * (code or level - zero): float64 [n, k] on the device."""
        device, size = self.packed.device, self.group_size
        zeros = torch.from_numpy(self.zero_points).to(device).repeat_interleave(size, 1)
        points = normal_bytes(from_kernel_bits(self.bits))[self.codes] if is_normal(self.bits) else self.codes
        return (torch.from_numpy(points).to(device, torch.float64) - zeros) * self.scales.to(
            torch.float64
        ).repeat_interleave(size, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """A product to compute: x [rows, k], the weight, bias float32 [n] or None."""

    shape: Shape
    x: torch.Tensor
    weight: Stored
    bias: torch.Tensor | None


def store(shape: Shape, codes: np.ndarray, zeros: np.ndarray | None, scales: np.ndarray, device: str) -> Stored:
    """Pack codes uint8 [n, k], zero points uint8 [n, k/g] (None: the centre) and scales float16 [n, k/g]."""
    centre = np.full(scales.shape, MIDDLE if is_normal(shape.bits) else (shape.levels - 1) / 2)
    width = from_kernel_bits(shape.bits)
    packed = torch.from_numpy(pack_codes(codes, width)).to(device)
    packed_zeros = None if zeros is None else torch.from_numpy(pack_codes(zeros, width)).to(device)
    points = centre if zeros is None else zeros.astype(np.float64)
    return Stored(
        shape.bits, shape.group_size, codes, points, packed, torch.from_numpy(scales).to(device), packed_zeros
    )


def random_weight(shape: Shape, rng: np.random.Generator, device: str) -> Stored:
    """Every code equally likely; scales 0.01 to 0.11."""
    codes = rng.integers(0, shape.levels, (shape.n, shape.k)).astype(np.uint8)
    zeros = None if shape.symmetric else rng.integers(0, shape.levels, (shape.n, shape.groups)).astype(np.uint8)
    scales = (rng.random((shape.n, shape.groups)) * 0.1 + 0.01).astype(np.float16)
    return store(shape, codes, zeros, scales, device)


def random_problem(shape: Shape, rng: np.random.Generator, device: str) -> Problem:
    """A random weight, normal X and bias."""
    weight = random_weight(shape, rng, device)
    x = torch.from_numpy(rng.normal(size=(shape.rows, shape.k))).to(device, DTYPES[shape.dtype])
    bias = torch.from_numpy(rng.normal(size=shape.n)).to(device, torch.float32) if shape.biased else None
    return Problem(shape, x, weight, bias)


def far(code: int, shape: Shape) -> int:
    """The code with its highest bit flipped; of ternary ones 2 for 0 and 0 for the others."""
    return (0 if code else 2) if shape.bits == TERNARY else code ^ 1 << (int(from_kernel_bits(shape.bits)) - 1)


def width_name(bits: int) -> str:
    """For people: "3 bits", "ternary", "3 bits of normal levels"."""
    if is_normal(bits):
        return f"{from_kernel_bits(bits)} bits of normal levels"
    return "ternary" if bits == TERNARY else f"{bits} bits"


def is_normal(bits: int) -> bool:
    """Whether codes stand for normal levels, which have no zero points."""
    return bits > KERNEL_NORMAL


def wrong_weights(problem: Problem) -> Iterator[tuple[str, Stored]]:
    """The same weight with one thing wrong, which a check worth its name must see."""
    shape, weight, device = problem.shape, problem.weight, str(problem.x.device)
    zeros = None if weight.zeros is None else weight.zero_points.astype(np.uint8)
    scales = weight.scales.cpu().numpy()
    codes = weight.codes.copy()
    column = int(problem.x.abs().amax(0).argmax())
    codes[-1, column] = far(int(codes[-1, column]), shape)
    yield "one code's highest bit", store(shape, codes, zeros, scales, device)
    if shape.groups > 1:
        yield "scales of the next group", store(shape, weight.codes, zeros, np.roll(scales, 1, 1), device)
    if is_normal(weight.bits):
        yield "evenly spaced levels", replace(weight, bits=weight.bits - KERNEL_NORMAL)
    if zeros is not None:
        other = zeros.copy()
        other[-1, 0] = far(int(other[-1, 0]), shape)
        yield "one zero point's highest bit", store(shape, weight.codes, other, scales, device)


def distance(y: torch.Tensor, problem: Problem, rounding: Rounding) -> float:
    """Largest error of Y against fp64 in units of what rounding may do; passes up to 1. Infinite for a NaN.

    An fp32 sum of K products, X and the sums of groups rounded as `rounding` says, Y rounded to its type.
    """
    x, w = problem.x.to(torch.float64), problem.weight.dense()
    expected = x @ w.T if problem.bias is None else x @ w.T + problem.bias.to(torch.float64)
    bound = PEAK * UNIT_ROUNDOFF * x.shape[1] ** 0.5 * (x.square() @ w.square().T).sqrt() + 2.0**-23 * expected.abs()
    if rounding.x or rounding.sums:
        bound += (rounding.x + rounding.sums) * (x.abs() @ w.abs().T) + HALF_SUBNORMAL * w.abs().sum(1)
    if y.dtype == torch.float16:
        bound += HALF * expected.abs() + HALF_SUBNORMAL
    ratio = (y.to(torch.float64) - expected).abs() / bound
    return float(torch.nan_to_num(ratio, nan=torch.inf).max())


def shapes(*, quick: bool) -> list[Shape]:
    """All widths and types of X at all counts of rows; group size, N, K, zero points and bias take turns."""
    out = []
    for bits in BITS:
        for i, rows in enumerate(QUICK_ROWS if quick else ROWS):
            for j, dtype in enumerate(DTYPES):
                turn = i + 2 * j + bits
                size = GROUP_SIZES[(turn + turn // 4) % 4]
                groups = max(1, GROUPS_OF_32[(turn // 2) % 3] * 32 // size)
                n = OUT_FEATURES[(turn // 3) % 4]
                symmetric = is_normal(bits) or turn % 2 == 0
                out.append(Shape(bits, size, groups, n, rows, dtype, symmetric, (turn // 2) % 2 == 0))
    return out


def tiny(shape: Shape) -> Shape:
    """The shape cut down for an interpreter."""
    return replace(shape, n=min(shape.n, 13), groups=min(shape.groups, 3), rows=min(shape.rows, 33))
