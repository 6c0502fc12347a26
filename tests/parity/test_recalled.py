"""The remembered reference says what the reference says, computes each pass once, and never mixes caches up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jpq_export.format.compressed import CompressedModel
from jpq_export.format.spec import INT8_CACHE
from jpq_export.parity import recalled
from jpq_export.parity.check import check_parity
from jpq_export.parity.recalled import Recalled
from jpq_export.parity.runners import Outcome, TorchRunner
from jpq_export.parity.vectors import record_vectors

PROMPT = np.array([[5, 90, 3, 41, 17, 66, 2, 8, 30]], np.int64)


class Counting(TorchRunner):
    """Counts passes."""

    passes = 0

    def forward(self, ids: np.ndarray, **options: Any) -> Outcome:
        self.passes += 1
        return super().forward(ids, **options)


def decode(runner: Any, tokens: list[int], *, values: bool = False) -> list[np.ndarray]:
    outcome = runner.forward(PROMPT, values=values)
    rows = [outcome.logits]
    for token in tokens:
        outcome = runner.forward(np.array([[token]], np.int64), cache=outcome.cache)
        rows.append(outcome.logits)
    return rows


def test_the_same_passes_are_computed_once(models: dict[str, CompressedModel]) -> None:
    inner = Counting(models["llama"])
    runner = Recalled(inner)
    first, again = decode(runner, [3, 5, 7]), decode(runner, [3, 5, 7])
    assert inner.passes == 4
    assert all(a is b for a, b in zip(first, again, strict=True))
    # Values of points are another pass of the same tokens; what follows it is not.
    decode(runner, [3, 5, 7], values=True)
    assert inner.passes == 5


def test_another_token_or_a_longer_run_is_computed_from_the_right_cache(models: dict[str, CompressedModel]) -> None:
    runner, fresh = Recalled(TorchRunner(models["llama"])), TorchRunner(models["llama"])
    decode(runner, [3, 5])
    for tokens in ([3, 5, 7, 9], [3, 6, 7], [3, 5, 7, 8]):  # goes on behind what was remembered, branches off it, twice
        for ours, theirs in zip(decode(runner, tokens), decode(fresh, tokens), strict=True):
            assert np.array_equal(ours, theirs)


def test_one_cache_may_be_gone_on_with_twice(models: dict[str, CompressedModel]) -> None:
    runner, fresh = Recalled(TorchRunner(models["llama"])), TorchRunner(models["llama"])
    start = runner.forward(PROMPT)
    for token in (3, 4):
        step = np.array([[token]], np.int64)
        wanted = fresh.forward(step, cache=fresh.forward(PROMPT).cache)
        assert np.array_equal(runner.forward(step, cache=start.cache).logits, wanted.logits)


def test_masks_tell_passes_apart(models: dict[str, CompressedModel]) -> None:
    runner, fresh = Recalled(TorchRunner(models["llama"])), TorchRunner(models["llama"])
    padded = np.array([[0, 0, *PROMPT[0]]], np.int64)
    for mask in (np.ones_like(padded), (np.arange(11) >= 2)[None].astype(np.int64)):
        assert np.array_equal(runner.forward(padded, mask=mask).logits, fresh.forward(padded, mask=mask).logits)


def test_given_codes_are_never_remembered(models: dict[str, CompressedModel]) -> None:
    model = models["llama"]
    inner = Counting(replace(model, spec=replace(model.spec, kv_cache=INT8_CACHE)))
    runner = Recalled(inner)
    free = runner.forward(PROMPT)
    other = {name: np.zeros_like(value) for name, value in free.written.items()}
    told = runner.forward(PROMPT, given=other)
    assert not np.array_equal(told.logits, free.logits)
    step = np.array([[3]], np.int64)
    after_free, after_told = (runner.forward(step, cache=each.cache).logits for each in (free, told))
    assert not np.array_equal(after_free, after_told)
    assert np.array_equal(runner.forward(PROMPT).logits, free.logits)
    assert inner.passes == 4
    with pytest.raises(ValueError, match="given codes"):
        runner.forward(step, cache=told.cache)


def test_what_is_kept_is_bounded(models: dict[str, CompressedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recalled, "MOST_BYTES", 0)
    inner = Counting(models["llama"])
    runner, fresh = Recalled(inner), TorchRunner(models["llama"])
    for _ in range(2):
        for ours, theirs in zip(decode(runner, [3, 5]), decode(fresh, [3, 5]), strict=True):
            assert np.array_equal(ours, theirs)
    assert inner.passes == 6


def test_a_second_runtime_costs_the_reference_nothing(
    models: dict[str, CompressedModel], bundle: Path, prompts: list[list[int]]
) -> None:
    inner = Counting(models["llama"])
    report = check_parity(models["llama"], bundle / "model.onnx", prompts=prompts, steps=8, reference=Recalled(inner))
    assert report.passed
    assert len(report.runtimes) + (report.as_run is not None) > 1
    # The prefill with and without values and for the cache that decoding goes on with, the padded batch and its four
    # steps, seven steps behind the first token.
    assert inner.passes == 3 + 5 + 7


def test_vectors_of_the_same_cases_cost_nothing_and_are_the_same(
    models: dict[str, CompressedModel], bundle: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    inner, path = Counting(models["llama"]), bundle / "model.onnx"
    reference = Recalled(inner)
    check_parity(models["llama"], path, prompts=prompts, steps=8, reference=reference)
    before = inner.passes
    files = {"recalled": reference, "fresh": TorchRunner(models["llama"])}
    for name, runner in files.items():
        record_vectors(models["llama"], tmp_path / name, prompts=prompts, steps=8, runner=runner)
    assert inner.passes == before
    assert (tmp_path / "recalled").read_bytes() == (tmp_path / "fresh").read_bytes()
