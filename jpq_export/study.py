"""`jpq-export study`: the same theoretical compression rate from fewer weights or from fewer bits (arXiv 2505.07289).

Every cell compresses the model anew and is one JSON file in `<out>/cells`: a study that was killed goes on where it
stopped, and a wider one keeps what is there.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jpq_export.comparison_cells import Remembered
from jpq_export.compress.decoder import Decoder
from jpq_export.errors import StorageError, UsageError
from jpq_export.evaluate.predictors import TorchPredictor
from jpq_export.evaluate.task_data import TaskChoice
from jpq_export.evaluate.text_quality import evaluate_text
from jpq_export.evaluate.texts import read_text, token_windows
from jpq_export.evaluation import check_tasks, evaluate_tasks
from jpq_export.format.compressed import CompressedModel
from jpq_export.methods.srcr.compress import check_columns, compress_cell, sizes, structure_of
from jpq_export.methods.srcr.page import page
from jpq_export.methods.srcr.points import Cell, grid
from jpq_export.methods.srcr.score import BALANCE, RETENTION, recommend, scored
from jpq_export.progress import Stages
from jpq_export.request import Texts
from jpq_export.revision import revision
from jpq_export.workspace import write_atomic

if TYPE_CHECKING:
    from jpq_export.compress.apply import LayerChoice
    from jpq_export.compress.statistics import Statistics

CELL_CODE = ("compress", "numerics", "evaluate", "methods/srcr")  # what the numbers of a cell depend on
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Effort:
    """Calibration sequences of `length` tokens, held-out ones to measure on; the widths and cases of the grid."""

    sequences: int
    length: int
    heldout: int
    widths: tuple[int, ...]
    cases: tuple[str, ...]


EFFORTS = {
    "quick": Effort(8, 512, 6, (2, 3, 4, 8), ("B",)),
    "standard": Effort(24, 512, 12, (2, 3, 4, 6, 8), ("A", "B")),
    "max": Effort(128, 2048, 16, (2, 3, 4, 5, 6, 8), ("A", "B")),  # SparseGPT's and GPTQ's published tokens
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What to study. `text`: measure on `windows` of `context` tokens of it instead of held-out calibration text."""

    model: str | None
    out: Path
    rates: tuple[float, ...]
    patterns: tuple[str, ...]
    effort: str = "standard"
    widths: tuple[int, ...] | None = None
    cases: tuple[str, ...] | None = None
    calibration: Path | None = None
    text: Path | None = None
    windows: int = 20
    context: int = 2048
    tasks: TaskChoice | None = None
    seed: int = 0
    device: str = "cpu"

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The grid."""
        effort = EFFORTS[self.effort]
        return grid(self.rates, self.widths or effort.widths, self.patterns, self.cases or effort.cases)


class Study:
    """One run: `run` fills the cells, `compressed` makes the model of one of them again."""

    def __init__(self, settings: Settings, stages: Stages) -> None:
        self.settings, self.stages, self.effort = settings, stages, EFFORTS[settings.effort]
        self.cells, self.content = settings.cells, read_text(settings.text) if settings.text else None
        if settings.tasks:
            check_tasks(settings.tasks)
        self._gates: dict[str, Any] | None = None
        self._stats: Statistics | None = None

    def run(self) -> Row:
        """study.json as a value, written with study.html to `out`."""
        new = not self.settings.out.exists()
        self._open_folder()
        try:
            self._load()
        except BaseException:
            if new:  # nothing was made yet
                shutil.rmtree(self.settings.out, ignore_errors=True)
            raise
        rows, started, made = [], time.perf_counter(), 0
        for number, cell in enumerate(self.cells):
            path = self.settings.out / "cells" / f"{cell.name}.json"
            row = _read(path)
            if row.get("key") != self.key:
                made += 1
                row = {"key": self.key, "name": cell.name, "rate": cell.rate} | asdict(cell) | self._cell(cell)
                write_atomic(path, json.dumps(row, indent=1))
                left = (time.perf_counter() - started) / made * self._missing(self.cells[number + 1 :])
                self.stages.note(f"cell {number + 1} of {len(self.cells)}, about {left / 60:.0f} min left")
            rows.append(scored(row))
        return self._write(rows)

    def _missing(self, cells: tuple[Cell, ...]) -> int:
        folder = self.settings.out / "cells"
        return sum(_read(folder / f"{cell.name}.json").get("key") != self.key for cell in cells)

    def _open_folder(self) -> None:
        out = self.settings.out
        try:
            (out / "cells").mkdir(parents=True, exist_ok=True)
            write_atomic(
                out / "cells" / "README.txt", "Cells of `jpq-export study`: delete one to have it made again.\n"
            )
        except OSError as error:
            raise StorageError(f"--out {out}: cannot write ({error.strerror}); choose a writable folder") from error

    def _load(self) -> None:
        from jpq_export.compress.load import EXPORT_FACTOR, check_memory, load_model

        settings = self.settings
        with self.stages.stage("load", "loading the model") as report:
            self.loaded = load_model(settings.model, progress=report, device=settings.device)
        model = self.loaded.model
        if not isinstance(model, Decoder):
            raise UsageError(f"{self.loaded.name}: study is for language models; export a sentence encoder directly")
        self.model, self.spec = model, model.spec
        check_columns(self.spec, self.cells)
        if settings.device == "cpu":
            check_memory(self.spec, self.loaded.name, factor=EXPORT_FACTOR - 1)
        self.texts, windows = self._sequences()
        self.windows, self.teacher = windows, Remembered(model)
        facts = [self.loaded.sha256, self.texts.sha256, sha256(windows.tobytes()).hexdigest(), settings.seed]
        tasks = settings.tasks.about() if settings.tasks else None
        self.key = sha256(json.dumps([*facts, settings.device, tasks, revision(CELL_CODE)]).encode()).hexdigest()

    def _sequences(self) -> tuple[Texts, np.ndarray]:
        """Calibration and held-out tokens, and what cells are measured on."""
        from jpq_export.compress.calibration_text import calibration_and_heldout

        settings, effort = self.settings, self.effort
        bos_id = self.spec.bos_id if self.spec.add_bos else None
        chosen, kept_out = calibration_and_heldout(
            settings.calibration,
            self.loaded.encode,
            bos_id=bos_id,
            calibration=effort.sequences,
            heldout=effort.heldout,
            length=effort.length,
            seed=settings.seed,
        )
        if len(chosen) < effort.sequences:
            told = f"{len(chosen)} of {effort.sequences} sequences of {effort.length} tokens"
            self.stages.note(f"the calibration text gives {told}; give a longer one with --calibration for all of them")
        texts = Texts(chosen, kept_out, kept_out)
        if self.content is None:
            return texts, kept_out
        kind = {"windows": settings.windows, "context": settings.context, "bos_id": bos_id}
        return texts, token_windows(self.content, self.loaded.encode, **kind)

    def structure(self, cell: Cell) -> tuple[LayerChoice, ...]:
        """What a cell keeps of the layers; the Fisher's prices are computed once, when a cell needs them."""
        if cell.pattern == "structural" and self._gates is None:
            from jpq_export.compress.statistics import collect

            with self.stages.stage("statistics", "collecting Fisher statistics") as report:
                self._gates = collect(
                    self.model, self.texts.calibration, seed=self.settings.seed, progress=report
                ).gates
        return structure_of(self.spec, cell, self._gates or {})

    def compressed(self, cell: Cell, layers: tuple[LayerChoice, ...]) -> CompressedModel:
        """The cell's model; equal bytes every time."""
        from jpq_export.compress.statistics import plain_statistics

        with self.stages.stage("compress", f"{cell.name}: pruning and rounding, layer by layer") as report:
            if self._stats is None:
                self._stats = plain_statistics(self.model, self.texts.calibration)
            return compress_cell(self.model, cell, layers, self._stats, self.texts.calibration, report)

    def _cell(self, cell: Cell) -> Row:
        from jpq_export.compress.student import dequantized

        layers = self.structure(cell)
        self.stages.records.clear()
        compressed = self.compressed(cell, layers)
        student = dequantized(compressed).to(self.model.embed.weight.device)
        with self.stages.stage("evaluate", f"{cell.name}: {len(self.windows)} windows") as report:
            quality = evaluate_text(Remembered(student), self.teacher, self.windows, progress=report)
        row: Row = {"sizes": asdict(sizes(compressed, self.spec, cell)), "quality": asdict(quality), "note": cell.note}
        if self.settings.tasks:
            row |= {"tasks": self._ask(student), "original_tasks": self._original()}
        seconds = sum(record.seconds for record in self.stages.records)
        peak = max(record.peak_rss_bytes for record in self.stages.records)
        return row | {"seconds": round(seconds, 1), "peak_rss_bytes": peak}

    def _original(self) -> Row:
        """The original's task scores, asked once."""
        path = self.settings.out / "cells" / "original.json"
        found = _read(path)
        if found.get("key") != self.key:
            found = {"key": self.key, "tasks": self._ask(self.model)}
            write_atomic(path, json.dumps(found, indent=1))
        return found["tasks"]

    def _ask(self, model: Any) -> Row:
        assert self.settings.tasks is not None
        predictor = TorchPredictor(model, fast=True)
        return evaluate_tasks(predictor, self.spec, self.loaded.encode, self.settings.tasks, self.stages)

    def _write(self, rows: list[Row]) -> Row:
        tokens = {"calibration": self.texts.calibration.size, "measured": self.windows.size}
        result = {
            "format": "jpq-study/1",
            "model": {"name": self.loaded.name, "sha256": self.loaded.sha256},
            "effort": self.settings.effort,
            "tokens": tokens,
            "text": self.content.name if self.content else "held-out calibration text",
            "retention": RETENTION[rows[0]["retention_by"]],
            "score": BALANCE,
            "recommended": recommend(rows),
            "cells": rows,
        }
        write_atomic(self.settings.out / "study.json", json.dumps(result, indent=1) + "\n")
        write_atomic(self.settings.out / "study.html", page(result))
        return result

    def cell_named(self, name: str) -> Cell:
        """One of the grid's; UsageError otherwise."""
        for cell in self.cells:
            if cell.name == name:
                return cell
        raise UsageError(f"--cell {name!r}: not in this study; expected one of {', '.join(c.name for c in self.cells)}")


def _read(path: Path) -> Row:
    """A cell's file; empty when there is none, or when it is no cell."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
