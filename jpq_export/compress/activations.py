"""Rounding of activations: what every linear of the layers reads, token by token, as an integer kernel would get it.

The modes of the literature's W4A4, W8A8 and W3.2A3.2; the weights' width is the budget's. Symmetric, one step a token:

    A8, A4     step = max |x| / (2^(b-1) - 1),  codes = round(x / step), ties to even
    A3.2       the fifth of the channels with the largest magnitudes on calibration text at 4 bits, the others at 3,
               each part with a step of its own: 0.2 · 4 + 0.8 · 3 = 3.2

The head's input stays as it is, as in the literature. Nothing is rotated first: at 4 bits and below outlier channels
cost what SmoothQuant's and QuaRot's papers say they cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

FLOAT_BITS = 16.0  # as computed
ACTIVATION_BITS = (FLOAT_BITS, 8.0, 4.0, 3.2)
MIXED, MIXED_HIGH, MIXED_LOW, PRECISE_SHARE = 3.2, 4, 3, 0.2
CALIBRATION_TOKENS = 4096  # the largest magnitude of a channel moves little after some thousand tokens
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Rounding:
    """`bits` of every token; `precise`: by linear, bool [K], its channels in the high precision (only of A3.2)."""

    bits: float
    precise: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check: bits that no mode has are a ValueError."""
        if self.bits not in ACTIVATION_BITS:
            raise ValueError(f"activation bits: expected one of {ACTIVATION_BITS}, got {self.bits}")

    def of(self, x: Tensor, name: str) -> Tensor:
        """The input x [..., K] of a linear, rounded."""
        if self.bits == FLOAT_BITS:
            return x
        if self.bits == MIXED:
            high, zero = self.precise[name], x.new_zeros(())
            return rounded(torch.where(high, x, zero), MIXED_HIGH) + rounded(torch.where(high, zero, x), MIXED_LOW)
        return rounded(x, int(self.bits))


def rounded(x: Tensor, bits: int) -> Tensor:
    """Every token of x [..., K] at `bits` bits around zero; the gradient passes straight through."""
    top = 2 ** (bits - 1) - 1
    step = (x.detach().abs().amax(-1, keepdim=True) / top).clamp(min=TINY)
    out = (x.detach() / step).round() * step
    return x + (out - x).detach() if torch.is_grad_enabled() and x.requires_grad else out


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linears of the layers by canonical name, quantized or not; the head is none of them."""
    parts = ("q", "k", "v", "o", "gate", "up", "down")
    named = model.named_modules()
    return {n: m for n, m in named if n.startswith("layers.") and n.rsplit(".", 1)[-1] in parts}


def round_inputs(model: nn.Module, rounding: Rounding) -> list[torch.utils.hooks.RemovableHandle]:
    """Let every linear of the layers read rounded inputs from now on; the handles undo it."""
    return [
        module.register_forward_pre_hook(lambda _m, inputs, name=name: (rounding.of(inputs[0], name),))
        for name, module in linears(model).items()
    ]


@contextmanager
def rounded_inputs(model: nn.Module, rounding: Rounding) -> Iterator[None]:
    """`round_inputs` for the time of a with block."""
    handles = round_inputs(model, rounding)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def rounding_for(model: nn.Module, bits: float, sequences: np.ndarray) -> Rounding:
    """The rounding of a decoder at `bits` bits; A3.2 looks for its channels on `sequences` int64 [n, length]."""
    if bits != MIXED:
        return Rounding(bits)
    peaks: dict[str, Tensor] = {}

    def watch(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        peak = inputs[0].abs().flatten(0, -2).amax(0)
        peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

    handles = [module.register_forward_pre_hook(partial(watch, name)) for name, module in linears(model).items()]
    try:
        ids = torch.from_numpy(sequences[: max(1, CALIBRATION_TOKENS // sequences.shape[1])])
        for part in ids.to(next(model.parameters()).device).split(4):
            model.hidden(part, model.context(part))  # pyright: ignore[reportCallIssue] a Decoder
    finally:
        for handle in handles:
            handle.remove()
    return Rounding(bits, {name: _largest(peak) for name, peak in peaks.items()})


def _largest(peak: Tensor) -> Tensor:
    """The fifth with the largest values, at least one: bool [K]."""
    high = torch.zeros(len(peak), dtype=torch.bool, device=peak.device)
    high[peak.argsort(descending=True, stable=True)[: max(1, round(PRECISE_SHARE * len(peak)))]] = True
    return high
