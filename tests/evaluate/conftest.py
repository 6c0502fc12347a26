"""Questions made up for these tests, in the exact rows of the datasets that lm-eval reads; no published question."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

THINGS = ("the weight", "a thin thread", "the other thing", "that", "the north wind", "a moth")


def _choices(i: int) -> dict[str, Any]:
    return {"text": [THINGS[i], THINGS[i + 1], "the", THINGS[i + 2]], "label": ["A", "B", "C", "D"]}


def _arc(i: int) -> dict[str, Any]:
    return {"id": f"q{i}", "question": f"What is thing {i}?", "choices": _choices(i), "answerKey": "ABCD"[i]}


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "hellaswag": lambda i: {
        "activity_label": "Weighing",
        "ctx_a": f"A man takes {THINGS[i]}.",
        "ctx_b": "the man",
        "endings": [f"weighs {THINGS[i]} [step] twice.", "leaves.", "then throws it there.", "thinks."],
        "label": str(i),
    },
    "piqa": lambda i: {"goal": f"Weigh {THINGS[i]}.", "sol1": "Use a scale.", "sol2": "Eat the scale.", "label": i % 2},
    "winogrande": lambda i: {
        "sentence": f"The moth left the thread because the _ was too thin, {i} times.",
        "option1": "moth",
        "option2": "thread",
        "answer": str(1 + i % 2),
    },
    "boolq": lambda i: {"passage": "They weigh things.", "question": f"is {THINGS[i]} heavy", "label": i % 2, "idx": i},
    "lambada_openai": lambda i: {"text": f"They then thought of the other thing and of {THINGS[i]}"},
}


@pytest.fixture(scope="session")
def task_rows() -> dict[str, list[dict[str, Any]]]:
    return {task: [make(i) for i in range(3)] for task, make in ROWS.items()}


@pytest.fixture
def task_folder(tmp_path: Path, task_rows: dict[str, list[dict[str, Any]]]) -> Path:
    """A folder for --task-data with all of them."""
    folder = tmp_path / "questions"
    folder.mkdir()
    for task, rows in task_rows.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
