"""`compare` on a tiny model: every cell, resumed cells, the table, and a text that does not exist."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from jpq_export.cli import COMPARED as METHODS
from jpq_export.comparison import pruned_width
from jpq_export.compress import effort
from jpq_export.evaluate import text_quality

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
    monkeypatch.setattr("jpq_export.comparison.evaluate_text", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
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


def test_a_missing_text_is_said_before_anything_runs(compare: Callable, tmp_path: Path) -> None:
    result, rows = compare("--text", str(tmp_path / "nowhere.txt"))
    assert result.exit_code == 2
    assert "nowhere.txt" in result.output
    assert not rows


def test_the_pruning_rival_removes_as_little_as_it_can() -> None:
    assert [pruned_width(bits) for bits in (2.1, 2.58, 3.15, 4.16, 5.3)] == [2, 3, 3, 4, 6]
