"""tools/growth.py: shapes have the parameters they say, sizes are run once, exponents are those of powers."""

import json
import sys

import pytest

pytest.importorskip("torch")


@pytest.fixture
def tool(load_tool):
    return load_tool("growth")


def test_a_shape_has_the_parameters_it_says(tool):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = tool.shape_for(13)
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=tool.VOCABULARY,
                hidden_size=shape.hidden,
                intermediate_size=shape.ffn,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.heads // 3,
                head_dim=tool.HEAD,
                tie_word_embeddings=True,
            )
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters
    assert tool.shape_for(134.5).parameters == 134515008  # SmolLM2-135M


def run(parameters, power, name="plan"):
    stages = [{"name": name, "seconds": 0.5 * parameters**power, "peak_rss_bytes": 100 * parameters}] * 2
    facts = {"effort": "quick", "bits": 4.0, "machine": "a processor", "commit": "abc1234"}
    return facts | {"parameters": parameters, "seconds": parameters**power, "stages": stages}


def test_exponents_are_those_of_powers(tool):
    runs = [run(10**7, 1.5), run(10**8, 1.5), run(10**6, 1.5)]
    lines = tool.by_stage(runs, "seconds")["plan"]
    assert lines == [(n, pytest.approx(n**1.5)) for n in (10**6, 10**7, 10**8)]
    assert tool.exponent(lines) == pytest.approx(1.5)
    assert tool.by_stage(runs, "peak_rss_bytes")["plan"][0] == (10**6, 10**8)  # not added up
    shown = tool.page(runs)
    assert "plan, ^1.50" in shown
    assert "whole run, ^1.50" in shown
    assert shown.count("<circle") == 9


def test_finished_sizes_are_not_run_again(tool, tmp_path, monkeypatch):
    asked = []

    def measure(shape, effort, bits):
        asked.append(shape.parameters)
        return run(shape.parameters, 1.0) | {"effort": effort, "bits": bits}

    monkeypatch.setattr(tool, "measure", measure)
    for sizes in ("13,50", "13,50,135"):
        monkeypatch.setattr(sys, "argv", ["growth", "--sizes", sizes, "--out", str(tmp_path)])
        tool.main()
    assert asked == sorted(set(asked))
    assert [r["parameters"] for r in json.loads((tmp_path / "growth.json").read_text())] == asked
    assert "How an export grows" in (tmp_path / "growth.html").read_text()
