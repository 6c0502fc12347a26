"""Scores of answers equal a plain fp64 log-softmax of one sequence at a time, in both runtimes and any batching."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jpq_export.compress.load import load_model
from jpq_export.errors import ModelError
from jpq_export.evaluate import answers, predictors
from jpq_export.evaluate.answers import Score, score_answers
from jpq_export.evaluate.predictors import OrtPredictor, TorchPredictor
from jpq_export.lower.export import export_onnx
from jpq_export.runtime.session import OrtModel

VOCAB = 320
# fp32 sums over 320 logits and up to 9 tokens, against fp64
TOLERANCE = 2e-5


def make_pairs() -> list[tuple[list[int], list[int]]]:
    """Contexts of 1 to 12 tokens, some shared; answers of 1 to 9 tokens, some twice."""
    draw = np.random.default_rng(5)
    pairs = []
    for length in (7, 12, 7, 1, 3, 12):
        context = draw.integers(0, VOCAB, length).tolist()
        pairs += [(context, draw.integers(0, VOCAB, int(n)).tolist()) for n in draw.integers(1, 10, 3)]
    return [*pairs, pairs[4]]


def slow(logits_of: Callable[[list[int]], np.ndarray], context: list[int], answer: list[int]) -> Score:
    """The definition: every token's log-probability after all tokens before it."""
    total, greedy = 0.0, True
    for i, token in enumerate(answer):
        row = logits_of(context + answer[:i])[-1].astype(np.float64)
        total += row[token] - row.max() - np.log(np.exp(row - row.max()).sum())
        greedy &= int(row.argmax()) == token
    return Score(total, greedy)


@pytest.fixture(params=["llama", "gemma3"])
def decoder(request: pytest.FixtureRequest, tiny_folder: Callable[..., Path]) -> Any:
    return load_model(str(tiny_folder(request.param))).model


def torch_logits(decoder: Any) -> Callable[[list[int]], np.ndarray]:
    def logits(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return decoder(torch.tensor([ids]))[0].numpy()

    return logits


def test_equals_the_definition(decoder: Any) -> None:
    pairs, logits = make_pairs(), torch_logits(decoder)
    best = int(logits(pairs[0][0])[-1].argmax())
    pairs.append((pairs[0][0], [best]))
    got = score_answers(TorchPredictor(decoder), pairs)
    expected = [slow(logits, *pair) for pair in pairs]
    assert [s.log_likelihood for s in got] == pytest.approx([s.log_likelihood for s in expected], abs=TOLERANCE)
    assert [s.greedy for s in got] == [s.greedy for s in expected]
    assert got[-1].greedy
    assert not got[0].greedy
    twin = score_answers(TorchPredictor(decoder), [(context[::-1], answer) for context, answer in pairs])
    assert max(abs(a.log_likelihood - b.log_likelihood) for a, b in zip(twin, got, strict=True)) > 100 * TOLERANCE


@pytest.mark.parametrize(("tokens", "values"), [(1, 1), (20, 3 * VOCAB), (10**6, 10**9)])
def test_any_batching_gives_the_same(decoder: Any, tokens: int, values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = score_answers(TorchPredictor(decoder), make_pairs())
    monkeypatch.setattr(answers, "TOKENS", tokens)
    monkeypatch.setattr(predictors, "CHUNK_VALUES", values)
    after = score_answers(TorchPredictor(decoder), make_pairs())
    assert [s.log_likelihood for s in after] == pytest.approx([s.log_likelihood for s in before], abs=TOLERANCE)


def test_a_shared_context_is_read_once(decoder: Any) -> None:
    read: list[int] = []
    predictor = TorchPredictor(decoder)
    original = predictor.read
    predictor.read = lambda contexts: (read.append(contexts.size), original(contexts))[1]  # type: ignore[method-assign]
    seen = []
    score_answers(predictor, make_pairs(), progress=lambda done, total: seen.append((done, total)))
    assert sum(read) == 7 + 12 + 7 + 1 + 3 + 12
    assert seen[-1] == (19, 19)


@pytest.mark.parametrize("values", [1, 10**9])
def test_onnxruntime_gives_the_same(
    values: int, tmp_path: Path, conftest_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pruned model with a sliding window and a layer without attention, at most 24 positions."""
    from jpq_export.compress.student import dequantized

    monkeypatch.setattr(predictors, "CHUNK_VALUES", values)
    runtime = conftest_of("runtime")
    compressed = runtime.random_model(runtime.SPEC)
    export_onnx(compressed, tmp_path / "model.onnx", form="custom_op")
    pairs = [([i % 40 for i in context], [i % 40 for i in answer]) for context, answer in make_pairs()]
    ours = score_answers(OrtPredictor(OrtModel(tmp_path / "model.onnx", threads=1)), pairs)
    theirs = score_answers(TorchPredictor(dequantized(compressed)), pairs)
    got, expected = ([s.log_likelihood for s in scores] for scores in (ours, theirs))
    assert got == pytest.approx(expected, abs=1e-4)  # parity's fp32 bound, over up to nine tokens
    assert got != pytest.approx(np.roll(expected, 1).tolist(), abs=1e-2)


def test_a_damaged_model_and_empty_answers_are_refused(decoder: Any) -> None:
    with pytest.raises(ValueError, match="pair 1: 2 context and 0 answer"):
        score_answers(TorchPredictor(decoder), [([1], [2]), ([1, 2], [])])
    decoder.norm.weight[3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        score_answers(TorchPredictor(decoder), [([1, 2], [3])])
