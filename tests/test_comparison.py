"""`compare` on a tiny model: every cell, resumed cells, the table, and a text that does not exist."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from jpq_export.cli import COMPARED as METHODS
from jpq_export.comparison import pruned_width
from jpq_export.comparison_picture import picture_file
from jpq_export.comparison_report import made_by
from jpq_export.compress import effort
from jpq_export.errors import BudgetError
from jpq_export.evaluate import text_quality
from jpq_export.peers.run import PeerError

SVG = "{http://www.w3.org/2000/svg}"
WORDS = "the weight of the thing there and the rest of what they then thought "


@pytest.fixture
def compare(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Result, list[dict[str, Any]]]]:
    """Runs the command with one budget on 2 windows of 32 bytes; returns its result and comparison.json."""
    from jpq_export.cli import main

    monkeypatch.setenv("JPQ_CACHE", str(tmp_path / "cache"))
    tiny = effort.Effort("quick", 4, 2, 64, 1, 6, 2, (("table", (1.0,)),))
    monkeypatch.setitem(effort.EFFORTS, "quick", tiny)
    folder, text, out = tiny_folder("llama_tied"), tmp_path / "text.txt", tmp_path / "out"
    text.write_text(WORDS * 4)

    def run(*options: str) -> tuple[Result, list[dict[str, Any]]]:
        base = ["compare", str(folder), "--target", "jetson", "--effort", "quick", "--out", str(out)]
        base += ["--budgets", "5.5", "--windows", "2", "--window-context", "32"]
        result = CliRunner().invoke(main, [*base, *(options or ("--text", str(text)))])
        table = out / "comparison.json"
        return result, json.loads(table.read_text()) if table.exists() else []

    return run


def test_every_method_has_a_row_at_equal_bytes(compare: Callable) -> None:
    result, rows = compare()
    assert result.exit_code == 0, result.output
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        assert row["bits_per_weight"] <= 5.5
        assert row["texts"]["text.txt"]["kl_mean"] > 0
        assert row["method"] in result.output
    assert len({round(row["texts"]["text.txt"]["teacher_perplexity"], 6) for row in rows}) == 1


def test_finished_cells_are_kept_and_stale_ones_made_again(
    compare: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, first = compare()
    calls = []
    original = text_quality.evaluate_text
    monkeypatch.setattr(
        "jpq_export.comparison_cells.evaluate_text", lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    )
    _, again = compare()
    assert again == first
    assert not calls
    (tmp_path / "out" / "joint-5.5.json").unlink()
    _, again = compare()
    assert [row["texts"] for row in again] == [row["texts"] for row in first]
    assert len(calls) == 1
    other = tmp_path / "other.txt"
    other.write_text(WORDS[::-1] * 4)
    _, changed = compare("--text", str(other))
    assert len(calls) == 1 + len(METHODS)
    assert list(changed[0]["texts"]) == ["other.txt"]


def test_cells_of_other_code_are_made_again_unless_they_are_to_be_kept(
    compare: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ["--text", str(tmp_path / "text.txt"), "--methods", "rtn-uniform"]
    result, (first,) = compare(*options)
    assert f"commit {first['commit']}, {first['date']}, {first['machine']}: rtn-uniform" in result.output
    monkeypatch.setattr("jpq_export.comparison.revision", lambda: "other code")
    monkeypatch.setattr("jpq_export.comparison.provenance", lambda: first_of(first) | {"commit": "abc1234"})
    _, (kept,) = compare(*options, "--keep")
    assert kept == first
    assert ElementTree.parse(tmp_path / "out" / "comparison.svg").getroot().tag == f"{SVG}svg"
    _, (again,) = compare(*options)
    assert (again["commit"], again["revision"]) == ("abc1234", "other code")
    _, (changed,) = compare(*options, "--keep", "--seed", "1")
    assert changed["key"] != first["key"]


def first_of(row: dict[str, Any]) -> dict[str, str]:
    return {"revision": "other code"} | {name: row[name] for name in ("date", "machine")}


def test_a_missing_text_is_said_before_anything_runs(compare: Callable, tmp_path: Path) -> None:
    result, rows = compare("--text", str(tmp_path / "nowhere.txt"))
    assert result.exit_code == 2
    assert "nowhere.txt" in result.output
    assert not rows


def test_the_pruning_rival_removes_as_little_as_it_can() -> None:
    assert [pruned_width(bits) for bits in (2.1, 2.58, 3.15, 4.16, 5.3)] == [2, 3, 3, 4, 6]
    assert [pruned_width(bits, (1, 1.6, 2)) for bits in (1.2, 1.5, 2.1, 4)] == [1, 1.6, 2, 2]


def test_narrow_widths_bring_budgets_nothing_else_meets(compare: Callable, tmp_path: Path) -> None:
    ours = "prune-then-quantize,bits-only,joint,rtn-uniform"
    options = ["--text", str(tmp_path / "text.txt"), "--methods", ours, "--budgets", "2.3", "--widths", "1,1.6,2"]
    result, rows = compare(*options)
    assert result.exit_code == 0, result.output
    assert [row["method"] for row in rows] == ours.split(",")
    assert all(row["bits_per_weight"] <= 2.3 for row in rows)
    refused, _ = compare(*options[:-3], "1.6", "--widths", "1.6,2")
    assert "--budgets '1.6': expected bits per weight above 1.6, up to 8" in refused.output


def test_tasks_are_columns_that_can_come_later(
    compare: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, conftest_of: Callable[[str], Any]
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'jpq-export[tasks]'")
    questions = tmp_path / "questions"
    questions.mkdir()
    for task in ("piqa", "lambada_openai"):
        rows = [json.dumps(conftest_of("evaluate").ROWS[task](i)) for i in range(3)]
        (questions / f"{task}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    options = ["--methods", "rtn-uniform", "--text", str(tmp_path / "text.txt")]
    asked = [*options, "--tasks", "piqa,lambada_openai", "--task-data", str(questions)]
    _, before = compare(*options)
    made = []
    monkeypatch.setattr("jpq_export.comparison_cells.evaluate_text", lambda *a, **k: made.append(1))
    result, after = compare(*asked)
    assert result.exit_code == 0, result.output
    assert not made
    (row,) = after
    assert row["texts"] == before[0]["texts"]
    assert "| piqa acc_norm (original " in result.output
    out = tmp_path / "out"
    assert row["tasks"] == answers_of(out / "rtn-uniform-5.5", tmp_path / "llama_tied", questions)
    assert row["teacher_tasks"] == json.loads((out / "teacher-tasks.json").read_text())["tasks"]
    perplexity = [row[part]["lambada_openai"]["perplexity"] for part in ("tasks", "teacher_tasks")]
    assert perplexity[0] != pytest.approx(perplexity[1], rel=1e-3)
    assert compare(*asked)[1] == after
    assert compare(*asked, "--limit", "2")[1][0]["tasks"]["piqa"]["samples"] == 2
    assert "tasks" in (out / "comparison.json").read_text()
    assert "original" in (out / "comparison.html").read_text()


def test_the_picture_is_a_file_of_its_own() -> None:
    def row(method: str, bits: float, kl: float) -> dict[str, Any]:
        return {"method": method, "bits_per_weight": bits, "texts": {"a<b.txt": {"kl_mean": kl}, "c": {"kl_mean": kl}}}

    rows = [row("joint", 2, 0.4), row("joint", 3, 0.1), row("a & b", 2, 4.0), {"method": "gone", "error": "no memory"}]
    root = ElementTree.fromstring(picture_file(rows, "tiny"))
    words = [node.text for node in root.iter(f"{SVG}text")]
    assert words.count("joint") == words.count("a & b") == 2
    assert "tiny: KL to the original, nats a token, a<b.txt" in words
    assert "gone" not in words
    circles = [(float(node.get("cx", 0)), float(node.get("cy", 0))) for node in root.iter(f"{SVG}circle")]
    (x2, y2), (x3, y3), (x, y), *second = circles
    assert len(second) == 3
    assert x2 == x < x3
    assert y < y2 < y3  # a lower KL stands lower


def answers_of(folder: Path, teacher: Path, questions: Path) -> dict[str, Any]:
    """What the cell's model answers, by the parts that a comparison puts together."""
    from jpq_export.compress.load import load_model
    from jpq_export.compress.student import dequantized
    from jpq_export.evaluate.harness import ScoredModel, run_tasks
    from jpq_export.evaluate.predictors import TorchPredictor
    from jpq_export.evaluate.task_data import task_choice
    from jpq_export.format.compressed import CompressedModel

    model = dequantized(CompressedModel.load(folder / "compressed.safetensors"))
    loaded = load_model(str(teacher))
    choice = task_choice("piqa,lambada_openai", limit=None, folder=questions)
    assert choice is not None
    return run_tasks(ScoredModel(TorchPredictor(model, fast=True), loaded.spec, loaded.encode), choice)


