"""The int8 key/value cache in PyTorch: the numbers the graph of `lower/int8_cache.py` keeps and reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (layer, key, value [batch, kv_heads, new, head_dim]) -> both as attention will read them
Stored = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
LARGEST = 127
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # divisor of a row of zeros, whose codes and scale are 0


def to_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [..., head_dim] and scales float32 [..., 1], one for each (batch, head, position); ties to even."""
    scale = x.float().abs().amax(-1, keepdim=True) / LARGEST
    return torch.round(x.float() / scale.clamp(min=SMALLEST_SCALE)).to(torch.int8), scale


def from_codes(codes: Tensor, scale: Tensor) -> Tensor:
    """What attention reads: float32 [..., head_dim]."""
    return codes.float() * scale


def stored_int8(_layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values after a trip through the cache."""
    return from_codes(*to_codes(key)).to(key.dtype), from_codes(*to_codes(value)).to(value.dtype)
