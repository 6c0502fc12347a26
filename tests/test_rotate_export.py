"""Exports with a rotated stream: proved in every form of the graph, chosen by the trial, kept by a plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from jpq_export import rotate
from jpq_export.format.compressed import CompressedModel

OPTIONS = "--effort quick --context 64 --bits 4"


@pytest.fixture(scope="module")
def shelf(quick_shelf: Callable, save_tiny: Callable[..., Path]) -> Iterator[tuple[Path, pytest.MonkeyPatch]]:
    """A working folder with three models."""
    with quick_shelf("rotated") as (folder, patch):
        save_tiny(folder / "tied", "llama_tied")
        save_tiny(folder / "qwen", "qwen3")
        save_tiny(folder / "gemma", "gemma3")
        yield folder, patch


@pytest.fixture
def decide(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """`decide(True)`: the trial prefers the rotated model."""

    def decide(better: bool) -> None:
        monkeypatch.setattr(rotate, "_trial", lambda *_: (1.0, 0.5 if better else 2.0))

    return decide


def is_rotated(bundle: Path) -> bool:
    """By the graph's initializers."""
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    return any(tensor.name.startswith("rotation.") for tensor in graph.initializer)


@pytest.mark.parametrize("name", ["tied", "qwen", "gemma"])
@pytest.mark.parametrize("target", ["cpu", "jetson", "h100"])
def test_a_rotated_export_is_proved(shelf: tuple, decide: Callable, run: Callable, name: str, target: str) -> None:
    folder, _ = shelf
    decide(True)
    out = folder / f"{name}-{target}"
    run(f"export {name} {OPTIONS} --target {target} --out {out}")
    parity = json.loads((out / "parity.json").read_text())
    assert parity["passed"]
    assert is_rotated(out)
    run(f"verify {out}")
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    assert "kl_mean" in run(f"eval {out} --text text.txt --windows 1 --context 32")  # finds its original
    if target == "jetson":
        board = onnx.load(out / "model.trt.onnx", load_external_data=False).graph
        last = 2 if name == "gemma" else 4  # its stream is not turned back: what is read of it is turned
        assert sum(node.name.startswith("rotation/MatMul") for node in board.node) == last
    codes = out / "model.onnx.data"
    codes.write_bytes(codes.read_bytes()[::-1])  # the twin
    run(f"verify {out}", expected=1)


def test_an_int8_cache_and_a_rotated_stream(shelf: tuple, decide: Callable, run: Callable) -> None:
    decide(True)
    run(f"export tied {OPTIONS} --target cpu --kv-cache int8 --out int8")
    assert json.loads(Path("int8/parity.json").read_text())["passed"]
    assert is_rotated(Path("int8"))


def test_the_trial_decides_and_the_option_forbids(shelf: tuple, decide: Callable, run: Callable) -> None:
    short = f"{OPTIONS} --target cpu --until onnx --force --out"
    decide(False)
    said = run(f"export tied {short} no")
    assert not is_rotated(Path("no"))
    decide(True)
    said += run(f"export tied {short} never --no-rotate")
    assert not is_rotated(Path("never"))
    assert Path("no/plan.json").read_text() == Path("never/plan.json").read_text()
    run(f"export tied {short} plain --method gptq")
    assert not is_rotated(Path("plain"))


def test_a_plan_keeps_its_basis(shelf: tuple, decide: Callable, run: Callable) -> None:
    decide(True)
    run(f"export tied {OPTIONS} --target cpu --until plan --out plan-rotated --force")
    decide(False)
    run(f"export tied {OPTIONS} --target cpu --until plan --out plan-plain --force")
    ending = "--effort quick --context 64 --target cpu --until compress --force"
    run(f"export tied {ending} --plan plan-rotated/plan.json --out by-rotated")
    decide(True)
    run(f"export tied {ending} --plan plan-plain/plan.json --out by-plain")
    said = run(f"export tied {ending} --plan plan-rotated/plan.json --out no-way --no-rotate", expected=2)
    assert "--no-rotate: plan-rotated/plan.json was made for a rotated model" in " ".join(said.split())
    found = [CompressedModel.load(Path(f"by-{kind}/compressed.safetensors")) for kind in ("rotated", "plain")]
    assert [model.spec.rotated for model in found] == [True, False]


def test_the_real_trial_is_remembered(shelf: tuple, run: Callable) -> None:
    folder, _ = shelf
    run(f"export tied {OPTIONS} --target cpu --until plan --out first --force")
    (file,) = [f for f in (folder / "cache" / "search").glob("*.json") if "rotated" in json.loads(f.read_text())]
    numbers = json.loads(file.read_text())
    assert all(np.isfinite(list(numbers.values())))
    file.write_text(json.dumps({"plain": 2.0, "rotated": 1.0}))
    run(f"export tied {OPTIONS} --target cpu --until onnx --out second --force")
    assert is_rotated(Path("second"))
    file.write_text(json.dumps({"plain": 1.0, "rotated": 2.0}))
    run(f"export tied {OPTIONS} --target cpu --until onnx --out third --force")
    assert not is_rotated(Path("third"))
    file.write_text("{")
    run(f"export tied {OPTIONS} --target cpu --until plan --out fourth --force")
    assert json.loads(file.read_text()) == numbers


def test_groups_are_a_row_wide_where_rotated_or_as_asked(shelf: tuple, decide: Callable, run: Callable) -> None:
    """The tiny model's rows have less than 512 numbers."""

    def groups(name: str, *asked: str) -> set[tuple[int, int]]:
        run(f"plan tied {OPTIONS} --target cpu --out {name} {' '.join(asked)}")
        choices = json.loads((Path(name) / "plan.json").read_text())["choices"]
        return {(choice["columns"], choice["group_size"]) for choice in choices}

    decide(True)
    assert all(columns == size for columns, size in groups("whole"))
    assert {size for _, size in groups("halves", "--group-size", "32")} == {32}
