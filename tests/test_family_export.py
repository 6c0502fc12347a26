"""Whole exports of the two families that are least like Llama: pruned, rounded, recovered, lowered, proved, run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from jpq_export.cli import main
from jpq_export.compress import effort

FAMILIES = ("phi3", "gpt2")
SHORT = effort.Effort("quick", 4, 2, 32, 1, 4, 2, (("removal", (1.0,)),))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, save_tiny: Callable[..., Path]) -> Iterator[Path]:
    """A folder with one model a family, where the commands run."""
    folder = tmp_path_factory.mktemp("families")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JPQ_CACHE", str(folder / "cache"))
        patch.setitem(effort.EFFORTS, "quick", SHORT)
        patch.chdir(folder)
        for name in FAMILIES:
            save_tiny(folder / name, name)
        yield folder


def run(command: str, expected: int = 0) -> str:
    done = CliRunner().invoke(main, shlex.split(command), catch_exceptions=False)
    assert done.exit_code == expected, done.output
    return done.output


@pytest.mark.parametrize(("target", "method"), [("cpu-x86", "jpq"), ("jetson", "jpq"), ("cpu-x86", "gptq")])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_export_is_proved(shelf: Path, family: str, target: str, method: str) -> None:
    out, bits = shelf / f"{family}-{target}-{method}", 2.2 if method == "jpq" else 3
    run(f"export {family} --effort quick --context 64 --target {target} --method {method} --bits {bits} --out {out}")
    plan, parity = (json.loads((out / f"{name}.json").read_text()) for name in ("plan", "parity"))
    assert parity["passed"]
    if method == "jpq":  # two bits and their scales are more: something must go, and not the same everywhere
        kept = {(len(layer["kv_heads"]), layer["ffn"]) for layer in plan["layers"]}
        assert len(kept) == 2
    names = {choice["name"] for choice in plan["choices"]}
    assert ("positions" in names) == ("layers.0.mlp.gate" not in names) == (family == "gpt2")
    run(f"verify {out}")
    codes = out / "model.onnx.data"
    codes.write_bytes(codes.read_bytes()[::-1])  # the twin
    run(f"verify {out}", expected=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_export_with_an_int8_cache_is_proved(shelf: Path, family: str) -> None:
    out = shelf / f"{family}-int8"
    run(f"export {family} --effort quick --context 64 --target cpu --method rtn --bits 6 --kv-cache int8 --out {out}")
    parity = json.loads((out / "parity.json").read_text())
    assert parity["passed"]
    assert all(runtime["cache"]["passed"] for runtime in parity["runtimes"])
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    kinds = {value.type.tensor_type.elem_type for value in graph.input if value.name.endswith((".key", ".value"))}
    assert kinds == {onnx.TensorProto.INT8}
    run(f"verify {out}")
    codes = out / "model.onnx.data"
    codes.write_bytes(codes.read_bytes()[::-1])  # the twin
    run(f"verify {out}", expected=1)


def test_what_is_not_quite_as_asked_is_said(shelf: Path) -> None:
    export = "export phi3 --effort quick --until plan --context"
    positions = json.loads((shelf / "phi3" / "config.json").read_text())["max_position_embeddings"]
    beyond = run(f"{export} {positions + 1} --target jetson --method rtn --bits 6 --out {shelf / 'beyond'}")
    assert f"phi3 has {positions} positions" in " ".join(beyond.split())
    plan = shelf / "beyond" / "plan.json"
    other = run(f"{export} 64 --target cpu --plan {plan} --out {shelf / 'other'}")
    assert "made for jetson" in " ".join(other.split())
    same = run(f"{export} {positions} --target jetson --plan {plan} --out {shelf / 'same'}")
    assert "positions" not in same  # the twins
    assert "made for" not in same


def test_toga_refuses_a_model_without_gates(shelf: Path) -> None:
    toga = "--effort quick --context 64 --target jetson --method toga --bits 3"
    said = " ".join(run(f"export gpt2 {toga} --out {shelf / 'no'}", expected=2).split())
    assert "gpt2 has an MLP without a gate" in said
    assert "use --method jpq" in said


def test_a_table_of_positions_is_never_left(shelf: Path, save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Calibration, parity and evaluation keep within 28 positions, where all of them would like more."""
    model, out = save_tiny(tmp_path / "gpt2", "gpt2", max_position_embeddings=28), tmp_path / "out"
    run(f"export {model} --effort quick --context 64 --target cpu-x86 --bits 4 --no-prune --out {out}")
    parity = json.loads((out / "parity.json").read_text())
    assert parity["passed"]
    assert {runtime["greedy"]["steps"] for runtime in parity["runtimes"]} == {14}
    (tmp_path / "a.txt").write_text("some words of no meaning " * 40, encoding="utf-8")
    evaluate = f"eval {out} --text {tmp_path / 'a.txt'} --windows 2 --no-teacher --context"
    assert "perplexity" in run(f"{evaluate} 28")
    assert "--context 29: gpt2 has 28 positions; give 28 or less" in run(f"{evaluate} 29", expected=2)
