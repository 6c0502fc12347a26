"""What a quantized weight is made of: width, group size, zero points, and the bytes that costs."""

from __future__ import annotations

from dataclasses import dataclass

from jpq_export.numerics.levels import MIDDLE, NORMAL_WIDTHS

TERNARY = 1.6  # bits of a code 0, 1 or 2: five share a byte
KERNEL_TERNARY = 16  # how the integer attribute `bits` of operators and kernels says so: tenths of a bit
KERNEL_NORMAL = 32  # added to it where codes stand for normal levels
ALL_WIDTHS = (1, TERNARY, 2, 3, 4, 5, 6, 8)
BIT_WIDTHS = (2, 3, 4, 5, 6, 8)  # what a search chooses from unless it is told otherwise
SCALE_BYTES = 2  # fp16


@dataclass(frozen=True, slots=True)
class Scheme:
    """Quantization of a weight [N, K] in groups along K: w = scale * (code - zero), or scale * level[code] (`normal`).

    `symmetric`: the zero is the centre of the code range, (2**bits - 1) / 2, and is not stored. Half-integer on
    purpose: at 2 bits the levels are then -1.5, -0.5, 0.5, 1.5 scales, the best 4-level grid for centred weights; at
    1 bit -0.5 and 0.5. Ternary codes are 0, 1, 2 around 1: -1, 0, 1 scales.
    Otherwise one integer zero point of `bits` bits a group, packed like the codes.
    `integer_zero`: a symmetric scheme whose zero is 2**(bits - 1) instead, for formats that know signed codes only
    (INT4 is -8 .. 7): half-integer zeros would need one bit more there.
    `normal`: a symmetric scheme whose codes stand for the levels of `numerics/levels.py`.
    """

    bits: float
    group_size: int
    symmetric: bool = True
    integer_zero: bool = False
    normal: bool = False

    def __post_init__(self) -> None:
        """Check: unknown widths are a ValueError."""
        if self.bits not in ALL_WIDTHS or isinstance(self.bits, bool):
            raise ValueError(f"bits {self.bits} is not one of {ALL_WIDTHS}")
        if self.group_size < 1:
            raise ValueError(f"group_size {self.group_size} must be at least 1")
        if self.integer_zero and not self.symmetric:
            raise ValueError("integer_zero is a kind of symmetric; stored zero points are integers anyway")
        if self.normal and (not self.symmetric or self.integer_zero or self.bits not in NORMAL_WIDTHS):
            raise ValueError(f"normal levels are symmetric, of {NORMAL_WIDTHS} bits")

    @staticmethod
    def stated(bits: int, group_size: int, *, symmetric: bool) -> Scheme:
        """As operators and kernels state it; ValueError for a width there is none of."""
        return Scheme(from_kernel_bits(bits), group_size, symmetric, normal=bool(bits & KERNEL_NORMAL))

    @property
    def max_code(self) -> int:
        """Largest code: 2**bits - 1, or 2 where ternary."""
        return levels(self.bits) - 1

    @property
    def centre(self) -> float:
        """Zero point of a symmetric scheme, in codes; of `normal` levels as bytes, whose codes have none."""
        if self.normal:
            return MIDDLE
        return (self.max_code + 1) // 2 if self.integer_zero else self.max_code / 2

    @property
    def signed_bits(self) -> int:
        """Bits of the smallest signed integers that hold every code less its zero, doubled where the zero is half."""
        if self.symmetric and self.centre % 1 == 0:
            least = -int(self.centre)  # -2**(bits - 1) .. 2**(bits - 1) - 1, or -1, 0, 1
            return max(-1 - least, self.max_code + least).bit_length() + 1
        return self.max_code.bit_length() + 1  # odd numbers up to 2**bits - 1, or codes less any zero point

    def groups(self, in_features: int) -> int:
        """Number of groups of a row of `in_features` weights; ValueError when it does not divide."""
        if in_features % self.group_size:
            raise ValueError(f"in_features {in_features} is not a multiple of group_size {self.group_size}")
        return in_features // self.group_size

    def weight_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a weight [out_features, in_features] as stored: codes, scales and zero points."""
        if out_features == 0 or in_features == 0:
            return 0
        groups = self.groups(in_features)
        zeros = 0 if self.symmetric else row_bytes(groups, self.bits)
        return out_features * (row_bytes(in_features, self.bits) + groups * SCALE_BYTES + zeros)


def levels(bits: float) -> int:
    """Number of different codes of a width: 2**bits, or 3 where ternary."""
    return 3 if bits == TERNARY else 1 << int(bits)


def kernel_bits(bits: float, *, normal: bool = False) -> int:
    """The width as the attribute `bits` and the kernels state it: an integer, 16 for ternary, 36 for normal 4."""
    return KERNEL_TERNARY if bits == TERNARY else int(bits) + KERNEL_NORMAL * normal


def from_kernel_bits(stated: int) -> float:
    """The width that `kernel_bits` stated."""
    return TERNARY if stated == KERNEL_TERNARY else stated % KERNEL_NORMAL


def read_width(text: str) -> float:
    """'3' -> 3, '1.6' -> TERNARY; ValueError for what is no width."""
    known = {f"{bits:g}": bits for bits in ALL_WIDTHS}
    if text not in known:
        raise ValueError(f"{text!r} is not one of {', '.join(known)}")
    return known[text]


KERNEL_WIDTHS = (
    *(kernel_bits(bits) for bits in ALL_WIDTHS),
    *(kernel_bits(bits, normal=True) for bits in NORMAL_WIDTHS),
)


def row_bytes(count: int, bits: float) -> int:
    """Bytes of `count` codes of `bits` bits in one packed row."""
    return -(-count // 5) if bits == TERNARY else -(-count * int(bits) // 8)


def choose_group_size(in_features: int, preferred: int = 64) -> int:
    """The divisor of `in_features` nearest to `preferred`: a multiple of 8 from 16 up, else any up to `preferred`."""
    divisors = [d for d in range(16, min(in_features, 4 * preferred) + 1, 8) if in_features % d == 0]
    if divisors:
        return min(divisors, key=lambda d: (abs(d - preferred), -d))
    return max(d for d in range(1, min(in_features, preferred) + 1) if in_features % d == 0)


def wide_group_size(in_features: int, least: int) -> int:
    """The smallest multiple of 32 (GPUs want those) from `least` up that divides `in_features`, else the largest below.

    Without a multiple of 32 it is `choose_group_size`. Unlike that one it rather takes a wider group than a narrower.
    """
    whole = [d for d in range(32, min(in_features, 8 * least) + 1, 32) if in_features % d == 0]
    return next((d for d in whole if d >= least), whole[-1]) if whole else choose_group_size(in_features, least)
