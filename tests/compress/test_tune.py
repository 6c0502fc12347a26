"""Recovery's steps: relative to the scale, smaller where more levels hang on it; killed, resumed, stopped early."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jpq_export.compress import training as training_module
from jpq_export.compress.quant_linear import QuantLinear
from jpq_export.compress.rounding import Rounded
from jpq_export.compress.training import (
    Checkpoint,
    Guard,
    RelativeAdam,
    TuneSettings,
    run_steps,
    schedule,
    step_of,
)
from jpq_export.errors import StorageError
from jpq_export.numerics.levels import normal_bytes


def layer(bits: int, *, seed: int = 0) -> QuantLinear:
    """8 rows of 64 codes that use every level, two groups with scales far apart."""
    codes = torch.arange(64).remainder(2**bits).to(torch.uint8).repeat(8, 1)
    scales = torch.tensor([[0.01, 10.0]]).repeat(8, 1)
    return QuantLinear(Rounded(codes, scales, torch.full((8, 2), (2**bits - 1) / 2)), None)


@pytest.mark.parametrize(("bits", "expected"), [(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.25), (8, 1 / 64)])
def test_a_step_moves_the_outermost_weight_by_the_same_part_of_a_level(bits: int, expected: float) -> None:
    codes = torch.arange(256).remainder(2**bits).to(torch.uint8).repeat(4, 1)
    assert torch.equal(step_of(codes), torch.full((4, 1), expected))


@pytest.mark.parametrize(("bits", "expected"), [(3, 0.5), (4, 0.25), (5, 0.125), (6, 1 / 16)])
def test_a_step_of_normal_levels_is_that_of_as_many_codes(bits: int, expected: float) -> None:
    levels = torch.from_numpy(normal_bytes(bits)).repeat(4, 4)
    assert torch.equal(step_of(levels), torch.full((4, 1), expected))
    mixed = torch.stack([levels[0, : 2**bits], torch.arange(2**bits, dtype=torch.uint8) % 4])
    assert step_of(mixed).flatten().tolist() == [expected, 1.0]


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


ROWS = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))


def training(steps: int, **kind: int) -> tuple[QuantLinear, nn.Parameter, RelativeAdam, Callable[[np.ndarray], float]]:
    """A layer and a norm that learn to multiply as another layer does."""
    module, norm = layer(2), nn.Parameter(torch.ones(64))
    wanted = layer(2).scales.detach() * torch.linspace(0.8, 1.3, 8)[:, None]
    module.start_training(torch.float32)
    goal = (module.centred.view(8, 2, 32) * wanted[..., None]).view(8, 64)
    settings = TuneSettings(steps=steps, scale_rate=0.02, **kind)

    def one_step(index: np.ndarray) -> float:
        x = ROWS[index]
        with torch.enable_grad():
            loss = (module(x * norm) - x @ goal.T).square().mean()
            loss.backward()
        return float(loss.detach())

    return module, norm, RelativeAdam([module], [norm], settings), one_step


def turns(steps: int) -> list[np.ndarray]:
    return list(schedule(len(ROWS), TuneSettings(steps=steps, batch=6), seed=3))


class Killed(Exception):
    pass


def test_a_killed_recovery_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training_module, "CHECKPOINT_SECONDS", -1)  # a file after every step

    def run(guard: Guard | None, *, dies_at: int | None = None) -> tuple[Tensor, Tensor, list[float]]:
        module, norm, optimizer, one_step = training(12, measured_every=3, patience=9)

        def step(index: np.ndarray) -> float:
            calls.append(1)
            if len(calls) == dies_at:
                raise Killed
            return one_step(index)

        calls: list[int] = []
        if guard is not None:
            guard.error = lambda: -float(optimizer.moves[0].detach().abs().sum())  # falls
        losses = run_steps(optimizer, turns(12), step, guard=guard)
        counts.append(len(calls))
        return module.scales.detach(), norm.detach(), losses

    counts: list[int] = []
    whole = run(Guard(Checkpoint(tmp_path / "other")))
    with pytest.raises(Killed):
        run(Guard(Checkpoint(tmp_path / "file")), dies_at=8)
    saved = load_file(tmp_path / "file")
    again = run(Guard(Checkpoint(tmp_path / "file")))
    assert counts == [12, 12 - 7]  # the seven that were done are not done again
    assert torch.equal(whole[0], again[0])
    assert torch.equal(whole[1], again[1])
    assert whole[2] == again[2]
    save_file({name: part for name, part in saved.items() if not name.startswith("adam/")}, tmp_path / "file")
    assert not torch.equal(run(Guard(Checkpoint(tmp_path / "file")))[0], whole[0])  # the twin: moments count
    (tmp_path / "file").write_bytes(b"no file of tensors")
    assert torch.equal(run(Guard(Checkpoint(tmp_path / "file")))[0], whole[0])  # from the start
    assert "recovery starts again" in caplog.text


def test_it_stops_where_the_heldout_error_does_not_fall_and_keeps_the_best() -> None:
    module, norm, optimizer, one_step = training(40, measured_every=2, patience=2)
    seen: list[tuple[Tensor, Tensor]] = []
    errors = iter([5.0, 3.0, 4.0, 3.5, 2.0, 1.0])

    def error() -> float:
        seen.append((module.scales.detach().clone(), norm.detach().clone()))
        return next(errors)

    losses = run_steps(optimizer, turns(40), one_step, guard=Guard(error=error))
    assert len(losses) == 8  # two measurements after the lowest
    assert torch.equal(module.scales.detach(), seen[1][0])
    assert torch.equal(norm.detach(), seen[1][1])
    assert not torch.equal(module.scales.detach(), seen[-1][0])
    falling, *_, step = training(40, measured_every=2, patience=2)
    optimizer = RelativeAdam([falling], [], TuneSettings(steps=40, measured_every=2))
    assert len(run_steps(optimizer, turns(40), step, guard=Guard(error=iter(range(99, 0, -1)).__next__))) == 40


def test_errors_that_are_no_numbers_are_no_best() -> None:
    module, _, optimizer, one_step = training(40, measured_every=2, patience=2)
    errors = iter([float("nan"), 3.0, float("nan"), float("inf"), 1.0])
    seen: list[Tensor] = []

    def error() -> float:
        seen.append(module.scales.detach().clone())
        return next(errors)

    assert len(run_steps(optimizer, turns(40), one_step, guard=Guard(error=error))) == 8
    assert torch.equal(module.scales.detach(), seen[1])


def test_the_last_step_is_measured_too() -> None:
    module, _, optimizer, one_step = training(7, measured_every=3, patience=9)
    measured: list[int] = []
    errors = iter([2.0, 3.0, 1.0])

    def error() -> float:
        measured.append(1)
        return next(errors)

    run_steps(optimizer, turns(7), one_step, guard=Guard(error=error))
    assert len(measured) == 3  # after 3, 6 and 7
    plain, _, other, step = training(7)
    run_steps(other, turns(7), step)
    assert torch.equal(module.scales.detach(), plain.scales.detach())


def test_a_checkpoint_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "no folder" / "file")
    with pytest.raises(StorageError, match="cannot write"):
        checkpoint.save({"x": torch.zeros(3)})
