"""tools/toga_train_once.py on a tiny model: masks are the plan's, KL sees a wrong mask, the file has all rows."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jpq_export.compress.cost import CostModel  # noqa: E402
from jpq_export.compress.decoder import Decoder  # noqa: E402
from jpq_export.compress.load import load_model  # noqa: E402
from jpq_export.compress.plan import BudgetRequest  # noqa: E402
from jpq_export.format.target import load_target  # noqa: E402
from jpq_export.methods.toga.choose import frame, masks_of, plan_for  # noqa: E402
from jpq_export.methods.toga.supernet import MaskedDecoder, structures  # noqa: E402


@pytest.fixture(scope="module")
def tool(load_tool):
    module = load_tool("toga_train_once")
    module.HELDOUT = 4
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_tiny):
    return save_tiny(tmp_path_factory.mktemp("once") / "m", "llama", intermediate_size=256, num_key_value_heads=4)


@pytest.fixture(scope="module")
def asked(tool, folder):
    """The supernet, a plan of random masks that prunes, and the masks read back from it."""
    loaded = load_model(str(folder))
    assert isinstance(loaded.model, Decoder)
    cost = CostModel(loaded.spec, load_target("jetson"), 64)
    budget = BudgetRequest("bits", 2.6).resolve(loaded.spec)
    found = frame(loaded.spec, cost.target, budget.bytes or 0, None)
    network = tool._random(structures(loaded.spec, prune=True), 0)
    plan = plan_for(network, cost, budget, found, sha256="0" * 64, search={})
    ids = np.random.default_rng(0).integers(0, 256, (4, 32))
    return MaskedDecoder(loaded.model, ids, found.widths, cost.target), plan, masks_of(plan, loaded.spec, found.widths)


def test_masks_read_back_are_the_rows_of_the_plan(asked):
    _, plan, masks = asked
    assert plan.removed
    for choice in plan.choices:
        if choice.name.startswith("layers."):
            high = sum(block.rows for block in choice.blocks if block.bits == 4)
            assert masks[choice.name].sum() == (high if choice.blocks else choice.rows * (choice.bits == 4))
    mixed = next(c for c in plan.choices if c.name == "layers.0.attn.o" and c.layout is not None)
    assert mixed.layout is not None
    assert torch.equal(masks[mixed.name], torch.from_numpy(mixed.layout.max_codes() == 15).float())


def test_masks_read_back_are_the_structure_of_the_plan(asked):
    _, plan, masks = asked
    assert any(layer.ffn < layer.ffn_of for layer in plan.layers)
    for layer in plan.layers:
        channels = masks[f"layers.{layer.index}.mlp.channels"].bool()
        assert channels.nonzero()[:, 0].tolist() == sorted(layer.kept_channels)
        assert not masks[f"layers.{layer.index}.mlp.gate"][~channels].any()
        heads = masks[f"layers.{layer.index}.attn.heads"].bool()
        assert tuple(heads.nonzero()[:, 0].tolist()) == layer.kv_heads


def test_kl_is_none_for_the_teacher_and_grows_with_damage(tool, asked):
    supernet, _, masks = asked
    ids = supernet.ids
    whole = {name: torch.ones_like(value) for name, value in masks.items()}
    low = {name: value if name.endswith(("heads", "channels")) else 0 * value for name, value in whole.items()}
    high, worse, pruned = (tool.heldout_kl(supernet, each, ids) for each in (whole, low, masks))
    assert 0 < high < worse
    assert high < pruned
    kept = {name: supernet.low[name] for name in supernet.low}
    difference = dict(supernet.difference)
    supernet.low = {name: supernet.model.get_parameter(f"{name}.weight") for name in kept}
    supernet.difference = {name: torch.zeros_like(value) for name, value in difference.items()}
    assert tool.heldout_kl(supernet, whole, ids) == pytest.approx(0, abs=1e-6)
    supernet.low, supernet.difference = kept, difference


def test_every_network_answers_every_budget(tool, folder, tmp_path):
    out = tmp_path / "once.json"
    tool.main([str(folder), "--bits", "2.6,3.0", "--steps", "4", "--length", "32", "--out", str(out)])
    found = json.loads(out.read_text())
    spec = load_model(str(folder)).spec
    names = ["random", "trained for the range", "trained for 2.6 bits", "trained for 3 bits"]
    assert [(row["network"], row["bits"]) for row in found["rows"]] == [(n, b) for n in names for b in (2.6, 3.0)]
    for row in found["rows"]:
        assert row["bytes"] <= row["bits"] * spec.parameters() / 8
        assert row["kl"] > 0
    assert found["training"]["range"][0] < found["training"]["range"][1]
    assert len({row["kl"] for row in found["rows"] if row["bits"] == 3.0}) == 4  # four different networks


def test_budgets_of_several_pairs_are_refused(tool, folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main([str(folder), "--bits", "2.6,7.0", "--out", str(tmp_path / "no.json")])
    assert stopped.value.code == 2
    assert "several pairs of widths" in capsys.readouterr().err
