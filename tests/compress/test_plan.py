"""Plans at the real model's shapes with made-up prices: budgets kept, latency prunes, misfits refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from jpq_export.compress.cost import CostModel
from jpq_export.compress.effort import EFFORTS
from jpq_export.compress.finals import champion
from jpq_export.compress.load import LoadedModel
from jpq_export.compress.plan import BudgetRequest, Problem, contrast, make_plan, uniform_bytes, uniform_plan
from jpq_export.compress.prices import PriceList, StructurePrice
from jpq_export.compress.refine import REMOVAL_LASTS, Trial, finalists
from jpq_export.compress.search import Knobs
from jpq_export.errors import BudgetError, PlanError
from jpq_export.feasible import check_either_basis
from jpq_export.format.plan import Budget, Plan, load_plan
from jpq_export.format.spec import LayerSpec, ModelSpec, RopeSpec
from jpq_export.format.target import load_target
from jpq_export.given_plan import check_given
from jpq_export.numerics.scheme import ALL_WIDTHS, BIT_WIDTHS, TERNARY
from jpq_export.pipeline import FINAL_SEQUENCES
from jpq_export.request import Request

INF = float("inf")

SMOLLM = ModelSpec(
    name="smollm2-135m",
    family="llama",
    vocab=49152,
    hidden=576,
    head_dim=64,
    heads_per_group=3,
    layers=(LayerSpec(3, 1536),) * 30,
    ropes=(RopeSpec((1.0,) * 32),),
    norm_eps=1e-5,
    activation="silu",
    tied=True,
    attention_scale=0.125,
)


@pytest.fixture(scope="module")
def prices() -> PriceList:
    """Each matrix costs its share of 4 nats at 2 bits, a quarter per bit; structures are far dearer."""
    generator = np.random.default_rng(0)
    total = SMOLLM.parameters()
    matrices = {}
    for name, (rows, columns) in SMOLLM.matrices().items():
        at_two = 4 * rows * columns / total * float(generator.uniform(0.3, 3))
        matrices[name] = {bits: at_two * 4.0 ** (2 - bits) for bits in BIT_WIDTHS}
    structures = {}
    for i in range(30):
        whole = float(generator.uniform(0.05, 0.4))
        structures[f"layers.{i}.attn"] = StructurePrice((2, 0, 1), (0.0, whole / 4, whole / 2, whole), 1)
        removal = tuple((np.linspace(0, 1, 1537) ** 2 * whole).tolist())
        structures[f"layers.{i}.mlp"] = StructurePrice(tuple(range(1536)), removal, 128)
    return PriceList(SMOLLM, 64, matrices, structures)


def planned(
    prices: PriceList,
    request: BudgetRequest,
    *,
    knobs: Knobs | None = None,
    target: str = "jetson",
    widths: tuple[float, ...] = BIT_WIDTHS,
) -> Plan:
    cost = CostModel(SMOLLM, load_target(target), 2048)
    problem, knobs = Problem(prices, cost, request.resolve(SMOLLM), widths), knobs or Knobs()
    return make_plan(problem, problem.solve(knobs), knobs, sha256="00", method="jpq", measured={})


def test_an_int8_cache_is_read_sooner() -> None:
    cpu = load_target("cpu-x86")
    size, time = CostModel(SMOLLM, cpu, 2048).attention_rest(0, 3)
    saved = 2 * 3 * 2048 * (2 * SMOLLM.head_dim - SMOLLM.head_dim - 4)  # fp16 against codes and a scale
    expected = size, pytest.approx(time - saved / (cpu.bandwidth_gb_s * 1e3))
    assert CostModel(replace(SMOLLM, kv_cache="int8"), cpu, 2048).attention_rest(0, 3) == expected
    assert CostModel(SMOLLM, cpu, 1024).attention_rest(0, 3) != expected


@pytest.mark.parametrize(("kind", "bits"), [("bits", 2.5), ("size", 3.0), ("ratio", 4.0), ("bits", 6.0)])
def test_budgets_are_kept_and_used(prices: PriceList, kind: str, bits: float) -> None:
    value = {"bits": bits, "size": bits * SMOLLM.parameters() / 8, "ratio": bits / 16}[kind]
    plan = planned(prices, BudgetRequest(kind, value))  # pyright: ignore[reportArgumentType] one of the literals
    asked = bits * SMOLLM.parameters() / 8
    vectors = 4 * sum(plan.spec(SMOLLM).vectors().values())
    stored = sum(choice.bytes for choice in plan.choices) + vectors
    assert stored == plan.predicted.bytes
    assert 0.97 * asked <= stored <= asked
    assert plan.predicted.gap < 0.01
    plan.check(SMOLLM)


@pytest.fixture(scope="module")
def all_priced(prices: PriceList) -> PriceList:
    """The same with 1 bit and ternary: by the same rule of a quarter per bit."""
    matrices = {name: {b: each[2] * 4.0 ** (2 - b) for b in ALL_WIDTHS} for name, each in prices.matrices.items()}
    return replace(prices, matrices=matrices)


def test_narrow_widths_are_used_when_asked_for_and_never_else(all_priced: PriceList, tmp_path: Path) -> None:
    request, whole = BudgetRequest("bits", 1.9), Knobs(removal=INF)
    plan = planned(all_priced, request, knobs=whole, widths=ALL_WIDTHS)
    assert {1, TERNARY} & {choice.bits for choice in plan.choices}
    assert 0.97 * (plan.budget.bytes or 0) <= plan.predicted.bytes <= (plan.budget.bytes or 0)
    plan.check(SMOLLM)
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json(), encoding="utf-8")
    assert '"bits": 1.6' in plan.to_json()
    assert load_plan(path) == plan
    with pytest.raises(BudgetError, match="smallest possible plan"):
        planned(all_priced, request, knobs=whole)
    forbidden = replace(whole, two_bit=INF)
    wider = planned(all_priced, BudgetRequest("bits", 3.4), knobs=forbidden, widths=(1, TERNARY, 2, 3))
    assert {choice.bits for choice in wider.choices} == {3}
    with pytest.raises(BudgetError, match="--widths"):
        planned(all_priced, request, knobs=forbidden, widths=(1, TERNARY, 2))


@pytest.mark.parametrize("bits", [1.5, 1.58, 1.0, 16, 0, "3", True])
def test_a_plan_with_a_width_there_is_none_of_is_refused(all_priced: PriceList, tmp_path: Path, bits: object) -> None:
    plan = planned(all_priced, BudgetRequest("bits", 1.9), knobs=Knobs(removal=INF), widths=ALL_WIDTHS)
    raw = json.loads(plan.to_json())
    raw["choices"][0]["bits"] = bits
    (tmp_path / "plan.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(PlanError, match="damaged plan"):
        load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("width", [1, TERNARY])
def test_uniform_baseline_of_a_narrow_width_has_its_zero_between_the_levels(width: float) -> None:
    cost = CostModel(SMOLLM, load_target("jetson"), 2048)
    budget = BudgetRequest("bits", width + 1).resolve(SMOLLM)
    plan = uniform_plan(SMOLLM, cost, budget, sha256="00", method="rtn", widths=(width,))
    assert {choice.bits for choice in plan.choices} == {width}
    assert all(choice.symmetric for choice in plan.choices)
    usual = uniform_plan(SMOLLM, cost, BudgetRequest("bits", 3.0).resolve(SMOLLM), sha256="00", method="rtn")
    assert not any(choice.symmetric for choice in usual.choices)
    with pytest.raises(BudgetError, match="cannot be met"):
        uniform_plan(SMOLLM, cost, budget, sha256="00", method="rtn", widths=(4,))


@pytest.mark.parametrize("bits", [2.5, 3.0, 4.0, 6.0])
def test_uniform_baseline_keeps_its_budget(bits: float) -> None:
    cost = CostModel(SMOLLM, load_target("jetson"), 2048)
    budget = BudgetRequest("bits", bits).resolve(SMOLLM)
    plan = uniform_plan(SMOLLM, cost, budget, sha256="00", method="gptq")
    assert 0.97 * (budget.bytes or 0) <= plan.predicted.bytes <= (budget.bytes or 0)
    linear = {c.bits for c in plan.choices if c.name != "embed"}
    assert len(linear) == 1
    assert uniform_bytes(SMOLLM, {c.name: c.scheme for c in plan.choices}, target=cost.target) == plan.predicted.bytes


@pytest.mark.parametrize("bits", [4.5, 6.0])
def test_widths_a_target_stores_wider_are_never_worth_it_there(prices: PriceList, bits: float) -> None:
    plan = planned(prices, BudgetRequest("bits", bits), target="rtx-4090")
    assert {choice.bits for choice in plan.choices} == {4, 8}
    assert all(choice.integer_zero for choice in plan.choices)
    vectors = 4 * sum(plan.spec(SMOLLM).vectors().values())
    assert sum(choice.bytes for choice in plan.choices) + vectors == plan.predicted.bytes
    elsewhere = planned(prices, BudgetRequest("bits", bits))
    assert {choice.bits for choice in elsewhere.choices} - {4, 8}
    assert not any(choice.integer_zero for choice in elsewhere.choices)
    uniform = uniform_plan(
        SMOLLM,
        CostModel(SMOLLM, load_target("rtx-4090"), 2048),
        BudgetRequest("bits", bits).resolve(SMOLLM),
        sha256="00",
        method="gptq",
    )
    assert {(c.bits, c.integer_zero) for c in uniform.choices} <= {(4, True), (8, True)}


def test_latency_prunes_where_the_same_bytes_do_not(prices: PriceList) -> None:
    by_bytes = planned(prices, BudgetRequest("bits", 4.0))
    faster = planned(prices, BudgetRequest("latency", by_bytes.predicted.latency_ms * 0.8))
    assert faster.predicted.latency_ms <= by_bytes.predicted.latency_ms * 0.8
    assert len(faster.removed) > len(by_bytes.removed)
    kept = {c.name: c.bits for c in faster.choices}
    assert np.mean([kept[c.name] for c in by_bytes.choices if c.name in kept]) > np.mean(
        [c.bits for c in by_bytes.choices]
    )


@pytest.mark.parametrize(("kind", "value"), [("bits", 3.0), ("latency", 2.2)])
def test_contrast_spends_the_same_on_the_other_budget(prices: PriceList, kind: str, value: float) -> None:
    request = BudgetRequest(kind, value)  # pyright: ignore[reportArgumentType] one of the literals
    problem = Problem(prices, CostModel(SMOLLM, load_target("jetson"), 2048), request.resolve(SMOLLM))
    mine, other = contrast(problem, problem.solve(Knobs()), Knobs())
    assert [mine["chosen_by"], other["chosen_by"]] == (
        ["bytes", "microseconds"] if kind == "bits" else ["microseconds", "bytes"]
    )
    shared, free = ("latency_ms", "bytes") if kind == "bits" else ("bytes", "latency_ms")
    assert other[shared] <= mine[shared] * (1 + 1e-6)
    assert other["predicted_kl"] <= mine["predicted_kl"] * 1.01  # the other search is free in the other cost
    assert other[free] > mine[free]
    by_time = mine if kind == "latency" else other
    by_bytes = other if kind == "latency" else mine
    assert by_time["attention_removed"] >= by_bytes["attention_removed"]
    plan = planned(prices, request)
    assert mine["attention_removed"] == sum(not layer.kv_heads for layer in plan.layers)
    assert mine["channels_kept"] == pytest.approx(sum(layer.ffn for layer in plan.layers) / (30 * 1536))


def test_no_pruning_means_no_removal(prices: PriceList) -> None:
    assert planned(prices, BudgetRequest("bits", 2.5), knobs=Knobs(removal=float("inf"))).removed == ()
    cheap = {name: replace(s, removal=tuple(r / 50 for r in s.removal)) for name, s in prices.structures.items()}
    assert planned(replace(prices, structures=cheap), BudgetRequest("bits", 2.5)).removed


def test_two_bits_can_be_forbidden(prices: PriceList) -> None:
    request = BudgetRequest("bits", 2.6)
    assert 2 in {choice.bits for choice in planned(prices, request).choices}
    plan = planned(prices, request, knobs=Knobs(two_bit=float("inf")))
    assert min(choice.bits for choice in plan.choices) == 3
    assert plan.removed
    assert np.isfinite(plan.predicted.kl)
    with pytest.raises(BudgetError):
        planned(prices, request, knobs=Knobs(removal=float("inf"), two_bit=float("inf")))


def test_finalists_are_the_best_of_every_kind_that_is_near(prices: PriceList) -> None:
    cost = CostModel(SMOLLM, load_target("jetson"), 2048)
    problem = Problem(prices, cost, BudgetRequest("bits", 2.5).resolve(SMOLLM))

    def trial(kl: float, **knobs: float) -> Trial:
        return Trial(Knobs(**knobs), problem.solve(Knobs(**knobs)), kl)

    cheap = {"removal": 0.1, "two_bit": 0.1}
    trials = [trial(1.0, **cheap), trial(1.01, **cheap), trial(1.4, removal=INF)]
    trials.append(trial(1.5, removal=0.01, two_bit=INF))
    kinds = [each.kind(prices, by_bits=True) for each in trials]
    assert kinds == [(True, True), (True, True), (False, True), (True, False)]
    scores = [each.score / trials[0].score for each in trials]
    near, far = {"within": scores[2]}, {"within": scores[3]}
    assert 1 < scores[2] < scores[3]
    for by_bits in (True, False):  # the second is of the same kind, the last too far
        assert finalists(trials, prices, 3, by_bits=by_bits, **near) == [trials[0], trials[2]]
        assert finalists(trials, prices, 1, by_bits=by_bits, **near) == [trials[0]]
        assert finalists(trials, prices, 3, by_bits=by_bits, within=1.0) == [trials[0]]
    assert finalists(trials, prices, 3, by_bits=True, **far) == [trials[0], trials[2], trials[3]]
    assert finalists(trials, prices, 3, by_bits=False, **far) == [trials[0], trials[2]]  # it prunes as the first does


def test_what_removal_costs_weighs_more_than_what_bits_cost(prices: PriceList) -> None:
    cost = CostModel(SMOLLM, load_target("jetson"), 2048)
    problem = Problem(prices, cost, BudgetRequest("bits", 2.5).resolve(SMOLLM))
    free, half = Knobs(removal=0.1, two_bit=0.1), Knobs(removal=0.05, two_bit=0.1)
    whole = Trial(Knobs(removal=INF), problem.solve(Knobs(removal=INF)), 1.0)
    assert whole.score == whole.kl  # nothing removed
    solution = problem.solve(free)
    removal = sum(option.removal_price for option in solution.picks.values()) / 0.1
    share = removal / (solution.price - 0.1 * removal + removal)
    assert 0 < share < 1
    assert Trial(free, solution, 1.0).score == pytest.approx(1 + (REMOVAL_LASTS - 1) * share)
    assert Trial(half, problem.solve(half), 1.0).score > Trial(free, solution, 1.0).score  # more of it is removal


@pytest.mark.parametrize(("gain", "winner"), [(0.05, 0), (0.001, 1), (-0.05, 1)])
def test_pruning_must_win_by_more_than_chance(gain: float, winner: int) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.rand(6000, generator=generator, dtype=torch.float64)
    noise = torch.randn(6000, generator=generator, dtype=torch.float64)
    pruned = whole - gain + 0.3 * (noise - noise.mean())
    assert champion([pruned, whole], [True, False]) == winner
    # Between two plans of a kind the mean decides.
    assert champion([pruned, whole], [True, True]) == int(float(pruned.mean()) > float(whole.mean()))


def test_efforts_keep_text_for_the_final() -> None:
    for effort in EFFORTS.values():
        assert effort.finalists == 1 or effort.tune_sequences >= effort.sequences + FINAL_SEQUENCES


def test_plan_file_round_trips_and_refuses_another_model(prices: PriceList, tmp_path: Path) -> None:
    plan = planned(prices, BudgetRequest("bits", 2.5))
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json(), encoding="utf-8")
    again = load_plan(path)
    assert again.to_json() == plan.to_json()
    again.check(SMOLLM)
    with pytest.raises(PlanError, match="made for 30 layers"):
        again.check(SMOLLM.with_layers(SMOLLM.layers[:29]))
    with pytest.raises(PlanError, match="no choice for"):
        replace(again, choices=again.choices[1:]).check(SMOLLM)
    path.write_text(plan.to_json().replace('"bits": 3', '"bits": 7', 1), encoding="utf-8")
    with pytest.raises(PlanError, match="damaged plan"):
        load_plan(path)


def test_impossible_latency_names_the_smallest(prices: PriceList) -> None:
    with pytest.raises(BudgetError, match=r"smallest possible plan needs .* ms"):
        planned(prices, BudgetRequest("latency", 0.001))


def test_a_budget_is_refused_in_the_unit_it_was_asked_in() -> None:
    """Rounded up: who asks for what is told gets it."""
    bits = str(Budget("bits", 0.01, 168_143).too_small(7_376_000, "it needs"))
    assert bits == (
        "budget of 0.01 bits per weight (0.168143 MB) cannot be met: it needs 0.439 bits per weight (7.376 MB); "
        "ask for at least that"
    )
    assert "it needs 0.500 of fp16 (1.000 MB)" in str(Budget("ratio", 0.25, 500_000).too_small(1e6, "it needs"))
    assert "budget of 1 MB cannot be met: it needs 2.001 MB" in str(
        Budget("size", 1e6, 1_000_000).too_small(2_000_001, "it needs")
    )
    assert "needs 0.124 ms" in str(Budget("latency", 0.1, None, 0.1).too_small(0.1231, "it needs"))


def test_a_budget_that_only_the_rotated_model_meets_is_not_refused_before() -> None:
    """Its groups are wider; without rotation, or below both, the smallest budget is told."""
    request = Request("m", load_target("cpu"), Path("out"), BudgetRequest("bits", 2.08), prune=False)
    check_either_basis(request, SMOLLM)
    with pytest.raises(BudgetError, match=r"needs 2\.[1-9]"):
        check_either_basis(replace(request, rotate=False), SMOLLM)
    with pytest.raises(BudgetError, match=r"needs 2\.0"):
        check_either_basis(replace(request, budget=BudgetRequest("bits", 1.9)), SMOLLM)


def test_groups_wider_than_engines_take_are_refused_in_a_given_plan(prices: PriceList) -> None:
    plan = planned(prices, BudgetRequest("bits", 4.0), target="rtx-4090")
    wide = replace(plan, choices=tuple(replace(choice, group_size=choice.columns) for choice in plan.choices))
    request = Request("m", load_target("rtx-4090"), Path("out"), BudgetRequest("bits", 4.0), plan=Path("plan.json"))
    loaded = cast(LoadedModel, SimpleNamespace(sha256="00", spec=SMOLLM))
    check_given(plan, request, loaded)
    with pytest.raises(PlanError, match=r"plan.json: .*groups of 576 are wider than the 128"):
        check_given(wide, request, loaded)
