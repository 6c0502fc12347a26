"""Whole exports at 1 bit and ternary on the command line: searched, rounded, recovered, lowered, proved, verified."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from jpq_export.errors import BundleError
from jpq_export.format.compressed import CompressedModel
from jpq_export.numerics.scheme import TERNARY


@pytest.fixture(scope="module")
def shelf(quick_shelf: Callable, save_tiny: Callable[..., Path]) -> Iterator[Path]:
    """A model m; one search finds all plans, for every run reads the same prices."""
    with quick_shelf("narrow") as (folder, _):
        save_tiny(folder / "m", "llama")
        yield folder


def widths_of(bundle: Path) -> set[float]:
    return {choice["bits"] for choice in json.loads((bundle / "plan.json").read_text())["choices"]}


EXPORT = "export m --effort quick --context 64 --no-prune"


@pytest.mark.parametrize(
    ("target", "method"), [("jetson", "jpq"), ("cpu-x86", "jpq"), ("cpu-x86", "rtn"), ("jetson", "gptq")]
)
def test_a_whole_export_is_proved(shelf: Path, target: str, method: str, run: Callable[..., str]) -> None:
    out = shelf / f"{target}-{method}"
    run(f"{EXPORT} --target {target} --method {method} --bits 2.3 --widths 1,1.6,2 --out {out}")
    used = widths_of(out)
    assert used <= {1, TERNARY, 2}
    assert used & {1, TERNARY}
    assert json.loads((out / "parity.json").read_text())["passed"]
    nodes = onnx.load(str(out / "model.onnx"), load_external_data=False).graph.node
    stated = {a.i for node in nodes if node.domain == "jpq" for a in node.attribute if a.name.startswith("bits")}
    assert stated == {16 if bits == TERNARY else bits for bits in used}
    run(f"verify {out}")
    codes = out / "model.onnx.data"
    codes.write_bytes(codes.read_bytes()[::-1])  # the twin
    run(f"verify {out}", expected=1)


def test_a_plan_made_once_is_exported_again(shelf: Path, run: Callable[..., str]) -> None:
    first, again = shelf / "first", shelf / "again"
    run(f"plan m --effort quick --context 64 --no-prune --target cpu-x86 --bits 2.2 --widths 1.6,2 --out {first}")
    run(f"{EXPORT} --target cpu-x86 --plan {first / 'plan.json'} --out {again}")
    assert TERNARY in widths_of(first)
    assert (again / "plan.json").read_bytes() == (first / "plan.json").read_bytes()


def test_a_compressed_model_is_read_back(shelf: Path, conftest_of: Callable) -> None:
    tiny = conftest_of("lower")
    model, path = tiny.random_model(tiny.SPECS["llama"]), shelf / "all-widths.safetensors"
    model.save(path)
    again = CompressedModel.load(path)
    assert {1, TERNARY} < {weight.scheme.bits for weight in again.quantized.values()}
    for name, weight in model.quantized.items():
        assert again.quantized[name].scheme == weight.scheme
        np.testing.assert_array_equal(again.quantized[name].dequantize(), weight.dequantize())
    path.write_bytes(path.read_bytes().replace(b'\\"bits\\": 1.6', b'\\"bits\\": 1.7'))
    with pytest.raises(BundleError, match=r"bits 1\.7 is not one of"):
        CompressedModel.load(path)


def test_without_the_option_nothing_is_narrower_than_two_bits(shelf: Path, run: Callable[..., str]) -> None:
    out = shelf / "usual"
    run(f"plan m --effort quick --context 64 --no-prune --target cpu-x86 --bits 2.6 --out {out}")
    assert min(widths_of(out)) >= 2
    refused = f"plan m --effort quick --context 64 --no-prune --target cpu-x86 --bits 1.9 --out {out} --force"
    assert "cannot be met" in run(refused, expected=1)
    run(f"{refused} --widths 1,1.6,2,3")
    assert min(widths_of(out)) < 2
