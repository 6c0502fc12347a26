"""Recovery's steps: relative to the scale, and smaller where more levels hang on it."""

from __future__ import annotations

import pytest
import torch

from jpq_export.compress.quant_linear import QuantLinear
from jpq_export.compress.rounding import Rounded
from jpq_export.compress.tune import RelativeAdam, TuneSettings, step_of


def layer(bits: int, *, seed: int = 0) -> QuantLinear:
    """8 rows of 64 codes that use every level, two groups with scales far apart."""
    codes = torch.arange(64).remainder(2**bits).to(torch.uint8).repeat(8, 1)
    scales = torch.tensor([[0.01, 10.0]]).repeat(8, 1)
    return QuantLinear(Rounded(codes, scales, torch.full((8, 2), (2**bits - 1) / 2)), None)


@pytest.mark.parametrize(("bits", "expected"), [(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.25), (8, 1 / 64)])
def test_a_step_moves_the_outermost_weight_by_the_same_part_of_a_level(bits: int, expected: float) -> None:
    codes = torch.arange(256).remainder(2**bits).to(torch.uint8).repeat(4, 1)
    assert torch.equal(step_of(codes), torch.full((4, 1), expected))


def test_rows_of_several_widths_have_steps_of_their_own() -> None:
    codes = torch.stack([torch.arange(64) % 4, torch.arange(64) % 16]).to(torch.uint8)
    assert step_of(codes).flatten().tolist() == [1.0, 0.25]


@pytest.mark.parametrize("bits", [2, 4])
def test_the_first_step_is_the_rate_times_the_step_whatever_the_scale(bits: int) -> None:
    module, settings = layer(bits), TuneSettings(steps=10, warmup=1)
    before = module.scales.detach().clone()
    optimizer = RelativeAdam([module], [], settings)
    module.scales.grad = torch.tensor([[1.0, -3.0]]).repeat(8, 1)
    optimizer.step(0)
    moved = (module.scales.detach() / before).log()
    expected = torch.tensor([[-1.0, 1.0]]) * settings.scale_rate * 4 / 2**bits  # Adam's first step is the rate
    assert torch.allclose(moved, expected.expand_as(moved), rtol=1e-3)
    assert not torch.allclose(moved, expected.expand_as(moved) * 2, rtol=1e-3)  # the twin: of another width
    assert module.scales.grad is None
