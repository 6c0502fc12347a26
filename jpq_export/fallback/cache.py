"""Keys and values as flat tensors and as the cache transformers' models take: torch.onnx.export knows tensors only."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

NAMES = ("cache", "past_key_values")  # of transformers from 5.24 on, and before


def cache_argument(model: Any) -> str | None:
    """What the model calls its cache, as an argument and in what it returns; None when it takes none."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in NAMES if name in taken), None)


def cache_of(past: Sequence[Tensor]) -> DynamicCache:
    """A cache that holds [key, value] of every layer in turn, each [batch, kv_heads, past, head_dim].

    Every layer keeps all tokens: where the model has a window, its mask hides the others. The fields are set as
    `update` leaves them, because `update` itself starts by joining with an empty tensor of one dimension, which ONNX
    does not know.
    """
    cache = DynamicCache()
    for key, value in zip(past[::2], past[1::2], strict=True):
        layer: Any = DynamicLayer()
        layer.dtype, layer.device = key.dtype, key.device
        layer.keys, layer.values, layer.is_initialized = key, value, True
        cache.layers.append(layer)
    return cache


def past_tensors(cache: Any) -> list[Tensor]:
    """Undo `cache_of`; ValueError when layers keep anything else than keys and values."""
    layers = getattr(cache, "layers", None)
    if not layers:
        raise ValueError(f"its cache is a {type(cache).__name__}, expected keys and values of every layer")
    out = []
    for layer in layers:
        plain = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)  # subclasses keep other states too
        if not plain or layer.keys is None or layer.keys.dim() != 4:
            raise ValueError(f"a layer of its cache is a {type(layer).__name__}, expected keys and values")
        out += [layer.keys, layer.values]
    return out
