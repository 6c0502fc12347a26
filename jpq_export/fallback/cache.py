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


def check_layers(cache: Any) -> None:
    """ValueError when a layer keeps anything else than keys and values, such as the state of a recurrence."""
    for layer in getattr(cache, "layers", ()):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):  # subclasses keep other states too
            raise ValueError(f"a layer of its cache is a {type(layer).__name__}, expected keys and values")


def past_tensors(cache: Any) -> list[Tensor]:
    """Undo `cache_of`; ValueError when there is anything else than keys and values of all layers."""
    check_layers(cache)
    kept = [tensor for layer in getattr(cache, "layers", ()) for tensor in (layer.keys, layer.values)]
    if not kept or any(tensor is None or tensor.dim() != 4 for tensor in kept):
        raise ValueError(f"its cache is a {type(cache).__name__}, expected keys and values of every layer")
    return kept
