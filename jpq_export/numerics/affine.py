"""Stored quantized weights (numpy, torch-free): the record, and codes back to numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from jpq_export.numerics.levels import normal_bytes
from jpq_export.numerics.packing import pack_codes, unpack_codes
from jpq_export.numerics.scheme import TERNARY, Scheme, row_bytes


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight [N, K] as stored.

    packed: uint8 [N, row_bytes(K, bits)]; scales: float16 [N, K/g]; zeros: None when symmetric, else packed integer
    zero points uint8 [N, row_bytes(K/g, bits)].
    """

    scheme: Scheme
    shape: tuple[int, int]
    packed: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Check: arrays that do not fit the scheme are a ValueError."""
        n, k = self.shape
        groups = self.scheme.groups(k)
        expected = {"packed": (np.uint8, (n, row_bytes(k, self.scheme.bits))), "scales": (np.float16, (n, groups))}
        if not self.scheme.symmetric:
            expected["zeros"] = (np.uint8, (n, row_bytes(groups, self.scheme.bits)))
        for name, (dtype, shape) in expected.items():
            array = getattr(self, name)
            if array is None or array.dtype != dtype or array.shape != shape:
                got = "nothing" if array is None else f"{array.dtype} {array.shape}"
                raise ValueError(f"{name}: expected {np.dtype(dtype)} {shape}, got {got}")
        if self.scheme.symmetric and self.zeros is not None:
            raise ValueError("a symmetric weight stores no zeros")

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.packed.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    def codes(self) -> np.ndarray:
        """Codes: uint8 [N, K]."""
        return unpack_codes(self.packed, self.scheme.bits, self.shape[1])

    def points(self) -> np.ndarray:
        """Where codes stand, uint8 [N, K]: less the zero points, what scales multiply. The codes, if evenly spaced."""
        return normal_bytes(self.scheme.bits)[self.codes()] if self.scheme.normal else self.codes()

    def zero_points(self) -> np.ndarray:
        """Zero points among `points`: float32 [N, K/g]."""
        groups = self.scheme.groups(self.shape[1])
        if self.zeros is None:
            return np.full((self.shape[0], groups), self.scheme.centre, np.float32)
        return unpack_codes(self.zeros, self.scheme.bits, groups).astype(np.float32)

    def dequantize(self) -> np.ndarray:
        """The weight: float32 [N, K] = scale * (point - zero), in fp32."""
        n, k = self.shape
        codes = self.points().astype(np.float32).reshape(n, -1, self.scheme.group_size)  # [N, K/g, g]
        zeros = self.zero_points()[:, :, None]
        scales = self.scales.astype(np.float32)[:, :, None]
        return ((codes - zeros) * scales).reshape(n, k)


def with_stored_zeros(weight: QuantizedWeight) -> QuantizedWeight:
    """The same numbers with `integer_zero` written out, for operators that know half-integer or stored zeros only."""
    scheme = weight.scheme
    if not scheme.integer_zero:
        return weight
    zeros = weight.zero_points().astype(np.uint8)
    if scheme.bits == TERNARY:  # its zero is an integer in any case
        return replace(weight, scheme=replace(scheme, integer_zero=False))
    wide = Scheme(scheme.bits, scheme.group_size, symmetric=False)
    return QuantizedWeight(wide, weight.shape, weight.packed, weight.scales, pack_codes(zeros, scheme.bits))


def store(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, scheme: Scheme) -> QuantizedWeight:
    """Pack points uint8 [N, K], scales [N, K/g] and (asymmetric) integer zeros uint8 [N, K/g].

    ValueError for points that are no levels of the scheme.
    """
    if scheme.normal:
        known = normal_bytes(scheme.bits)
        points, codes = codes, np.minimum(np.searchsorted(known, codes), len(known) - 1).astype(np.uint8)
        if not np.array_equal(known[codes], points):
            raise ValueError(f"points that are no level of {scheme.bits:g} bits")
    packed_zeros = None if scheme.symmetric or zeros is None else pack_codes(zeros, scheme.bits)
    shape = (codes.shape[0], codes.shape[1])
    return QuantizedWeight(scheme, shape, pack_codes(codes, scheme.bits), scales.astype(np.float16), packed_zeros)