@pytest.mark.parametrize("error", [BudgetError("nothing fits"), PeerError("hqq: broken")])
def test_a_peer_that_cannot_run_is_a_row(
    error: Exception, compare: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("jpq_export.peers.run.peer_model", fail)
    result, rows = compare("--methods", "hqq,rtn-uniform", "--text", str(tmp_path / "text.txt"))
    assert result.exit_code == 0, result.output
    assert [row.get("error") for row in rows] == [str(error), None]
    assert f"did not run: {error}" in result.output
    again = ValueError("tried again")
    error = PeerError(str(again))
    _, rows = compare("--methods", "hqq,rtn-uniform", "--text", str(tmp_path / "text.txt"), "--keep")
    assert rows[0]["error"] == str(again)


def test_a_text_that_is_missing_leaves_no_folder(compare: Callable, tmp_path: Path) -> None:
    result, _ = compare("--text", str(tmp_path / "no.txt"))
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_tasks_asked_elsewhere_name_who_asked() -> None:
    made = {"commit": "1111111", "date": "2026-01-01", "machine": "A"}
    asked = made | {"commit": "2222222"}
    row = made | {"method": "joint"}
    assert made_by([row | {"tasks_made": made}]) == ["commit 1111111, 2026-01-01, A: joint"]
    assert made_by([row | {"tasks_made": asked}])[1] == "commit 2222222, 2026-01-01, A: tasks of joint"


def test_tasks_need_data_before_anything_runs(compare: Callable, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'jpq-export[tasks]'")
    result, rows = compare("--text", str(tmp_path / "text.txt"), "--tasks", "piqa", "--task-data", str(tmp_path))
    assert result.exit_code == 2
    assert "no file for piqa" in result.output
    assert not rows


def test_the_studys_recommendation_is_a_row_at_the_same_bytes(compare: Callable, tmp_path: Path) -> None:
    result, rows = compare("--methods", "srcr", "--text", str(tmp_path / "text.txt"))
    assert result.exit_code == 0, result.output
    assert rows[0]["method"] == "srcr"
    assert rows[0]["bits_per_weight"] <= 5.5
    tried = rows[0]["cells"]
    assert tried
    assert min(cell["heldout_kl"] for cell in tried) > 0
    assert (tmp_path / "out" / "srcr-5.5" / "compressed.safetensors").is_file()
