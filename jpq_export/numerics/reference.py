"""What each `jpq::` operator means, in numpy. Every other implementation is checked against these lines."""

from __future__ import annotations

import numpy as np

from jpq_export.numerics.affine import QuantizedWeight


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
