"""`--method toga` on the command line: a whole export through parity, other budgets without training, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest

from jpq_export.format.compressed import CompressedModel
from jpq_export.methods.toga import search
from jpq_export.numerics.row_blocks import RowBlocks

EXPORT = "export m --method toga --target jetson --effort quick --context 64"


@pytest.fixture(scope="module")
def shelf(quick_shelf: Callable, save_tiny: Callable[..., Path]) -> Iterator[Path]:
    """A model m and a cache; ten steps of training."""
    with quick_shelf("toga") as (folder, patch):
        patch.setitem(search.STEPS, "quick", 10)
        patch.setattr(search, "TOKENS", 32)
        save_tiny(folder / "m", "llama", intermediate_size=256, num_key_value_heads=4)
        yield folder


def networks(shelf: Path) -> int:
    return len(list((shelf / "cache").rglob("hypernetwork.safetensors")))


@pytest.fixture(scope="module")
def bits_only(shelf: Path, run: Callable[..., str]) -> Path:
    run(f"{EXPORT} --no-prune --bits 3.2 --out {shelf / 'bits'}")
    return shelf / "bits"


@pytest.fixture(scope="module")
def joint(shelf: Path, run: Callable[..., str]) -> Path:
    run(f"{EXPORT} --bits 2.2 --out {shelf / 'joint'}")
    return shelf / "joint"


def test_a_whole_export_is_proved(bits_only: Path, run: Callable[..., str]) -> None:
    assert json.loads((bits_only / "parity.json").read_text())["passed"]
    run(f"verify {bits_only}")
    plan = json.loads((bits_only / "plan.json").read_text())
    manifest = json.loads((bits_only / "manifest.json").read_text())
    assert manifest["weight_bytes"] == plan["predicted"]["bytes"] <= plan["budget"]["bytes"]
    assert any(choice["blocks"] for choice in plan["choices"])
    assert any(choice["order"] for choice in plan["choices"])
    by_name = {choice["name"]: choice for choice in plan["choices"]}
    gates = [by_name[f"layers.{i}.mlp.gate"] for i in range(2)]
    assert all(gate["order"] is None for gate in gates)  # folded into the order of the channels
    assert any(len(gate["blocks"]) == 2 for gate in gates)
    page = (bits_only / "parity.html").read_text()
    mixed = next(choice for choice in plan["choices"] if choice["blocks"])
    assert f">{mixed['bits']:.1f}</text>" in page
    assert f"b{str(mixed['bits']).replace('.', '_')}" not in page  # no such colour: the nearest width's
    nodes = [node.op_type for node in onnx.load(str(bits_only / "model.onnx"), load_external_data=False).graph.node]
    assert nodes.count("LowBitMatMul") > 15  # 14 linears and the head


def test_twin_a_flipped_byte_is_named(bits_only: Path, run: Callable[..., str]) -> None:
    codes = bits_only / "model.onnx.data"
    whole = codes.read_bytes()
    codes.write_bytes(whole[::-1])
    run(f"verify {bits_only}", expected=1)
    codes.write_bytes(whole)


def test_pruning_and_widths_together(joint: Path) -> None:
    assert json.loads((joint / "parity.json").read_text())["passed"]
    plan = json.loads((joint / "plan.json").read_text())
    assert plan["removed"]
    assert plan["predicted"]["bytes"] <= plan["budget"]["bytes"]


def test_another_budget_needs_no_training(shelf: Path, bits_only: Path, run: Callable[..., str]) -> None:
    before = networks(shelf)
    run(f"{EXPORT} --no-prune --bits 3.0 --until plan --out {shelf / 'other'}")
    assert networks(shelf) == before
    sizes = [json.loads((f / "plan.json").read_text())["predicted"]["bytes"] for f in (shelf / "other", bits_only)]
    assert sizes[0] < sizes[1]


def test_a_damaged_network_is_trained_again(shelf: Path, bits_only: Path, run: Callable[..., str]) -> None:
    for path in (shelf / "cache").rglob("hypernetwork.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    run(f"{EXPORT} --no-prune --bits 3.2 --until plan --out {shelf / 'retrained'}")
    assert (shelf / "retrained" / "plan.json").read_bytes() == (bits_only / "plan.json").read_bytes()


def test_its_plan_gives_the_same_bundle(shelf: Path, bits_only: Path, run: Callable[..., str]) -> None:
    again = shelf / "again"
    run(f"{EXPORT} --plan {bits_only / 'plan.json'} --out {again}")
    assert (again / "model.onnx.data").read_bytes() == (bits_only / "model.onnx.data").read_bytes()


def test_a_run_goes_on_after_its_plan(shelf: Path, bits_only: Path, run: Callable[..., str]) -> None:
    """A run that stops after rounding and one that goes through write the same weights."""
    stopped = shelf / "stopped"
    run(f"{EXPORT} --no-prune --bits 3.2 --until compress --out {stopped}")
    model = CompressedModel.load(stopped / "compressed.safetensors")
    assert any(isinstance(weight, RowBlocks) for weight in model.quantized.values())
    assert model.weight_bytes == json.loads((bits_only / "manifest.json").read_text())["weight_bytes"]


@pytest.mark.parametrize(
    ("options", "told", "code"),
    [
        ("--target jetson --widths 2,3,4", "two precisions", 2),
        ("--target jetson --latency 5ms", "--latency", 2),
        ("--target jetson --bits 0.4 --no-prune", "cannot be met", 1),
        ("--target rtx-4090 --bits 3", "rows of several widths", 2),
    ],
)
def test_what_it_cannot_do_is_one_line(
    shelf: Path, options: str, told: str, code: int, run: Callable[..., str]
) -> None:
    out = run(f"export m --method toga --effort quick {options} --out {shelf / 'no'}", expected=code)
    assert told in out
    assert "Traceback" not in out


def test_its_plan_is_refused_where_rows_must_be_alike(shelf: Path, bits_only: Path, run: Callable[..., str]) -> None:
    told = run(f"export m --target rtx-4090 --effort quick --plan {bits_only / 'plan.json'} --out no", expected=1)
    assert "rows of several widths do not fit" in told
