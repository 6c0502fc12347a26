"""`--activation-bits` of toga: 8 bits exported and proved, fewer measured, refusals by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from jpq_export.format.bundle import read_manifest
from jpq_export.methods.toga import search

torch = pytest.importorskip("torch")

EXPORT = "export m --method toga --effort quick --context 64 --bits 5"


@pytest.fixture(scope="module")
def shelf(quick_shelf: Callable, save_tiny: Callable[..., Path], run: Callable[..., str]) -> Iterator[Path]:
    """A model m, a cache, and the bundle w8a8."""
    with quick_shelf("activations") as (folder, patch):
        patch.setitem(search.STEPS, "quick", 4)
        patch.setattr(search, "TOKENS", 32)
        save_tiny(folder / "m", "llama", intermediate_size=256, num_key_value_heads=4)
        run(f"{EXPORT} --target cpu-x86 --activation-bits 8 --out w8a8")
        yield folder


def measured(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "activations.json").read_text())


def test_8_bits_are_exported_and_proved(shelf: Path, run: Callable[..., str]) -> None:
    parity = json.loads((shelf / "w8a8" / "parity.json").read_text())
    assert parity["passed"]
    assert all(runtime["divergence"] is None for runtime in parity["runtimes"])
    run(f"verify {shelf / 'w8a8'}")
    file = onnx.load(str(shelf / "w8a8" / "model.onnx"), load_external_data=False)
    assert any(node.op_type == "LowBitMatMulInteger" for node in file.graph.node)
    assert any(node.op_type == "MatMulInteger" for function in file.functions for node in function.node)
    manifest = read_manifest(shelf / "w8a8")
    found, quality = manifest.activations, manifest.quality
    assert found
    assert quality
    assert found["bits"] == 8
    assert found["kl_mean"] == pytest.approx(quality["kl_mean"], rel=1e-6)
    assert found["kl_mean"] != found["without"]["kl_mean"]
    assert "Activations: the linears" in (shelf / "w8a8" / "parity.html").read_text()


def test_twin_a_wrong_scale_in_the_file_fails_verify(shelf: Path, run: Callable[..., str]) -> None:
    data = shelf / "w8a8" / "model.onnx.data"
    whole = data.read_bytes()
    file = onnx.load(str(shelf / "w8a8" / "model.onnx"), load_external_data=False)
    scales = next(t for t in file.graph.initializer if t.name.startswith("layers.1.mlp.down") and "scales" in t.name)
    where = {entry.key: int(entry.value) for entry in scales.external_data if entry.key != "location"}
    start, end = where["offset"], where["offset"] + where["length"]
    wrong = np.frombuffer(whole[start:end], np.float16)[::-1].tobytes()
    data.write_bytes(whole[:start] + wrong + whole[end:])
    told = run(f"verify {shelf / 'w8a8'}", expected=1)
    data.write_bytes(whole)
    assert "layers.1.mlp.down" in told


def test_beside_an_int8_cache(shelf: Path, run: Callable[..., str]) -> None:
    """Both rounded: proved, verified, and it runs."""
    out = shelf / "both"
    run(f"{EXPORT} --target cpu-x86 --activation-bits 8 --kv-cache int8 --out {out}")
    assert json.loads((out / "parity.json").read_text())["passed"]
    run(f"verify {out}")
    assert run(f'run {out} "the man" --max-new-tokens 4')


def test_its_plan_gives_the_same_bundle(shelf: Path, run: Callable[..., str]) -> None:
    again = shelf / "again"
    run(f"export m --method toga --target cpu-x86 --effort quick --context 64 --activation-bits 8 "
        f"--plan {shelf / 'w8a8' / 'plan.json'} --out {again}")  # fmt: skip
    assert (again / "model.onnx.data").read_bytes() == (shelf / "w8a8" / "model.onnx.data").read_bytes()


@pytest.mark.parametrize("bits", ["4", "3.2"])
def test_fewer_bits_are_measured(shelf: Path, bits: str, run: Callable[..., str]) -> None:
    out = shelf / f"a{bits}"
    told = run(f"{EXPORT} --target jetson --activation-bits {bits} --until compress --out {out}")
    found = measured(out)
    assert found["bits"] == float(bits)
    assert found["kl_mean"] > found["without"]["kl_mean"]
    assert f"{bits} bits a token" in told
    plan = json.loads((out / "plan.json").read_text())
    assert plan["search"]["activation_bits"] == float(bits)


def test_a_network_is_trained_for_its_activations(shelf: Path, run: Callable[..., str]) -> None:
    before = len(list((shelf / "cache").rglob("hypernetwork.safetensors")))
    run(f"{EXPORT} --target cpu-x86 --activation-bits 8 --until plan --out {shelf / 'same'}")
    assert len(list((shelf / "cache").rglob("hypernetwork.safetensors"))) == before
    run(f"{EXPORT} --target cpu-x86 --until plan --out {shelf / 'float'}")
    assert len(list((shelf / "cache").rglob("hypernetwork.safetensors"))) == before + 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--method toga --target cpu-x86 --activation-bits 4", "no runtime here has integer kernels for 4-bit"),
        ("--method toga --target cpu-x86 --activation-bits 3.2 --until onnx", "--until compress"),
        ("--method toga --target jetson --activation-bits 8", "--target cpu-x86"),
        ("--method jpq --target cpu-x86 --activation-bits 8", "use --method toga"),
    ],
)
def test_what_cannot_be_exported_is_one_line(shelf: Path, options: str, told: str, run: Callable[..., str]) -> None:
    out = run(f"export m --effort quick {options} --out {shelf / 'no'}", expected=2)
    assert told in out
    assert "Traceback" not in out
    assert not (shelf / "no").exists()
