"""What each `jpq::` operator means, in numpy. Every other implementation is checked against these lines."""

from __future__ import annotations

import numpy as np

from jpq_export.numerics.affine import QuantizedWeight

MAX_DISTANCE = 128  # in tokens; all farther ones share the last bucket


def low_bit_matmul(x: np.ndarray, weight: QuantizedWeight, bias: np.ndarray | None = None) -> np.ndarray:
    """`jpq::LowBitMatMul`: Y = X · dequantize(weight)ᵀ (+ bias); X [..., K] -> Y [..., N], in fp32 or wider."""
    wide = np.float64 if x.dtype == np.float64 else np.float32
    y = x.astype(wide) @ weight.dequantize().astype(wide).T
    if bias is not None:
        y = y + bias.astype(wide)
    return y.astype(x.dtype)


def low_bit_gather(indices: np.ndarray, weight: QuantizedWeight) -> np.ndarray:
    """`jpq::LowBitGather`: rows of dequantize(weight) at `indices` [...] -> float32 [..., K]."""
    return weight.dequantize()[indices]


def distance_bucket(distance: int, buckets: int) -> int:
    """Bucket of key place minus query place: exact when near, logarithmic when far (Raffel et al., 2020).

    In fp32, as models were trained with it: at a border another precision would choose another bucket.
    """
    half = buckets // 2
    exact, n = half // 2, abs(distance)
    if n >= exact:
        ratio = np.log(np.float32(n) / np.float32(exact)) / np.float32(np.log(MAX_DISTANCE / exact))
        n = min(half - 1, exact + int(ratio * np.float32(half - exact)))
    return n + (half if distance > 0 else 0)
