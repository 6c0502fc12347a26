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


def attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    mask: np.ndarray,
    past: tuple[np.ndarray, np.ndarray],
    rotary: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`jpq::Attention`: output [batch, seq, heads * dim], present key and value [room, batch, kv_heads, dim].

    `query` [batch, seq, heads * dim], `key`, `value` [batch, seq, kv_heads * dim]; `mask` bool [batch, 1, seq, total];
    `past`: two tensors [room, batch, kv_heads, dim] whose first total - seq rows hold something; `rotary`: cosine and
    sine [batch, seq, dim / 2]. A row that may look at nothing gives zeros.
    """
    batch, seq, total = *query.shape[:2], mask.shape[-1]
    query, key, value = (
        x.reshape(batch, seq, count, -1) for x, count in ((query, heads), (key, kv_heads), (value, kv_heads))
    )
    if rotary is not None:
        query, key = _rotate(query, *rotary), _rotate(key, *rotary)
    present = [
        np.concatenate([old[: total - seq], new.swapaxes(0, 1), old[total:]])
        for old, new in zip(past, (key, value), strict=True)
    ]
    keys, values = (np.repeat(rows[:total], heads // kv_heads, axis=2) for rows in present)
    scores = np.where(mask, np.einsum("bshd,tbhd->bhst", query, keys) * scale, -np.inf)
    peak = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isinf(peak), 0, peak))
    sums = weights.sum(-1, keepdims=True)
    output = np.einsum("bhst,tbhd->bshd", weights / np.where(sums == 0, 1, sums), values)
    return output.reshape(batch, seq, -1), present[0], present[1]


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate-half embedding of x [batch, seq, heads, dim]."""
    low, high = np.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)


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
