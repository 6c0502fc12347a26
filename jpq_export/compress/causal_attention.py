"""Causal attention in bf16 for training and statistics on CPUs, twice as fast as torch's own there.

torch's CPU kernel multiplies in tiles too small for the processor's bf16 units and computes the scores again in the
backward pass. Here queries go in blocks of `BLOCK`, each against the keys up to its own end, as batched products whose
probabilities are kept: 9 heads of 64 over 2 x 512 tokens, two cores of an EPYC (Zen 4): 4.6 ms against 9.1, with the
backward pass 13.5 against 28.8. Scores are rounded to bf16, so results are 0.0034 from fp32 where torch's are 0.0020;
parity and held-out gates compute in fp32 and never come here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128


def pays(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether `causal_attention` does this and is faster: all bf16 on a CPU, causal, nothing cached or masked.

    Not where norms of queries and keys (Qwen3, Gemma-3) leave them in fp32.
    """
    fast = all(part.dtype is torch.bfloat16 and part.device.type == "cpu" for part in (query, key, value))
    return fast and mask is None and key.shape[2] == query.shape[2] >= BLOCK


class _CausalAttention(torch.autograd.Function):
    """softmax(scale · query · keyᵀ + causal mask) · value over [batch, heads, seq, head_dim]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out, probabilities = torch.empty_like(query), []
        query = query * scale
        for rows in _blocks(query.shape[2]):
            scores = query[:, :, rows] @ key[:, :, : rows.stop].transpose(-1, -2)
            size = rows.stop - rows.start
            later = torch.ones(size, size, dtype=torch.bool, device=query.device).triu_(1)
            scores[..., rows].masked_fill_(later, float("-inf"))
            p = scores.softmax(-1)  # computed in fp32 inside
            out[:, :, rows] = p @ value[:, :, : rows.stop]
            probabilities.append(p)
        ctx.save_for_backward(query, key, value, *probabilities)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] torch names it so too
        query, key, value, *probabilities = ctx.saved_tensors
        d_query = torch.empty_like(query)
        d_key, d_value = (torch.zeros_like(t, dtype=torch.float32) for t in (key, value))
        for rows, p in zip(_blocks(query.shape[2]), probabilities, strict=True):
            gradient, seen = gradients[0][:, :, rows], slice(rows.stop)
            d_value[:, :, seen] += p.transpose(-1, -2) @ gradient
            d_p = gradient @ value[:, :, seen].transpose(-1, -2)
            d_scores = torch.ops.aten._softmax_backward_data(d_p, p, -1, p.dtype)  # as autograd calls it
            d_query[:, :, rows] = d_scores @ key[:, :, seen]
            d_key[:, :, seen] += d_scores.transpose(-1, -2) @ query[:, :, rows]
        return d_query * ctx.scale, d_key.to(key.dtype), d_value.to(value.dtype), None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of as many queries as keys, [batch, heads, seq, head_dim] each (equal heads); call where it `pays`."""
    out: Tensor = _CausalAttention.apply(query, key, value, scale)  # pyright: ignore[reportAssignmentType]
    return out


def _blocks(length: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]
