"""A linear layer that computes with stored codes and trains its scales: the compressed model in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from jpq_export.compress.rounding import Rounded


class _ScaledMatMul(torch.autograd.Function):
    """x · (scale * centred)ᵀ with centred = code - zero [N, K], in the type of `centred`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, centred: Tensor, scales: Tensor) -> Tensor:
        n, groups = scales.shape
        weight = (centred.view(n, groups, -1) * scales[..., None].to(centred.dtype)).view(n, -1)
        x = x.to(centred.dtype)
        ctx.save_for_backward(x, centred, weight)
        ctx.groups = groups
        return x @ weight.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] torch names it so too
        x, centred, weight = ctx.saved_tensors
        gradient = gradients[0].to(centred.dtype)
        dscales = None
        if ctx.needs_input_grad[2]:
            dw = gradient.flatten(0, -2).T @ x.flatten(0, -2)  # [N, K]
            dscales = scale_gradient(dw, centred, ctx.groups)
        return gradient @ weight, None, dscales


def expand(codes: Tensor, zeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`."""
    n, groups = scales.shape
    weight = codes.view(n, groups, -1).to(dtype).sub_(zeros[..., None].to(dtype))
    return weight.mul_(scales[..., None].to(dtype)).view(n, -1)


def scale_gradient(dw: Tensor, centred: Tensor, groups: int) -> Tensor:
    """dL/dscale = Σ over the group of dL/dw * (code - zero): float32 [N, K/g]."""
    n = len(dw)
    return (dw * centred).view(n, groups, -1).sum(-1, dtype=torch.float32)


class QuantLinear(nn.Module):
    """Drop-in for nn.Linear with trainable `scales` [N, K/g] over frozen uint8 codes [N, K]."""

    codes: Tensor
    zeros: Tensor

    def __init__(self, rounded: Rounded, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", rounded.codes)
        self.register_buffer("zeros", rounded.zeros)
        self.scales = nn.Parameter(rounded.scales.clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
        self.centred: Tensor | None = None
        self.branch: tuple[Tensor, Tensor] | None = None  # frozen, low-rank: [K, rank] and [rank, N]

    @property
    def weight(self) -> Tensor:
        """Dequantized weight, float32 [N, K]."""
        return expand(self.codes, self.zeros, self.scales, torch.float32)

    def start_training(self, dtype: torch.dtype) -> None:
        """Keep code - zero in `dtype` (exact: at most 8 bits and a half) so that a step only multiplies."""
        n, groups = self.scales.shape
        self.centred = (self.codes.view(n, groups, -1).float() - self.zeros[..., None]).view(n, -1).to(dtype)
        self.scales.requires_grad_(True)

    def stop_training(self) -> None:
        """Free what training kept."""
        self.centred = None
        self.scales.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]; in the training type while training."""
        y = self._product(x)
        return y if self.branch is None else y + (x @ self.branch[0].to(x.dtype)) @ self.branch[1].to(x.dtype)

    def _product(self, x: Tensor) -> Tensor:
        if self.centred is not None and torch.is_grad_enabled():
            y: Tensor = _ScaledMatMul.apply(x, self.centred, self.scales)  # pyright: ignore[reportAssignmentType]
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    def expanded(self) -> Tensor:
        """The weight [N, K] in the training type, detached."""
        assert self.centred is not None
        n, groups = self.scales.shape
        return (self.centred.view(n, groups, -1) * self.scales.detach()[..., None].to(self.centred.dtype)).view(n, -1)

    def add_scale_gradient(self, dw: Tensor) -> None:
        """Accumulate the scales' gradient from a weight gradient [N, K] computed elsewhere."""
        assert self.centred is not None
        fresh = scale_gradient(dw, self.centred, self.scales.shape[1])
        self.scales.grad = fresh if self.scales.grad is None else self.scales.grad + fresh

    def rounded(self) -> Rounded:
        """Its codes with the present scales, rounded to what the file stores."""
        return Rounded(self.codes, self.scales.detach().half().float(), self.zeros)


class QuantEmbedding(QuantLinear):
    """The embedding table, looked up by row; the tied head uses it as a linear layer."""

    def look_up(self, ids: Tensor) -> Tensor:
        """Ids [...] -> float32 [..., hidden]; gradients reach the scales of the rows used."""
        flat = ids.flatten()
        groups = self.scales.shape[1]
        codes = self.codes[flat].view(len(flat), groups, -1).float() - self.zeros[flat][..., None]
        return (codes * self.scales[flat][..., None]).view(*ids.shape, -1)
