"""Masks to plans: exact bytes below every budget, the rows that were asked for, contiguous where it is free."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jpq_export.compress.cost import CostModel  # noqa: E402
from jpq_export.errors import BudgetError, PlanError  # noqa: E402
from jpq_export.format.plan import Budget, load_plan  # noqa: E402
from jpq_export.format.spec import LayerSpec  # noqa: E402
from jpq_export.format.target import load_target  # noqa: E402
from jpq_export.methods.toga.choose import frame, plan_for  # noqa: E402
from jpq_export.methods.toga.hypernetwork import BASE  # noqa: E402
from jpq_export.methods.toga.supernet import MaskedDecoder, Widths, structures  # noqa: E402


@pytest.fixture(scope="module")
def cost(conftest_of):
    spec = conftest_of("lower").SPECS["llama"]
    return CostModel(replace(spec, layers=(LayerSpec(2, 256), LayerSpec(2, 256))), load_target("jetson"), 64)


def network(spec, *, prune, seed=0) -> Any:
    """Fixed random logits in place of a trained network."""
    generator = torch.Generator().manual_seed(seed)
    logits = {
        name: torch.randn(count, generator=generator) - BASE
        for layer in structures(spec, prune=prune)
        for name, count in layer.items()
    }
    return lambda fraction: logits


def answer(cost, bits, *, prune=False):
    size = int(bits * cost.spec.parameters() / 8)
    budget, found = Budget("bits", bits, size), frame(cost.spec, cost.target, size, None)
    return plan_for(network(cost.spec, prune=prune), cost, budget, found, sha256="0" * 64, search={})


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("bits", [2.9, 3.3, 4.2, 6.0])
def test_every_budget_is_met_and_nearly_used_up(cost, bits, prune):
    plan = answer(cost, bits, prune=prune)
    plan.check(cost.spec)
    vectors = 4 * sum(plan.spec(cost.spec).vectors().values())
    assert plan.predicted.bytes == sum(c.bytes for c in plan.choices) + vectors
    slack = 0.2 if prune else 0.02  # pruning goes by whole groups of 64 of 256 channels
    assert plan.budget.bytes is not None
    assert (1 - slack) * plan.budget.bytes < plan.predicted.bytes <= plan.budget.bytes


def test_precise_rows_are_those_with_the_highest_logits(cost):
    plan = answer(cost, 3.3)
    logits = network(cost.spec, prune=False)(0.5)
    precise, coarse = [], []
    for choice in plan.choices:
        if choice.layout is not None and choice.name in logits and ".mlp." not in choice.name:
            wide = torch.from_numpy(choice.layout.max_codes()) == 15
            precise.append(logits[choice.name][wide])
            coarse.append(logits[choice.name][~wide])
    assert torch.cat(precise).min() > torch.cat(coarse).max()


def test_gate_and_up_need_no_gather(cost):
    choices = {c.name: c for c in answer(cost, 3.3).choices}
    for i in range(2):
        assert choices[f"layers.{i}.mlp.gate"].order is None
        assert choices[f"layers.{i}.mlp.up"].order is None
        assert len(choices[f"layers.{i}.mlp.gate"].blocks) == 2
        assert len(choices[f"layers.{i}.mlp.up"].blocks) == 3
        assert choices[f"layers.{i}.mlp.down"].order is not None


def test_a_budget_below_all_low_is_refused(cost):
    with pytest.raises(BudgetError, match="needs at least"):
        answer(cost, 0.9)


def test_plans_come_back_from_their_file(cost, tmp_path):
    plan = answer(cost, 3.3, prune=True)
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert load_plan(tmp_path) == plan


@pytest.mark.parametrize(
    ("field", "value"),
    [("blocks", [{"bits": 4, "rows": -1}, {"bits": 2, "rows": 65}]), ("order", [0] * 64), ("bytes", 1)],
)
def test_a_plan_whose_blocks_do_not_fit_is_refused(cost, tmp_path, field, value):
    raw = json.loads(answer(cost, 3.3).to_json())
    choice = next(c for c in raw["choices"] if c["name"] == "layers.0.attn.q")
    assert choice["blocks"]
    choice[field] = value
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    with pytest.raises(PlanError, match=r"layers\.0\.attn\.q"):
        load_plan(tmp_path)


def test_reordered_channels_leave_the_function_as_it_was(cost):
    """Twin: reordering down alone changes it."""
    from jpq_export.compress.apply import LayerChoice, prune
    from jpq_export.compress.decoder import build_decoder, named_weights

    generator = torch.Generator().manual_seed(0)
    shapes = cost.spec.matrices() | {name: (n,) for name, n in cost.spec.vectors().items()}
    weights = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    model, ids = build_decoder(cost.spec, weights), torch.arange(12)[None]
    order = tuple(np.random.default_rng(0).permutation(256).tolist())
    moved = prune(model, (LayerChoice((0, 1), order), LayerChoice((0, 1), tuple(range(256)))))
    torch.testing.assert_close(moved(ids), model(ids), rtol=1e-4, atol=1e-4)
    wrong = named_weights(moved) | {"layers.0.mlp.down": weights["layers.0.mlp.down"]}
    assert not torch.allclose(build_decoder(moved.spec, wrong)(ids), model(ids), rtol=1e-2, atol=1e-2)


def test_the_supernet_at_both_ends(cost):
    """All masks on is the high-precision model; a pruned head is one whose o columns are zero."""
    from jpq_export.compress.decoder import build_decoder

    generator = torch.Generator().manual_seed(0)
    shapes = cost.spec.matrices() | {name: (n,) for name, n in cost.spec.vectors().items()}
    model = build_decoder(cost.spec, {n: torch.randn(s, generator=generator) * 0.2 for n, s in shapes.items()})
    ids = np.random.default_rng(0).integers(0, 96, (4, 10))
    supernet = MaskedDecoder(model, ids, Widths(2, 8), cost.target)
    on = {name: torch.ones(count) for layer in structures(cost.spec, prune=True) for name, count in layer.items()}
    true = torch.nn.functional.cross_entropy(
        model(torch.from_numpy(ids[:2, :-1])).flatten(0, 1), torch.from_numpy(ids[:2, 1:]).flatten()
    )
    assert abs(float(supernet.loss(on, 0) - true)) < 0.05  # 8 bits
    assert float(supernet.size(on)) == 1
    headless = on | {"layers.0.attn.heads": torch.tensor([1.0, 0.0])}
    assert torch.equal(supernet._weight("layers.0.attn.o", headless)[:, 32:], torch.zeros(64, 32))
    assert float(supernet.size(headless)) < 1


def test_the_published_training_is_one_option_away(cost):
    """`--effort max`: steps and rate of the paper; `quick` is neither."""
    from jpq_export.methods.toga.search import settings

    found = frame(cost.spec, cost.target, int(3.3 * cost.spec.parameters() / 8), None)
    kinds = [settings(found, "max", prune=prune) for prune in (True, False)]
    assert [(kind.steps, kind.rate, kind.penalty, kind.weight_decay) for kind in kinds] == [
        (10_000, 1e-3, 16.0, 0.05),
        (2_000, 1e-3, 16.0, 0.05),
    ]
    quick = settings(found, "quick", prune=True)
    assert quick.steps == 30
    assert quick.rate > 1e-3


def test_the_supernet_is_trained_through_rounded_activations(cost):
    """4 bits move the loss further than 8; the masks' gradient passes; the teacher is left as it was."""
    from jpq_export.compress.decoder import build_decoder

    generator = torch.Generator().manual_seed(0)
    shapes = cost.spec.matrices() | {name: (n,) for name, n in cost.spec.vectors().items()}
    model = build_decoder(cost.spec, {n: torch.randn(s, generator=generator) * 0.2 for n, s in shapes.items()})
    ids = np.random.default_rng(0).integers(0, 96, (4, 24))
    before, losses = model(torch.from_numpy(ids)), []
    masks = {name: torch.full((n,), 0.5) for layer in structures(cost.spec, prune=True) for name, n in layer.items()}
    for bits in (16.0, 8.0, 4.0):
        supernet = MaskedDecoder(model, ids, Widths(4, 8), cost.target, activation_bits=bits)
        free = {name: value.clone().requires_grad_() for name, value in masks.items()}
        loss = supernet.loss(free, 0)
        loss.backward()
        assert all(value.grad is not None and value.grad.any() for value in free.values())
        losses.append(float(loss.detach()))
    assert abs(losses[1] - losses[0]) < abs(losses[2] - losses[0])
    assert losses[1] != losses[0]
    assert torch.equal(model(torch.from_numpy(ids)), before)
