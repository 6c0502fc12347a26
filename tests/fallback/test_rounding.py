"""Moments and rounding of the fallback against what transformers' hidden states say; `eval` and `run` on the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jpq_export.compress.rounding import quantize
from jpq_export.fallback.load import load_traced
from jpq_export.fallback.rounding import input_moments, layers_of, round_model
from jpq_export.numerics.scheme import Scheme
from jpq_export.runtime import load

QKV, EMBED = "gpt_neox.layers.1.attention.query_key_value", "gpt_neox.embed_in"


@pytest.fixture
def loaded(tmp_path: Path, save_tiny: Callable[..., Path]) -> Any:
    return load_traced(str(save_tiny(tmp_path / "m", "gpt_neox")))


@pytest.fixture
def sequences() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 24))


def moment(loaded: Any, sequences: np.ndarray) -> torch.Tensor:
    """Of what the second layer's attention reads, from hidden states."""
    states = loaded.model(torch.from_numpy(sequences), output_hidden_states=True).hidden_states[1]
    x = loaded.model.gpt_neox.layers[1].input_layernorm(states).flatten(0, 1)
    return x.T @ x / len(x)


def test_moments_are_those_of_the_hidden_states(loaded: Any, sequences: np.ndarray) -> None:
    got = input_moments(loaded, [QKV], sequences)[QKV]
    assert torch.allclose(got, moment(loaded, sequences), rtol=1e-4, atol=1e-5)
    loaded.matrix(EMBED).mul_(torch.linspace(0.5, 1.5, 64))  # the twin: another prefix, other moments
    assert not torch.allclose(got, moment(loaded, sequences), rtol=1e-2, atol=1e-2)


def test_a_layer_is_rounded_under_moments_of_the_rounded_prefix(loaded: Any, sequences: np.ndarray) -> None:
    schemes = {name: Scheme(3, 16, symmetric=False) for name in loaded.spec.matrices()}
    before = loaded.matrix(QKV).clone()
    groups = layers_of(schemes, loaded)
    assert [len(group) for group in groups] == [1, 4, 4, 1]  # table, two layers, head
    stored = round_model(loaded, schemes, sequences, method="gptq", passes=1)
    for name, weight in stored.items():
        assert np.array_equal(loaded.matrix(name).numpy(), weight.dequantize())
    # All before the second layer is rounded now, and was then.
    expected = quantize(before, moment(loaded, sequences), schemes[QKV], method="gptq")
    same = (expected.codes.numpy() == stored[QKV].codes()).mean()
    assert same > 0.999  # moments of hidden states are sums in another order
    other = quantize(before, torch.eye(64), schemes[QKV], method="gptq")
    assert (other.codes.numpy() == stored[QKV].codes()).mean() < 0.9  # the twin


def test_a_tied_table_has_the_moments_of_its_head(
    tmp_path: Path, save_tiny: Callable[..., Path], sequences: np.ndarray
) -> None:
    loaded = load_traced(str(save_tiny(tmp_path / "m", "opt")))
    name = loaded.owners["lm_head"]
    assert name == "model.decoder.embed_tokens"
    states = loaded.model(torch.from_numpy(sequences), output_hidden_states=True).hidden_states[-1].flatten(0, 1)
    got = input_moments(loaded, [name], sequences)[name]
    assert torch.allclose(got, states.T @ states / len(states), rtol=1e-4, atol=1e-5)
    assert input_moments(loaded, ["model.decoder.embed_positions"], sequences) == {}


def test_eval_and_run_take_bundle_and_model(made: Callable[[str], Any], run: Callable[..., str], shelf: Path) -> None:
    model, bundle, _ = made("gpt_neox")
    (shelf / "text.txt").write_text("some words of no meaning " * 40, encoding="utf-8")
    how = f"--text {shelf / 'text.txt'} --windows 2 --context 32 --json {shelf / 'result.json'}"
    results = []
    for which in (model, bundle):
        run(f"eval {which} {how}")
        results.append(json.loads((shelf / "result.json").read_text()))
    original, ours = results
    assert ours["teacher_perplexity"] == pytest.approx(original["perplexity"], rel=1e-5)
    assert 0 < ours["kl_mean"] < 0.5
    opened = load(bundle, threads=1)
    texts = ["some words", "a", "of no meaning at all"]
    together = opened.generate(texts, max_new_tokens=12)
    assert together == [opened.generate(text, max_new_tokens=12) for text in texts]
    run(f"run {bundle} 'some words' --max-new-tokens 12 --fast")
    run(f"report {bundle}")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("family", ["gpt_neox", "opt"])
def test_our_kernels_compute_the_same(made: Callable[[str], Any], run: Callable[..., str], family: str) -> None:
    from jpq_export.runtime.session import OrtModel

    bundle = made(family).bundle
    ours = OrtModel(bundle / "model.onnx", threads=1)
    assert "jpq kernels" in ours.path
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JPQ_KERNELS", "off")
        bodies = OrtModel(bundle / "model.onnx", threads=1)
    assert "jpq kernels" not in bodies.path
    ids = np.random.default_rng(1).integers(0, 256, (2, 9))
    expected, got = bodies.forward(ids).logits, ours.forward(ids).logits
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(got - bodies.forward(ids[::-1]).logits).max() > 1e-2 * np.abs(expected).max()  # the twin
    run(f"verify {bundle}")
