"""Task data from a folder instead of the hub: one file a task, in the dataset's own rows or a common repacking of them.

Exact rows, as the hub's datasets have them: `<task>.jsonl`, `.json` (a list) or `.parquet`, for any task of lm-eval.
Repacked, for four tasks whose evaluation sets circulate so; undone here, so that lm-eval's own prompts are used:
  arc_easy, arc_challenge, piqa   query ("Question: ..."), choices, gold
  winogrande                      context_options (two contexts that differ in one word), continuation, gold
  hellaswag                       text, also .bz2, of six lines a question: "activity: context", gold, four endings
  boolq                           answer (true or false) instead of label
"""

from __future__ import annotations

import bz2
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

from jpq_export.errors import JpqError, UsageError

Row = dict[str, Any]
ENDINGS = (".jsonl", ".json", ".parquet", ".txt", ".txt.bz2")
LINES = 6  # of a HellaSwag question


@dataclass(frozen=True, slots=True)
class TaskData:
    """Rows of one task as its dataset has them, with the file's name and the sha256 of its bytes."""

    name: str
    sha256: str
    rows: list[Row]


@dataclass(frozen=True, slots=True)
class TaskChoice:
    """Which tasks to run, on how many questions each (None: all), with which version of lm-eval, on which rows.

    A task without `data` is read from the hub or its local cache.
    """

    names: tuple[str, ...]
    limit: int | None
    lm_eval: str
    data: dict[str, TaskData]

    def about(self) -> dict[str, Any]:
        """What results depend on, as JSON values."""
        files = {name: {"file": data.name, "sha256": data.sha256} for name, data in self.data.items()}
        return {"lm_eval": self.lm_eval, "limit": self.limit, "names": list(self.names), "data": files}


def task_choice(names: str | None, *, limit: int | None, folder: Path | None) -> TaskChoice | None:
    """From `--tasks`, `--limit` and `--task-data`; UsageError for a wrong one, JpqError when lm-eval is missing."""
    if names is None:
        for option, value in (("--limit", limit), ("--task-data", folder)):
            if value is not None:
                raise UsageError(f"{option}: goes with --tasks; name some, such as --tasks arc_easy,piqa")
        return None
    chosen = tuple(name.strip() for name in names.split(","))
    if not all(chosen) or len(set(chosen)) < len(chosen):
        raise UsageError(f"--tasks {names!r}: expected different names by commas, such as arc_easy,piqa")
    try:
        version = metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise JpqError("--tasks: lm-eval is not installed; pip install 'jpq-export[tasks]'") from None
    data = {} if folder is None else {name: read_task(name, folder) for name in chosen}
    if limit is not None:  # lm-eval's own limit takes the first ones too, after preparing all
        data = {name: replace(value, rows=value.rows[:limit]) for name, value in data.items()}
    return TaskChoice(chosen, limit, version, data)


def read_task(task: str, folder: Path) -> TaskData:
    """The only file of `folder` whose name starts with the task's; UsageError when there is none, or not readable."""
    path = _find(task, folder)
    try:
        data = path.read_bytes()
        rows = [undo(task, row) for row in _rows(path, data)]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UsageError(f"--task-data {path}: not rows of {task} ({reason}); give the dataset's own rows") from error
    if not rows:
        raise UsageError(f"--task-data {path}: empty; give the dataset's own rows")
    return TaskData(path.name, sha256(data).hexdigest(), rows)


def _find(task: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise UsageError(f"--task-data {folder}: not a folder; give one that holds {task}.jsonl")
    exact = [folder / f"{task}{ending}" for ending in ENDINGS if (folder / f"{task}{ending}").is_file()]
    loose = [path for path in sorted(folder.glob(f"{task}_*")) if path.name.endswith(ENDINGS)]
    found = exact or loose
    if not found:
        raise UsageError(f"--task-data {folder}: no file for {task}; expected {task}.jsonl or {task}.parquet")
    if len(found) > 1:
        raise UsageError(f"--task-data {folder}: {found[0].name} and {found[1].name} for {task}; keep one")
    return found[0]


def _rows(path: Path, data: bytes) -> Iterator[Row]:
    if path.suffix == ".parquet":
        from pandas import read_parquet  # pyright: ignore[reportMissingImports] comes with lm-eval

        # through JSON: numpy's own types have no truth value
        yield from json.loads(str(read_parquet(path).to_json(orient="records")))
        return
    text = (bz2.decompress(data) if path.suffix == ".bz2" else data).decode("utf-8")
    if path.suffix == ".json":
        yield from json.loads(text)
    elif path.suffix == ".jsonl":
        yield from (json.loads(line) for line in text.splitlines() if line.strip())
    else:
        yield from _six_lines(text.rstrip("\n").split("\n"))


def _six_lines(lines: list[str]) -> Iterator[Row]:
    if len(lines) % LINES:
        raise ValueError(f"{len(lines)} lines, expected six a question")
    for at in range(0, len(lines), LINES):
        context, gold, *endings = lines[at : at + LINES]
        yield {"context": context, "gold": int(gold), "endings": endings}


def undo(task: str, row: Row) -> Row:
    """A repacked row as the dataset has it; any other row unchanged."""
    if not isinstance(row, dict):
        raise ValueError(f"a row is {type(row).__name__}, expected an object")
    if task == "boolq" and "label" not in row:
        return row | {"label": int(row["answer"])}
    return UNDO[task](row) if task in UNDO and "gold" in row else row


def _arc(row: Row) -> Row:
    labels = [chr(ord("A") + i) for i in range(len(row["choices"]))]
    choices = {"text": row["choices"], "label": labels}
    return {"question": _question(row), "choices": choices, "answerKey": labels[row["gold"]]}


def _piqa(row: Row) -> Row:
    first, second = row["choices"]
    return {"goal": _question(row), "sol1": first, "sol2": second, "label": row["gold"]}


def _question(row: Row) -> str:
    return row["query"].removeprefix("Question: ").rstrip("\n")


def _winogrande(row: Row) -> Row:
    """The blank stands for the words in which the two contexts differ, at their end."""
    first, second = row["context_options"]
    same = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    start = first.rfind(" ", 0, same) + 1
    return {
        "sentence": f"{first[:start]}_ {row['continuation']}",
        "option1": first[start:],
        "option2": second[start:],
        "answer": str(row["gold"] + 1),
    }


def _hellaswag(row: Row) -> Row:
    """The unfinished last sentence is ctx_b, which lm-eval writes with a capital; WikiHow's marks are gone already."""
    activity, context = row["context"].split(": ", 1)
    parts = re.fullmatch(r"(.*[.!?]) +([^ ].*[^.!?])", context, re.DOTALL)
    first, second = parts.groups() if parts else (context, "")
    return {
        "activity_label": activity,
        "ctx_a": first,
        "ctx_b": second,
        "endings": row["endings"],
        "label": str(row["gold"]),
    }


UNDO: dict[str, Callable[[Row], Row]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "piqa": _piqa,
    "winogrande": _winogrande,
    "hellaswag": _hellaswag,
}
