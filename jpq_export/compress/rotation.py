"""An orthogonal change of basis that is cheap to apply: A ⊗ B, with B a Hadamard matrix of random signs."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from jpq_export.format.spec import rotation_sizes


class Rotation(nn.Module):
    """Into the basis of a rotated stream and back: x (A ⊗ B), x (A ⊗ B)ᵀ, in fp32 (see `rotated`)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.sizes = rotation_sizes(hidden)
        self.outer, self.inner = (nn.Parameter(torch.eye(size).flatten()) for size in self.sizes)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        outer, inner = self._factors()
        return self._apply_both(x, outer.T, inner)

    def back(self, x: Tensor) -> Tensor:
        """Undo `forward`."""
        outer, inner = self._factors()
        return self._apply_both(x, outer, inner.T)

    def _factors(self) -> list[Tensor]:
        return [p.view(size, size) for p, size in zip((self.outer, self.inner), self.sizes, strict=True)]

    def _apply_both(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # the stream stays fp32
            return (left @ (x.float().unflatten(-1, self.sizes) @ right)).flatten(-2)


def make_rotation(hidden: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A [a, a] and B [b, b], orthogonal, float64, with a * b = hidden; the same on every machine."""
    random = np.random.default_rng(seed)
    a, b = rotation_sizes(hidden)
    inner = np.ones((1, 1))
    while len(inner) < b:
        inner = np.block([[inner, inner], [inner, -inner]])
    inner = random.choice([-1.0, 1.0], b)[:, None] * inner / math.sqrt(b)
    outer = np.eye(a)
    for _ in range(a):  # reflections: without LAPACK, whose signs differ
        axis = random.normal(size=a)
        outer -= 2 / (axis @ axis) * np.outer(outer @ axis, axis)
    return outer, inner
