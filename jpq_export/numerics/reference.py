"""What each `jpq::` operator means, in numpy. Every other implementation is checked against these lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jpq_export.numerics.affine import QuantizedWeight

LARGEST_CODE = 127  # of an int8 cache, and of activations in 8 bits
MAX_DISTANCE = 128  # in tokens; all farther ones share the last bucket


@dataclass(frozen=True, slots=True, eq=False)
class ChainLink:
    """A link of `low_bit_chain`: weights and biases; `then` "give", "sum", "silu" or "gelu_tanh"; norms of a sum."""

    weights: tuple[tuple[QuantizedWeight, np.ndarray | None], ...]
    then: str
    post: np.ndarray | None = None
    norm: np.ndarray | None = None


def low_bit_matmul(x: np.ndarray, weight: QuantizedWeight, bias: np.ndarray | None = None) -> np.ndarray:
    """`jpq::LowBitMatMul`: Y = X · dequantize(weight)ᵀ (+ bias); X [..., K] -> Y [..., N], in fp32 or wider."""
    wide = np.float64 if x.dtype == np.float64 else np.float32
    y = x.astype(wide) @ weight.dequantize().astype(wide).T
    if bias is not None:
        y = y + bias.astype(wide)
    return y.astype(x.dtype)


def low_bit_matmul_integer(x: np.ndarray, weight: QuantizedWeight, bias: np.ndarray | None = None) -> np.ndarray:
    """`jpq::LowBitMatMulInteger`: `low_bit_matmul` of X with every token (last axis) rounded to 8 bits."""
    codes, step = int8_codes(x)
    return low_bit_matmul(codes.astype(x.dtype) * step, weight, bias)


def add_rms_norm(a: np.ndarray, b: np.ndarray, weight: np.ndarray, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """`jpq::AddRMSNormalization`: (a + b, its norm over the last axis); a, b [..., width], weight [width]."""
    total = a + b
    return total, total / np.sqrt(np.mean(np.square(total), -1, keepdims=True) + epsilon) * weight


def silu_mul(x: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """`jpq::SiluMul`: x * sigmoid(x) * factor, of one shape."""
    return x / (1 + np.exp(-np.maximum(x, -700))) * factor


def gelu_tanh_mul(x: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """`jpq::GeluTanhMul`: GELU in its tanh form of x, * factor."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) * factor


def low_bit_chain(
    x: np.ndarray, stream: np.ndarray, links: Sequence[ChainLink], epsilon: float
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """`jpq::LowBitChain`: the stream after every sum, and what the last link gives."""
    sums = [stream]
    given = [x]
    for link in links:
        products = [low_bit_matmul(given[0], weight, bias) for weight, bias in link.weights]
        if link.then == "give":
            given = products
        elif link.then in ("silu", "gelu_tanh"):
            given = [(silu_mul if link.then == "silu" else gelu_tanh_mul)(*products)]
        else:
            y = products[0]
            if link.post is not None:
                y = add_rms_norm(y, np.zeros_like(y), link.post, epsilon)[1]
            given = []
            if link.norm is None:
                sums.append(sums[-1] + y)
            else:
                total, normed = add_rms_norm(sums[-1], y, link.norm, epsilon)
                sums.append(total)
                given = [normed]
    return sums[1:], given


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
    key, value = (x.reshape(batch, seq, kv_heads, -1) for x in (key, value))
    if rotary is not None:
        key = _rotate(key, *rotary)
    present = [_append(old, new, total) for old, new in zip(past, (key, value), strict=True)]
    output = _attend(query, present[0][:total], present[1][:total], mask, rotary, heads=heads, scale=scale)
    return output, present[0], present[1]


def int8_codes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 [..., dim] and scales [..., 1] of keys, values or activations: max |x| / 127, ties to even."""
    scale = np.abs(x).max(-1, keepdims=True) / x.dtype.type(LARGEST_CODE)
    return np.rint(x / np.maximum(scale, np.finfo(np.float32).tiny)).astype(np.int8), scale


def cache_codes(
    key: np.ndarray, value: np.ndarray, rotary: tuple[np.ndarray, np.ndarray] | None = None, *, kv_heads: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`jpq::CacheCodes`: codes of keys (turned first) and of values [batch, seq, kv_heads, dim], then their scales."""
    key, value = (x.reshape(*x.shape[:2], kv_heads, -1) for x in (key, value))
    if rotary is not None:
        key = _rotate(key, *rotary)
    (keys, key_scale), (values, value_scale) = int8_codes(key), int8_codes(value)
    return keys, values, key_scale, value_scale


def int8_attention(
    query: np.ndarray,
    new: tuple[np.ndarray, ...],
    mask: np.ndarray,
    past: tuple[np.ndarray, ...],
    rotary: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    heads: int,
    scale: float,
) -> tuple[np.ndarray, ...]:
    """`jpq::Int8Attention`: as `attention` with codes and scales of `new` and `past` in the order of `cache_codes`.

    Of `past` the first two dimensions are [room, batch], of `new` [batch, seq]. `rotary` turns the query. In the
    query's precision.
    """
    total = mask.shape[-1]
    present = [_append(old, rows, total) for old, rows in zip(past, new, strict=True)]
    keys, values = (
        codes[:total] * steps[:total].astype(query.dtype) for codes, steps in zip(present[:2], present[2:], strict=True)
    )
    return _attend(query, keys, values, mask, rotary, heads=heads, scale=scale), *present


def _append(past: np.ndarray, new: np.ndarray, total: int) -> np.ndarray:
    """New rows [batch, seq, ...] in the cache [room, batch, ...], which then holds `total`."""
    return np.concatenate([past[: total - new.shape[1]], new.swapaxes(0, 1), past[total:]])


def _attend(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    mask: np.ndarray,
    rotary: tuple[np.ndarray, np.ndarray] | None,
    *,
    heads: int,
    scale: float,
) -> np.ndarray:
    """Softmax of queries [batch, seq, heads * dim] and keys, times values, both [total, batch, kv_heads, dim]."""
    batch, seq, _ = query.shape
    query = query.reshape(batch, seq, heads, -1)
    if rotary is not None:
        query = _rotate(query, *rotary)
    keys, values = (np.repeat(rows, heads // rows.shape[2], axis=2) for rows in (keys, values))
    scores = np.where(mask, np.einsum("bshd,tbhd->bhst", query, keys) * scale, -np.inf)
    peak = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isinf(peak), 0, peak))
    sums = weights.sum(-1, keepdims=True)
    output = np.einsum("bhst,tbhd->bshd", weights / np.where(sums == 0, 1, sums), values)
    return output.reshape(batch, seq, -1)


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
