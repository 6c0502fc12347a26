"""Shares of the work and their sums; two real processes are in tests/test_torchrun.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jpq_export.compress import parallel, statistics
from jpq_export.compress.decoder import Decoder
from jpq_export.compress.load import load_model
from jpq_export.errors import ModelError, UsageError


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`as_rank(1, 2)`: this process takes that rank's share; nothing is exchanged."""

    def become(rank: int, world: int) -> None:
        monkeypatch.setattr(parallel, "rank", lambda: rank)
        monkeypatch.setattr(parallel, "world", lambda: world)
        for name in ("add_up", "joined"):
            monkeypatch.setattr(parallel, name, lambda tensor: tensor)

    return become


@pytest.fixture(scope="module")
def teacher(save_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    model = load_model(str(save_tiny(tmp_path_factory.mktemp("m"), "llama"))).model
    assert isinstance(model, Decoder)
    return model


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8])
def test_shares_are_all_and_differ_by_one_at_most(as_rank: Callable[..., None], count: int) -> None:
    shares = []
    for rank in range(3):
        as_rank(rank, 3)
        shares.append(range(count)[parallel.share(count)])
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_work_is_spread_evenly(as_rank: Callable[..., None]) -> None:
    as_rank(0, 2)
    costs = [1.0, 1.0, 8.0, 1.0, 3.0, 1.0, 1.0]
    owners = parallel.spread(costs)
    assert sorted(set(owners)) == [0, 1]
    assert [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in (0, 1)] == [8.0, 8.0]


def test_a_process_without_work_is_refused(as_rank: Callable[..., None]) -> None:
    as_rank(0, 9)
    with pytest.raises(UsageError, match="9 processes, but only 8 calibration sequences"):
        parallel.check_share(8, "calibration sequences")
    parallel.check_share(9, "calibration sequences")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(parallel.ranks, "local_world", lambda: 2)
    assert parallel._take_gpu(3) == "cpu:gloo,cuda:nccl"  # the second process of the second machine
    assert chosen == [1]
    monkeypatch.setattr(parallel.ranks, "local_world", lambda: 3)
    with pytest.raises(UsageError, match=r"3 processes for 2 GPU\(s\)"):
        parallel._take_gpu(0)


def test_processes_with_different_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "gathered", lambda value: [value, "other"])
    with pytest.raises(ModelError, match="m: the processes of this run have read different weights"):
        parallel.check_same("mine", "m")
    parallel.check_same("other", "m")


def test_shares_of_the_sequences_sum_to_the_statistics_of_one_process(
    teacher: Decoder, as_rank: Callable[..., None]
) -> None:
    sequences = np.random.default_rng(0).integers(0, 256, (5, 24))
    kind: dict[str, Any] = {"seed": 3, "outputs": False}
    whole = statistics.collect(teacher, sequences, **kind)
    parts, alien = [], []
    for rank in range(2):
        as_rank(rank, 2)
        parts.append(statistics.collect(teacher, sequences, **kind))
        alien.append(statistics.collect(teacher, sequences, seed=3 + rank))
    for name, H in whole.hessians.items():
        assert torch.allclose(
            sum(part.hessians[name] for part in parts), H, rtol=2e-3, atol=1e-3 * float(H.abs().max())
        )
    for name, gates in whole.gates.items():
        assert torch.allclose(sum(part.gates[name] for part in parts), gates, rtol=5e-2)
    name = "layers.0.attn.q"  # the twin: targets that hang on the rank
    assert not torch.allclose(sum(part.hessians[name] for part in alien), whole.hessians[name], rtol=0.1)
