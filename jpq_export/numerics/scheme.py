"""What a quantized weight is made of: width, group size, zero points, and the bytes that costs."""

from __future__ import annotations

from dataclasses import dataclass

BIT_WIDTHS = (2, 3, 4, 5, 6, 8)
SCALE_BYTES = 2  # fp16


@dataclass(frozen=True, slots=True)
class Scheme:
    """Uniform affine quantization of a weight [N, K] in groups along K: w = scale * (code - zero).

    `symmetric`: the zero is the centre of the code range, (2**bits - 1) / 2, and is not stored. Half-integer on
    purpose: at 2 bits the levels are then -1.5, -0.5, 0.5, 1.5 scales, the best 4-level grid for centred weights.
    Otherwise one integer zero point of `bits` bits a group, packed like the codes.
    `integer_zero`: a symmetric scheme whose zero is 2**(bits - 1) instead, for formats that know signed codes only
    (INT4 is -8 .. 7): half-integer zeros would need one bit more there.
    """

    bits: int
    group_size: int
    symmetric: bool = True
    integer_zero: bool = False

    def __post_init__(self) -> None:
        """Check: unknown widths are a ValueError."""
        if self.bits not in BIT_WIDTHS:
            raise ValueError(f"bits {self.bits} is not one of {BIT_WIDTHS}")
        if self.group_size < 1:
            raise ValueError(f"group_size {self.group_size} must be at least 1")
        if self.integer_zero and not self.symmetric:
            raise ValueError("integer_zero is a kind of symmetric; stored zero points are integers anyway")

    @property
    def max_code(self) -> int:
        """Largest code, 2**bits - 1."""
        return (1 << self.bits) - 1

    @property
    def centre(self) -> float:
        """Zero point of a symmetric scheme, in codes."""
        return (self.max_code + 1) // 2 if self.integer_zero else self.max_code / 2

    @property
    def signed_bits(self) -> int:
        """Bits of the smallest signed integers that hold every code less its zero, doubled where the zero is half."""
        if self.integer_zero:
            return self.bits
        return self.bits + 1  # odd numbers up to 2**bits - 1, or codes less any zero point

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


def row_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes of `bits` bits in one packed row."""
    return -(-count * bits // 8)


def choose_group_size(in_features: int, preferred: int = 64) -> int:
    """The divisor of `in_features` nearest to `preferred`: a multiple of 8 from 16 up, else any up to `preferred`."""
    divisors = [d for d in range(16, min(in_features, 4 * preferred) + 1, 8) if in_features % d == 0]
    if divisors:
        return min(divisors, key=lambda d: (abs(d - preferred), -d))
    return max(d for d in range(1, min(in_features, preferred) + 1) if in_features % d == 0)
