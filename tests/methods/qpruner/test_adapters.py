"""LoftQ's start against zero and against the best of its rank, and an export with trained branches."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("botorch", reason="BoTorch is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("peft", reason="peft is not installed")


from jpq_export.compress.rounding import quantize  # noqa: E402
from jpq_export.compress.student import dequantized, to_student  # noqa: E402
from jpq_export.errors import PlanError  # noqa: E402
from jpq_export.format.compressed import CompressedModel  # noqa: E402
from jpq_export.format.plan import load_plan  # noqa: E402
from jpq_export.methods.qpruner import search  # noqa: E402
from jpq_export.methods.qpruner.adapters import loftq  # noqa: E402
from jpq_export.numerics.scheme import Scheme  # noqa: E402

RANK = 4
EXPORT = "export m --method qpruner --target jetson --effort quick --context 64 --bits 4.6"


@pytest.fixture
def residual() -> "torch.Tensor":
    W = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    return W - quantize(W, torch.eye(64), Scheme(2, 32), method="rtn").dequantize()


def test_the_start_lowers_the_quantization_error(residual):
    """By what theory allows: the squares of the largest singular values."""
    A, B = loftq(residual, RANK)
    assert (A.shape, B.shape) == ((64, RANK), (RANK, 48))
    left = float((residual - (A @ B).T).square().sum())
    singular = torch.linalg.svdvals(residual).square()
    assert left == pytest.approx(float(singular[RANK:].sum()), rel=1e-4)
    assert left < 0.9 * float(residual.square().sum())  # against a start at zero


def test_twin_the_start_of_another_residual_does_not(residual):
    A, B = loftq(residual.flip(0), RANK)
    assert float((residual - (A @ B).T).square().sum()) > float(residual.square().sum())


@pytest.fixture(scope="module")
def shelf(quick_shelf: Callable, save_tiny: Callable[..., Path]) -> Iterator[Path]:
    with quick_shelf("adapters", steps=3) as (folder, patch):
        patch.setitem(search.TRIALS, "quick", 4)
        save_tiny(folder / "m", "llama_biased", intermediate_size=256, num_key_value_heads=4)
        yield folder


@pytest.fixture(scope="module")
def bundle(shelf: Path, run: Callable[..., str]) -> Path:
    run(f"{EXPORT} --adapters {RANK} --out {shelf / 'bundle'}")
    return shelf / "bundle"


def test_an_export_with_branches_is_proved(bundle: Path, run: Callable[..., str]) -> None:
    assert json.loads((bundle / "parity.json").read_text())["passed"]
    run(f"verify {bundle}")
    plan, manifest = (json.loads((bundle / f"{name}.json").read_text()) for name in ("plan", "manifest"))
    assert plan["adapter_rank"] == RANK
    assert manifest["staircase"][-1]["applied"]
    assert manifest["weight_bytes"] == plan["predicted"]["bytes"] <= plan["budget"]["bytes"]
    model = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
    stored = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    assert stored["layers.0.attn.q.adapter.down"] == (64, RANK)
    assert sum(name.endswith(".adapter.up") for name in stored) == 14


def test_twin_a_flipped_branch_is_named(bundle: Path, run: Callable[..., str]) -> None:
    model = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "layers.1.mlp.down.adapter.down")
    at = {entry.key: entry.value for entry in tensor.external_data}
    data = bundle / at["location"]
    whole = data.read_bytes()
    start, length = int(at.get("offset", 0)), int(at["length"])
    changed = -np.frombuffer(whole[start : start + length], np.float16)
    data.write_bytes(whole[:start] + changed.tobytes() + whole[start + length :])
    run(f"verify {bundle}", expected=1)
    data.write_bytes(whole)


def test_branches_are_stored_and_computed_alike(shelf: Path, bundle: Path, run: Callable[..., str]) -> None:
    """The file, the model that computes with codes and branches, and the plain matrices agree."""
    run(f"{EXPORT} --adapters {RANK} --until compress --out {shelf / 'stopped'}")
    model = CompressedModel.load(shelf / "stopped" / "compressed.safetensors")
    assert len(model.adapters) == 14
    assert model.weight_bytes == json.loads((bundle / "manifest.json").read_text())["weight_bytes"]
    ids = torch.arange(24)[None]
    merged = dequantized(model)(ids)
    torch.testing.assert_close(to_student(model)(ids), merged, rtol=1e-4, atol=1e-4)
    without = CompressedModel(model.spec, model.quantized, model.vectors)
    assert not torch.allclose(to_student(without)(ids), merged, rtol=1e-2, atol=1e-2)


def test_the_rtx_graph_has_them_too(shelf: Path, run: Callable[..., str]) -> None:
    from jpq_export.lower.export import export_onnx

    run(f"{EXPORT} --adapters {RANK} --target rtx-4090 --until onnx --out {shelf / 'rtx'}")
    model = CompressedModel.load(shelf / "rtx" / "compressed.safetensors")
    export_onnx(model, shelf / "signed.onnx", form="signed")
    graph = onnx.load(str(shelf / "signed.onnx"), load_external_data=False).graph
    assert sum(tensor.name.endswith(".adapter.up") for tensor in graph.initializer) == len(model.adapters) > 0


def test_only_qpruner_has_them(shelf: Path, run: Callable[..., str]) -> None:
    out = run(f"export m --method gptq --adapters 4 --target jetson --bits 4 --out {shelf / 'no'}", expected=2)
    assert "--method qpruner" in out


def test_a_plan_of_another_rank_is_refused(shelf: Path, bundle: Path, run: Callable[..., str]) -> None:
    options = f"--method qpruner --target jetson --effort quick --plan {bundle / 'plan.json'}"
    assert "has rank 4" in run(f"export m {options} --adapters 5 --out {shelf / 'no'}", expected=2)
    run(f"export m {options} --adapters 4 --until compress --out {shelf / 'same'}")


def test_a_damaged_rank_is_named(bundle: Path, tmp_path: Path) -> None:
    raw = json.loads((bundle / "plan.json").read_text()) | {"adapter_rank": -1}
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    with pytest.raises(PlanError, match="adapter_rank"):
        load_plan(tmp_path / "plan.json")


def test_the_comparison_has_a_row_with_and_one_without(shelf: Path, run: Callable[..., str]) -> None:
    (shelf / "text.txt").write_text("the weight of the thing there and the rest of what they then thought " * 4)
    options = "--target jetson --effort quick --budgets 5.5 --windows 2 --window-context 32 --text text.txt"
    run(f"compare m --methods qpruner,qpruner-lora {options} --out {shelf / 'table'}")
    rows = json.loads((shelf / "table" / "comparison.json").read_text())
    assert [row["method"] for row in rows] == ["qpruner", "qpruner-lora"]
    assert all(row["bits_per_weight"] <= 5.5 for row in rows)
    ranks = [json.loads((shelf / "table" / f"{row['method']}-5.5" / "plan.json").read_text()) for row in rows]
    assert [plan.get("adapter_rank", 0) for plan in ranks] == [0, 8]
