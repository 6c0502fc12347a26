"""Task files: exact rows, repacked rows that give the dataset's own back, and files that are refused by name."""

from __future__ import annotations

import bz2
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jpq_export.errors import JpqError, UsageError
from jpq_export.evaluate import task_data
from jpq_export.evaluate.task_data import read_task, task_choice, undo

REPACKED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "arc_easy": lambda row: {
        "query": "Question: " + row["question"],
        "choices": row["choices"]["text"],
        "gold": row["choices"]["label"].index(row["answerKey"]),
    },
    "piqa": lambda row: {
        "query": f"Question: {row['goal']}\n",
        "choices": [row["sol1"], row["sol2"]],
        "gold": row["label"],
    },
    "winogrande": lambda row: {
        "context_options": [row["sentence"].split("_")[0] + row[f"option{i}"] for i in (1, 2)],
        "continuation": row["sentence"].split("_")[1].strip(),
        "gold": int(row["answer"]) - 1,
    },
}


def test_exact_rows_stay_what_they_are(task_folder: Path, task_rows: dict[str, list[dict[str, Any]]]) -> None:
    for task, rows in task_rows.items():
        assert read_task(task, task_folder).rows == rows


def test_parquet_rows_have_plain_values(task_folder: Path, task_rows: dict[str, list[dict[str, Any]]]) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed; it comes with lm-eval")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed; it comes with lm-eval")
    (task_folder / "arc_easy.jsonl").unlink()
    pandas.DataFrame(task_rows["arc_easy"]).to_parquet(task_folder / "arc_easy.parquet")
    assert read_task("arc_easy", task_folder).rows == task_rows["arc_easy"]


@pytest.mark.parametrize("task", REPACKED)
def test_repacked_rows_give_the_datasets_own_back(
    task: str, tmp_path: Path, task_rows: dict[str, list[dict[str, Any]]]
) -> None:
    rows = [{k: v for k, v in row.items() if k != "id"} for row in task_rows[task]]
    (tmp_path / f"{task}.json").write_text(json.dumps([REPACKED[task](row) for row in rows]))
    assert read_task(task, tmp_path).rows == rows


def test_six_lines_a_question(tmp_path: Path, task_rows: dict[str, list[dict[str, Any]]]) -> None:
    rows = task_rows["hellaswag"]
    lines = []
    for row in rows:
        lines += [f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b']}", row["label"], *row["endings"]]
    (tmp_path / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress("\n".join(lines).encode()))
    assert read_task("hellaswag", tmp_path).rows == rows
    (tmp_path / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress("\n".join(lines[:-1]).encode()))
    with pytest.raises(UsageError, match=r"hellaswag_val_full\.txt\.bz2: not rows of hellaswag \(17 lines"):
        read_task("hellaswag", tmp_path)


@pytest.mark.parametrize(
    ("context", "parts"),
    [
        ("A man sits. He is old. the man", ("A man sits. He is old.", "the man")),
        ("A man sits. He is old.", ("A man sits. He is old.", "")),
        ("no end at all", ("no end at all", "")),
    ],
)
def test_the_unfinished_sentence_is_a_part_of_its_own(context: str, parts: tuple[str, str]) -> None:
    row = undo("hellaswag", {"context": f"Sitting: {context}", "gold": 1, "endings": ["a"] * 4})
    assert (row["ctx_a"], row["ctx_b"]) == parts


def test_words_that_begin_alike_are_not_cut() -> None:
    row = undo("winogrande", {"context_options": ["so the blanket", "so the bed"], "continuation": "won.", "gold": 1})
    assert row == {"sentence": "so the _ won.", "option1": "blanket", "option2": "bed", "answer": "2"}


def test_boolq_answers_are_labels() -> None:
    assert undo("boolq", {"answer": True})["label"] == 1
    assert undo("boolq", {"answer": True, "label": 0})["label"] == 0


def test_files_that_are_not_there_or_not_clear(task_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: not a folder"):
        read_task("piqa", tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"no file for sciq; expected sciq\.jsonl"):
        read_task("sciq", task_folder)
    (task_folder / "piqa.json").write_text("[]")
    with pytest.raises(UsageError, match=r"piqa\.jsonl and piqa\.json for piqa"):
        read_task("piqa", task_folder)


@pytest.mark.parametrize(
    "body", ["", "no json", '{"gold": 1}', "[1, 2]", '{"query": 3, "choices": ["a", "b"], "gold": 0}']
)
def test_damaged_rows_are_refused_with_the_file(body: str, tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_text(body)
    with pytest.raises(UsageError, match=r"--task-data .*piqa\.jsonl: (not rows of piqa|empty)"):
        read_task("piqa", tmp_path)


def test_options_belong_together(task_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert task_choice(None, limit=None, folder=None) is None
    with pytest.raises(UsageError, match="--limit: goes with --tasks"):
        task_choice(None, limit=3, folder=None)
    monkeypatch.setattr(task_data.metadata, "version", lambda name: {"lm_eval": "9.9"}[name])
    for names in ("piqa,", "piqa,piqa"):
        with pytest.raises(UsageError, match="different names by commas"):
            task_choice(names, limit=None, folder=task_folder)
    choice = task_choice("piqa,boolq", limit=2, folder=task_folder)
    assert choice is not None
    assert [len(data.rows) for data in choice.data.values()] == [2, 2]
    assert choice.about()["lm_eval"] == "9.9"
    other = task_choice("piqa,boolq", limit=3, folder=task_folder)
    assert other is not None
    assert other.about() != choice.about()


def test_a_missing_lm_eval_is_said(task_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise task_data.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(task_data.metadata, "version", missing)
    with pytest.raises(JpqError, match=r"lm-eval is not installed; pip install 'jpq-export\[tasks\]'"):
        task_choice("piqa", limit=None, folder=task_folder)
