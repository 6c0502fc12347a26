"""What the fallback does not do: exit code 2 for options, 1 for models, one line that names it, and nothing left."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jpq_export.errors import ModelError
from jpq_export.fallback import trace
from jpq_export.fallback.load import load_traced

Run = Callable[..., str]

OPTIONS = [
    ("--target cpu --latency 2ms", "--latency"),
    ("--target cpu --bits 5 --method toga", "--method toga"),
    ("--target cpu --bits 5 --method qpruner", "--method qpruner"),
    ("--target cpu --bits 5 --widths 3,4", "--widths"),
    ("--target cpu --bits 5 --kv-cache int8", "--kv-cache int8"),
    ("--target cpu --bits 5 --until onnx", "--until"),
    ("--target cpu --plan plan.json", "--plan"),
    ("--target jetson --bits 5", "--target jetson"),
    ("--target rtx-4090 --bits 5", "--target rtx-4090"),
]


@pytest.fixture(scope="module")
def model(shelf: Path, save_tiny: Callable[..., Path]) -> Path:
    return save_tiny(shelf / "refused", "gpt_neox")


@pytest.fixture(scope="module", autouse=True)
def plan(made: Callable[[str], Any], shelf: Path) -> None:
    """A plan of another model, which is read before anything else."""
    shutil.copy(made("gpt_neox").bundle / "plan.json", shelf / "plan.json")


@pytest.mark.parametrize(("options", "named"), OPTIONS)
def test_an_option_without_sense_is_refused(model: Path, run: Run, shelf: Path, options: str, named: str) -> None:
    said = run(f"export {model} --effort quick {options} --out {shelf / 'no'}", expected=2)
    assert f"Error: {named}: this model is of no family described here" in said
    assert not list(shelf.glob("no*"))


CONFIGS = [
    (
        {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
        "a layer of its cache is a LinearAttentionLayer, expected keys and values",
    ),
    (
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4},
        "of its parameters lie in no linear layer or table (experts?)",
    ),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "already quantized"),
    ({"num_hidden_layers": 3}, "12 missing tensors (gpt_neox.layers.2."),
    ({"num_attention_heads": 5}, "cannot go through torch.onnx.export here: transformers says"),
]


@pytest.mark.parametrize(("changes", "named"), CONFIGS)
def test_a_model_that_cannot_be_taken_is_named(
    model: Path, run: Run, shelf: Path, changes: dict[str, Any], named: str
) -> None:
    spoiled = shelf / "spoiled"
    shutil.copytree(model, spoiled)
    raw = json.loads((spoiled / "config.json").read_text()) | changes
    (spoiled / "config.json").write_text(json.dumps(raw))
    said = run(f"export {spoiled} --effort quick --target cpu --bits 5 --out {shelf / 'no'}", expected=1)
    shutil.rmtree(spoiled)
    assert named in said
    assert len(re.findall(r"(?:^| )Error: ", said)) == 1
    assert not list(shelf.glob("no*"))


def test_a_failed_torch_export_is_one_line(model: Path, run: Run, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        try:
            raise NotImplementedError("no decomposition of aten::strange\nof a model\nand pages of advice")
        except NotImplementedError as error:
            raise RuntimeError("Failed to export the model. This is step 2/3") from error

    monkeypatch.setattr(torch.onnx, "export", fail)
    said = run(f"export {model} --effort quick --target cpu --bits 5 --out {shelf / 'no'}", expected=1)
    line = said[said.index("Error:") :]
    assert "GPTNeoXForCausalLM cannot go through torch.onnx.export here: NotImplementedError: no decomposition" in line
    assert "pages of advice" not in line
    assert "LlamaForCausalLM" in line  # the remedy
    assert not list(shelf.glob("no*"))


def test_a_cache_that_means_something_else_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, right = load_traced(str(model)), trace.cache_of
    trace.check_cache(loaded)
    monkeypatch.setattr(trace, "cache_of", lambda past: right([t.flip(2) if i % 2 else t for i, t in enumerate(past)]))
    with pytest.raises(ModelError, match="through its cache it computes something else"):
        trace.check_cache(loaded)


def test_a_budget_that_cannot_be_met_says_the_least(model: Path, run: Run, shelf: Path) -> None:
    ask = f"export {model} --effort quick --target cpu --widths 3 --out {shelf / 'no'} --size"
    said = run(f"{ask} 1kB", expected=1)
    assert "refused takes the fallback" in said
    least = said.split("needs at least ")[1].split(" ")[0]
    from jpq_export.compress.plan import BudgetRequest
    from jpq_export.fallback.plan import uniform_plan
    from jpq_export.format.target import load_target

    loaded = load_traced(str(model))
    budget = BudgetRequest("size", float(least) * 1e6).resolve(loaded.spec)
    found = uniform_plan(loaded.spec, load_target("cpu"), budget, sha256="", method="gptq", widths=(3,))
    assert {choice.bits for choice in found.choices} == {3}
    assert found.predicted.bytes <= float(least) * 1e6


@pytest.mark.parametrize("command", ["plan", "compare --budgets 5 --text a.txt", "study"])
def test_other_commands_name_the_architecture(model: Path, run: Run, shelf: Path, command: str) -> None:
    (shelf / "a.txt").write_text("words " * 400, encoding="utf-8")
    first, *rest = command.split()
    target = "" if first == "study" else "--target cpu"
    said = run(f"{first} {model} {target} {' '.join(rest)} --out {shelf / 'no'}", expected=1)
    assert "architecture GPTNeoXForCausalLM is not supported here, only `export` and `eval` take it" in said


def test_bench_has_nothing_to_compare_with(made: Callable[[str], Any], run: Run) -> None:
    said = run(f"bench {made('gpt_neox').bundle}", expected=2)
    assert "GPTNeoXForCausalLM went through torch.onnx.export" in said
