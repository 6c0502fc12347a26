"""A whole export of a tiny model by --method qpruner: parity, the cap, a stopped run, what is refused."""

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("botorch", reason="BoTorch is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from click.testing import CliRunner

from jpq_export.cli import main
from jpq_export.methods.qpruner import search
from jpq_export.methods.qpruner.trials import TrialModel

EXPORT = "export m --method qpruner --target jetson --effort quick --context 64"


@pytest.fixture(scope="module")
def shelf(quick_shelf: Callable, save_tiny: Callable[..., Path]) -> Iterator[Path]:
    """A model m and a cache; nine trials."""
    with quick_shelf("qpruner") as (folder, patch):
        patch.setitem(search.TRIALS, "quick", 9)
        save_tiny(folder / "m", "llama", intermediate_size=256, num_key_value_heads=4)
        yield folder


@pytest.fixture(scope="module")
def bundle(shelf: Path, run: Callable[..., str]) -> Path:
    run(f"{EXPORT} --bits 3.6 --out {shelf / 'bundle'}")
    return shelf / "bundle"


def plan_of(folder: Path) -> dict:
    return json.loads((folder / "plan.json").read_text())


def test_a_whole_export_is_proved(bundle: Path, run: Callable[..., str]) -> None:
    assert json.loads((bundle / "parity.json").read_text())["passed"]
    run(f"verify {bundle}")
    plan, manifest = plan_of(bundle), json.loads((bundle / "manifest.json").read_text())
    assert plan["method"] == "qpruner"
    assert manifest["weight_bytes"] == plan["predicted"]["bytes"] <= plan["budget"]["bytes"]
    heads = [len(layer["kv_heads"]) for layer in plan["layers"]]
    assert sum(heads) == 8 - 2  # the nearest whole number to 20% of 8
    assert plan["removed"]
    assert plan["search"]["rate"] == 0.2
    for i in range(2):
        widths = {choice["bits"] for choice in plan["choices"] if choice["name"].startswith(f"layers.{i}.")}
        assert len(widths) == 1
        assert widths <= {2, 4, 8}


def test_the_plan_is_the_best_of_its_trials(bundle: Path) -> None:
    plan = plan_of(bundle)
    trials = plan["search"]["trials"]
    assert all(trial["bytes"] <= plan["budget"]["bytes"] for trial in trials)
    assert plan["predicted"]["kl"] == min(trial["kl"] for trial in trials)
    assert len({tuple(trial["bits"]) for trial in trials}) == len(trials) > 3
    sizes = [point["bytes"] for point in plan["front"]]
    losses = [point["predicted_kl"] for point in plan["front"]]
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)


def test_the_report_shows_every_trial_and_the_front(bundle: Path) -> None:
    page, plan = (bundle / "parity.html").read_text(), plan_of(bundle)
    assert page.count('class="trial"') == len(plan["search"]["trials"])
    assert page.count('class="point"') == len(plan["front"])
    assert "Bayesian search" in page


def test_twin_a_flipped_byte_is_named(bundle: Path, run: Callable[..., str]) -> None:
    codes = bundle / "model.onnx.data"
    whole = codes.read_bytes()
    codes.write_bytes(whole[::-1])
    run(f"verify {bundle}", expected=1)
    codes.write_bytes(whole)


def test_a_stopped_search_goes_on_and_ends_the_same(
    shelf: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Callable[..., str]
) -> None:
    """Stopped after three trials; six more are measured, and the plan has the same bytes."""
    monkeypatch.setenv("JPQ_CACHE", str(tmp_path))
    measure, measured = TrialModel.loss, []

    def stopping(self: TrialModel, levels: tuple[int, ...]) -> float:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(levels)
        return measure(self, levels)

    monkeypatch.setattr(TrialModel, "loss", stopping)
    command = f"{EXPORT} --bits 3.6 --until plan --out {tmp_path}"
    assert CliRunner().invoke(main, shlex.split(f"{command}/stopped")).exit_code != 0
    measured.clear()
    monkeypatch.setattr(TrialModel, "loss", lambda self, levels: measured.append(levels) or measure(self, levels))
    run(f"{command}/again")
    total = len(plan_of(bundle)["search"]["trials"])
    assert len(measured) == total - 3
    assert (tmp_path / "again" / "plan.json").read_bytes() == (bundle / "plan.json").read_bytes()
    measured.clear()  # and once more, with every trial found
    assert "resumed" in run(f"{command}/third")
    assert not measured
    assert (tmp_path / "third" / "plan.json").read_bytes() == (bundle / "plan.json").read_bytes()
    # The twin: another seed ends elsewhere, so equality is not for want of a choice.
    run(f"{EXPORT} --bits 3.6 --seed 1 --until plan --out {tmp_path / 'seed'}")
    assert (tmp_path / "seed" / "plan.json").read_bytes() != (bundle / "plan.json").read_bytes()


def test_its_plan_gives_the_same_bundle(shelf: Path, bundle: Path, run: Callable[..., str]) -> None:
    run(f"{EXPORT} --plan {bundle / 'plan.json'} --out {shelf / 'again'}")
    assert (shelf / "again" / "model.onnx.data").read_bytes() == (bundle / "model.onnx.data").read_bytes()


def test_without_pruning_only_bits_are_chosen(shelf: Path, run: Callable[..., str]) -> None:
    run(f"{EXPORT} --no-prune --widths 3,4,6 --bits 4.5 --until plan --out {shelf / 'whole'}")
    plan = plan_of(shelf / "whole")
    assert plan["removed"] == []
    assert {choice["bits"] for choice in plan["choices"]} <= {3, 4, 6}


@pytest.mark.parametrize(
    ("options", "told", "code"),
    [
        ("--target jetson --widths 4", "two or more", 2),
        ("--target jetson --latency 5ms", "--size, --bits or --ratio", 2),
        ("--target jetson --bits 0.4", "cannot be met", 1),
    ],
)
def test_what_it_cannot_do_is_one_line(
    shelf: Path, options: str, told: str, code: int, run: Callable[..., str]
) -> None:
    out = run(f"export m --method qpruner --effort quick {options} --out {shelf / 'no'}", expected=code)
    assert told in out
    assert "Traceback" not in out


def test_a_missing_extra_is_named(shelf: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., str]) -> None:
    monkeypatch.setattr(search, "EXTRA", ("not_a_package",))
    assert "pip install" in run(f"{EXPORT} --bits 3 --out {shelf / 'no'}", expected=2)
