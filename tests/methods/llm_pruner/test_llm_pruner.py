"""`--method llm-pruner`: as little pruning as one width needs, a whole export, and what is refused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")


EXPORT = "export m --method llm-pruner --target jetson --effort quick --context 64"


@pytest.fixture(scope="module")
def shelf(quick_shelf: Callable, save_tiny: Callable[..., Path]) -> Iterator[Path]:
    """A model m and a cache."""
    with quick_shelf("llm_pruner") as (folder, _):
        save_tiny(folder / "m", "llama", intermediate_size=256, num_key_value_heads=4)
        yield folder


def plan_of(folder: Path) -> dict:
    return json.loads((folder / "plan.json").read_text())


def test_a_whole_export_is_proved(shelf: Path, run: Callable[..., str]) -> None:
    run(f"{EXPORT} --bits 4 --out bundle")
    plan, manifest = plan_of(shelf / "bundle"), json.loads((shelf / "bundle/manifest.json").read_text())
    assert json.loads((shelf / "bundle/parity.json").read_text())["passed"]
    run("verify bundle")
    assert manifest["weight_bytes"] == plan["predicted"]["bytes"] <= plan["budget"]["bytes"]
    assert {choice["bits"] for choice in plan["choices"]} == {4}
    assert plan["search"]["rate"] > 0
    assert plan["removed"]


def test_more_room_prunes_less_until_nothing_goes(shelf: Path, run: Callable[..., str]) -> None:
    rates = []
    for bits in (3.4, 3.8, 4.1):
        run(f"{EXPORT} --widths 4 --bits {bits} --until plan --out plan-{bits}")
        rates.append(plan_of(shelf / f"plan-{bits}")["search"]["rate"])
    assert rates[0] > rates[1] > rates[2]
    run(f"{EXPORT} --widths 4 --bits 6 --until plan --out whole")
    assert plan_of(shelf / "whole")["search"]["rate"] == 0
    assert not plan_of(shelf / "whole")["removed"]


def test_what_cannot_be_met_or_asked_is_said(shelf: Path, run: Callable[..., str]) -> None:
    told = run(f"{EXPORT} --widths 8 --bits 1 --until plan --out no", 1)
    assert "--method llm-pruner with 8 bits everywhere and 90% removed needs at least" in told.replace("\n", " ")
    assert "--method llm-pruner knows budgets of bytes only" in run(f"{EXPORT} --latency 1ms", 2)


def test_no_prune_takes_the_widest_width_that_fits_whole(shelf: Path, run: Callable[..., str]) -> None:
    run(f"{EXPORT} --bits 4 --no-prune --until plan --out unpruned")
    plan = plan_of(shelf / "unpruned")
    assert plan["removed"] == []
    assert plan["search"]["rate"] == 0
    assert {choice["bits"] for choice in plan["choices"]} == {3}  # 4 bits and their scales are more than 4 a weight
    assert "and 0% removed" in run(f"{EXPORT} --widths 4 --bits 4 --no-prune --until plan --out none", 1)
