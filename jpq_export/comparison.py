"""`jpq-export compare`: joint search against separate ones at equal stored bytes, one table.

Rows: uniform-bit rounding and GPTQ; pruning first, then one width for what is left; bits-only search; the joint search;
the published systems (see `methods`); and other people's quantizers (see `peers`). All see the same calibration tokens
(GPTQ rounds with all of them, the searched ones spend most on the same recovery). The teacher is the permuted model
(see `permute`). Every cell is a JSON file with the commit, the day and the machine that made it: a run that was killed
goes on where it stopped, and one that goes on after the code has changed makes them again unless told to keep them.
A peer that cannot run stays in the table with its error.
Zero-shot tasks are a second step over the finished cells: they can be asked for later, and nothing is compressed anew.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jpq_export.comparison_cells import PermutedExport, Remembered, maker, table_moments
from jpq_export.comparison_picture import picture_file
from jpq_export.comparison_report import page
from jpq_export.evaluate.predictors import TorchPredictor
from jpq_export.evaluate.task_data import TaskChoice
from jpq_export.evaluate.texts import EvaluationText, read_text, token_windows
from jpq_export.evaluation import check_tasks, check_window, evaluate_tasks
from jpq_export.format.compressed import COMPRESSED, CompressedModel
from jpq_export.format.spec import ModelSpec
from jpq_export.numerics.scheme import BIT_WIDTHS
from jpq_export.peers.layout import MODEL
from jpq_export.progress import Stages
from jpq_export.request import Request
from jpq_export.revision import provenance, revision
from jpq_export.workspace import write_atomic

if TYPE_CHECKING:
    from jpq_export.compress.load import LoadedModel

LORA_RANK = 8  # of qpruner-lora's branches: a tenth of SmolLM2-135M's bytes at 3 bits


@dataclass(frozen=True, slots=True)
class Comparison:
    """What to compare: budgets in bits per weight of the whole file; texts, in windows of `context` tokens; tasks.

    `keep`: cells that other code made are kept.
    """

    request: Request
    bits: tuple[float, ...]
    methods: tuple[str, ...]
    texts: tuple[Path, ...]
    windows: int
    context: int
    tasks: TaskChoice | None = None
    keep: bool = False


def compare(comparison: Comparison, stages: Stages) -> list[dict[str, Any]]:
    """All cells, computed or found; also written to `<out>/comparison.json`."""
    out = comparison.request.out
    texts = [read_text(path) for path in comparison.texts]  # a wrong path is said at once
    if comparison.tasks:
        check_tasks(comparison.tasks)
    loaded = PermutedExport(comparison.request, stages).load()
    windows = {text.name: _windows(comparison, loaded, text) for text in texts}
    texts_of_run = PermutedExport(comparison.request, stages).texts(loaded)
    inputs = sha256(json.dumps([text.sha256 for text in texts] + [comparison.windows, comparison.context]).encode())
    teacher, rows = Remembered(loaded.model), []
    out.mkdir(parents=True, exist_ok=True)  # nothing is left behind by what was wrong so far
    moments = cache(lambda: table_moments(loaded, texts_of_run))  # once for all peers, and only where there is one
    tasks, keep = comparison.tasks, comparison.keep
    questions = None if tasks is None else Questions(tasks, loaded, out, stages, keep)
    for bits in comparison.bits:
        for method in comparison.methods:
            cell, request = out / f"{method}-{bits:g}.json", request_for(comparison, method, bits)
            key = request.key(loaded.sha256, texts_of_run.sha256, code="") + inputs.hexdigest()
            row = json.loads(cell.read_text(encoding="utf-8")) if cell.is_file() else {}
            stale = row.get("key") != key or "error" in row or not (keep or row["revision"] == revision())
            if stale or (questions and questions.need_another(row, request)):
                stages.console.rule(f"{method}, {bits:g} bits")
                make = maker(method, loaded, texts_of_run, moments)
                row = {"key": key, **provenance(), "method": method, "asked_bits": bits}
                row |= make(request, teacher, windows, stages)
                write_atomic(cell, json.dumps(row, indent=1))
            if questions and questions.missing(row):
                row |= questions.row(request)
                write_atomic(cell, json.dumps(row, indent=1))
            rows.append(row)
    write_atomic(out / "comparison.json", json.dumps(rows, indent=1) + "\n")
    write_atomic(out / "comparison.html", page(rows, loaded.name))
    if any("texts" in row for row in rows):
        write_atomic(out / "comparison.svg", picture_file(rows, loaded.name))
    return rows


@dataclass(slots=True, eq=False)
class Questions:
    """Zero-shot tasks over finished cells; the teacher's answers, in `out`, are found once."""

    choice: TaskChoice
    loaded: LoadedModel
    out: Path
    stages: Stages
    keep: bool

    @property
    def key(self) -> str:
        """Names the questions and the model."""
        facts = [self.choice.about(), self.loaded.sha256]
        return sha256(json.dumps(facts).encode()).hexdigest()

    def missing(self, row: dict[str, Any]) -> bool:
        """True for a row that ran and was not asked these questions."""
        return "error" not in row and not self._answered(row)

    def need_another(self, row: dict[str, Any], request: Request) -> bool:
        """True where the questions are missing and the cell's model is gone."""
        return self.missing(row) and not any((request.out / name).is_file() for name in (COMPRESSED, MODEL))

    def row(self, request: Request) -> dict[str, Any]:
        """Answers of the model in the cell's folder, beside the teacher's."""
        found = self._teacher()
        return self._names() | {"tasks": self._ask(self._reopened(request.out)), "teacher_tasks": found}

    def _names(self) -> dict[str, Any]:
        return {"tasks_key": self.key, "tasks_revision": revision(), "tasks_made": provenance()}

    def _answered(self, row: dict[str, Any]) -> bool:
        return row.get("tasks_key") == self.key and (self.keep or row["tasks_revision"] == revision())

    def _teacher(self) -> dict[str, Any]:
        cell = self.out / "teacher-tasks.json"
        found: dict[str, Any] = json.loads(cell.read_text(encoding="utf-8")) if cell.is_file() else {}
        if not self._answered(found):
            found = self._names() | {"tasks": self._ask(self.loaded.model)}
            write_atomic(cell, json.dumps(found, indent=1))
        return found["tasks"]

    def _ask(self, model: Any) -> dict[str, Any]:
        predictor = TorchPredictor(model, fast=True)
        assert isinstance(self.loaded.spec, ModelSpec)
        return evaluate_tasks(predictor, self.loaded.spec, self.loaded.encode, self.choice, self.stages)

    def _reopened(self, folder: Path) -> Any:
        from jpq_export.compress.student import dequantized
        from jpq_export.peers.run import saved_model

        if (folder / COMPRESSED).is_file():
            return dequantized(CompressedModel.load(folder / COMPRESSED))
        assert isinstance(self.loaded.spec, ModelSpec)
        return saved_model(folder, self.loaded.spec)


