"""A linear layer that computes with stored codes and trains its scales: the compressed model while it is still in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from jpq_export.compress.rounding import Rounded


class _ScaledMatMul(torch.autograd.Function):
    """x · (scale * (code - zero))ᵀ; the weight is rebuilt in the backward pass instead of kept (4 bytes a weight saved)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, zeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, codes, zeros, scales)
        ctx.dtype = dtype
        return x.to(dtype) @ expand(codes, zeros, scales, dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, zeros, scales = ctx.saved_tensors
        gradient = gradients[0].to(ctx.dtype)
        dx = (gradient @ expand(codes, zeros, scales, ctx.dtype)).to(x.dtype)
        dscales = None
        if ctx.needs_input_grad[3]:
            dw = gradient.flatten(0, -2).T @ x.to(ctx.dtype).flatten(0, -2)  # [N, K]
            n, groups = scales.shape
            centred = codes.view(n, groups, -1).to(ctx.dtype) - zeros[..., None].to(ctx.dtype)
            dscales = (dw.view(n, groups, -1) * centred).sum(-1).to(scales.dtype)
        return dx, None, None, dscales, None


def expand(codes: Tensor, zeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`; code - zero is exact in bf16 up to 8 bits with half-integer centres up to 6 bits."""
    n, groups = scales.shape
    weight = codes.view(n, groups, -1).to(dtype).sub_(zeros[..., None].to(dtype))
    return weight.mul_(scales[..., None].to(dtype)).view(n, -1)


class QuantLinear(nn.Module):
    """Drop-in for nn.Linear with trainable `scales` [N, K/g] over frozen uint8 codes [N, K]."""

    def __init__(self, rounded: Rounded, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", rounded.codes)
        self.register_buffer("zeros", rounded.zeros)
        self.scales = nn.Parameter(rounded.scales.clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """Dequantized weight, float32 [N, K]."""
        return expand(self.codes, self.zeros, self.scales, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the autocast type when one is active."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if torch.is_grad_enabled():
            y = _ScaledMatMul.apply(x, self.codes, self.zeros, self.scales, dtype)
            return y if self.bias is None else y + self.bias  # pyright: ignore[reportOptionalOperand] always a tensor
        return F.linear(x, expand(self.codes, self.zeros, self.scales, x.dtype), self.bias)

    def rounded(self) -> Rounded:
        """Its codes with the present scales, rounded to what the file stores."""
        return Rounded(self.codes, self.scales.detach().half().float(), self.zeros)


class QuantEmbedding(QuantLinear):
    """The embedding table, looked up by row; the tied head uses it as a linear layer."""

    def look_up(self, ids: Tensor) -> Tensor:
        """ids [...] -> float32 [..., hidden]; gradients reach the scales of the rows used."""
        flat = ids.flatten()
        groups = self.scales.shape[1]
        codes = self.codes[flat].view(len(flat), groups, -1).float() - self.zeros[flat][..., None]
        return (codes * self.scales[flat][..., None]).view(*ids.shape, -1)