def request_for(comparison: Comparison, method: str, bits: float) -> Request:
    """The export request of one cell."""
    request = comparison.request
    folder = request.out / f"{method}-{bits:g}"
    request = replace(
        request, out=folder, budget=replace(request.budget, kind="bits", value=bits), until="compress", force=True
    )
    if method in ("gptq-uniform", "rtn-uniform", "toga", "qpruner", "llm-pruner"):
        return replace(request, method=method.removesuffix("-uniform"))
    if method == "qpruner-lora":
        return replace(request, method="qpruner", adapters=LORA_RANK)
    if method == "bits-only":
        return replace(request, prune=False)
    if method == "prune-then-quantize":
        return replace(request, widths=(pruned_width(bits, request.widths or BIT_WIDTHS),))
    return request


def pruned_width(bits: float, widths: tuple[float, ...] = BIT_WIDTHS) -> float:
    """The narrowest width that needs pruning to fit with scales of groups of 64, or nearly so with wider ones.

    Less is removed, which suits this rival, than with more bits.
    """
    return min((b for b in widths if b + 16 / 64 > bits), default=max(widths))


def _windows(comparison: Comparison, loaded: Any, text: EvaluationText) -> np.ndarray:
    check_window(comparison.context, loaded.spec, "--window-context")
    bos_id = loaded.spec.bos_id if loaded.spec.add_bos else None
    return token_windows(text, loaded.encode, windows=comparison.windows, context=comparison.context, bos_id=bos_id)
