"""What each ingredient of the method does to the KL: one of them left out (or added) at a time, at equal stored bytes.

    python tools/ablation.py [MODEL] --bits 2.3,2.58,3.15 --text wiki.test.raw --out docs/ablation

Rows by plan: `all` is what an export does up to the rounding; "GPTQ" stands for plain rounding of one width. All rows
round with the same tokens, those of `all` are also the whole of what it is taught from, so nothing here is a matter of
data. KL to the (permuted, see `compare`) teacher, nats a token, over windows of the text, before recovery; `recovered`
is `all` after it. Every row is a JSON file in the folder: a killed run goes on, what is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# As in the command line; before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from jpq_export.comparison_cells import PermutedExport, Remembered
from jpq_export.compress.apply import Compressor, LayerChoice, Recipe
from jpq_export.compress.cost import CostModel
from jpq_export.compress.decoder import Decoder
from jpq_export.compress.load import LoadedModel
from jpq_export.compress.plan import BudgetRequest, Problem, make_plan, uniform_plan
from jpq_export.compress.prepare import group_size_for, prepare
from jpq_export.compress.search import Knobs
from jpq_export.compress.stages import recover
from jpq_export.compress.statistics import Statistics, collect, plain_statistics
from jpq_export.compress.student import dequantized, to_compressed
from jpq_export.evaluate.text_quality import evaluate_text
from jpq_export.evaluate.texts import read_text, token_windows
from jpq_export.format.compressed import CompressedModel
from jpq_export.format.plan import Plan
from jpq_export.format.target import load_target
from jpq_export.numerics.scheme import BIT_WIDTHS
from jpq_export.progress import Stages
from jpq_export.request import Request, prepared_for
from jpq_export.revision import provenance
from jpq_export.rotate import settle_rotation
from jpq_export.workspace import write_atomic


@dataclass(frozen=True, slots=True)
class Row:
    """One way to make the model. `plan`: "search", "bits" (nothing removed), "prices" (no true KL) or "uniform"."""

    name: str
    plan: str = "search"
    plain: bool = False  # the embedding and head are rounded without Fisher information
    refit: bool = True  # to the teacher's outputs, on the inputs that will really arrive
    descent: bool = True  # after GPTQ: coordinate descent and closed-form scales
    two_sided: bool = False
    recovered: bool = False
    rotated: bool = True
    normal: bool = True  # codes stand for normal levels; else the same plan's for evenly spaced ones


ROWS = (
    Row("all"),
    Row("recovered", recovered=True),
    Row("without rotation", rotated=False),
    Row("evenly spaced levels", normal=False),
    Row("without the refit to arriving inputs", refit=False),
    Row("without descent and scale refits", descent=False),
    Row("with two-sided rounding", two_sided=True),
    Row("nothing removed", plan="bits"),
    Row("search by prices alone, without true KL", plan="prices"),
    Row("one width", plan="uniform"),
    Row("one width, GPTQ", plan="uniform", plain=True, refit=False, descent=False, rotated=False),
)


class Laboratory:
    """A teacher, its statistics and texts, and the plans of a budget."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.request = Request(
            asked.model, load_target("jetson"), asked.out, BudgetRequest("bits", 4.0), effort=asked.effort
        )
        self.stages, self.out = Stages(), asked.out
        self.export = PermutedExport(self.request, self.stages)
        self.loaded = self.export.load()
        self.texts = self.export.texts(self.loaded)
        turned = settle_rotation(self.loaded, self.texts, self.request, None, self.stages, lambda _: None)
        self.bases = {False: self.loaded, True: turned}
        self.calibration = self.texts.calibration[: self.export.effort.sequences]
        bos_id = self.loaded.spec.bos_id if self.loaded.spec.add_bos else None
        text = read_text(asked.text)
        self.windows = token_windows(
            text, self.loaded.encode, windows=asked.windows, context=asked.context, bos_id=bos_id
        )
        self.reference = Remembered(self.loaded.model)
        self.found: dict[tuple[str, bool], Statistics] = {}
        self.plans: dict[tuple[str, bool, float], Plan] = {}

    def teacher(self, row: Row) -> Decoder:
        """The model in the row's basis."""
        model = self.bases[row.rotated].model
        assert isinstance(model, Decoder)
        return model

    def statistics(self, row: Row) -> Statistics:
        """Of the row's kind; found once."""
        kind = "plain" if row.plain else "two-sided" if row.two_sided else "fisher"
        key = kind, row.rotated
        if key not in self.found:
            with self.stages.stage("statistics", f"statistics: {kind}"):
                if kind == "plain":
                    self.found[key] = plain_statistics(self.teacher(row), self.calibration)
                else:
                    self.found[key] = collect(self.teacher(row), self.calibration, seed=0, outputs=row.two_sided)
        return self.found[key]

    def plan(self, row: Row, bits: float) -> Plan:
        """The plan of a budget; made once."""
        key = row.plan, row.rotated, bits
        if key not in self.plans:
            self.plans[key] = self._plan(row.plan, self.bases[row.rotated], bits)
        return self.plans[key]

    def _plan(self, kind: str, loaded: LoadedModel, bits: float) -> Plan:
        request = replace(self.request, budget=BudgetRequest("bits", bits), prune=kind != "bits")
        export = PermutedExport(request, self.stages)
        cost = CostModel(loaded.spec, request.target, request.context)
        budget = request.budget.resolve(loaded.spec)
        if kind == "uniform":
            return uniform_plan(loaded.spec, cost, budget, sha256=loaded.sha256, method="gptq")
        if kind == "prices":
            folder = prepared_for(request, loaded, self.texts)
            options = {"seed": 0, "stages": self.stages, "narrow": ()}
            options["group_size"] = group_size_for(request.target, loaded.spec)
            options["normal"] = request.target.normal_bits
            prices = prepare(loaded.model, self.calibration, self.texts.heldout, folder, **options).prices
            problem = Problem(prices, cost, budget, BIT_WIDTHS)
            knobs = Knobs()
            return make_plan(problem, problem.solve(knobs), knobs, sha256=loaded.sha256, method="jpq", measured={})
        return export.search(loaded, self.texts, cost)[0]

    def model(self, row: Row, bits: float) -> CompressedModel:
        """Rounded, and recovered where the row says so."""
        plan, effort, teacher = self.plan(row, bits), self.export.effort, self.teacher(row)
        choices = [choice if row.normal else replace(choice, normal=False) for choice in plan.choices]
        schemes = {choice.name: choice.layout or choice.scheme for choice in choices}
        layers = tuple(LayerChoice(layer.kv_heads, layer.kept_channels) for layer in plan.layers)
        recipe = Recipe(layers, schemes, "jpq" if row.descent else "gptq", effort.passes)
        compressor = Compressor(teacher, recipe, self.statistics(row), self.calibration)
        compressor.refits = row.refit
        with self.stages.stage("compress", f"{row.name}, {bits:g} bits: rounding") as report:
            compressed = to_compressed(compressor.run(report), schemes)
        if row.recovered:
            tokens = self.texts.calibration[: effort.tune_sequences]
            with self.stages.stage("recover", f"{row.name}, {bits:g} bits: recovery") as report:
                kind = {"steps": effort.tune_steps, "seed": 0, "progress": report}
                compressed, _ = recover(teacher, compressed, tokens, self.texts.heldout, **kind)
        return compressed

    def cell(self, row: Row, bits: float) -> dict[str, Any]:
        """What the row's JSON says."""
        start = time.perf_counter()
        compressed = self.model(row, bits)
        seconds = time.perf_counter() - start
        with self.stages.stage("evaluate", f"{row.name}, {bits:g} bits: {len(self.windows)} windows") as report:
            student = Remembered(dequantized(compressed))
            quality = evaluate_text(student, self.reference, self.windows, progress=report)
        return {
            **provenance(),
            "row": row.name,
            "bits": bits,
            "bits_per_weight": compressed.weight_bytes * 8 / self.loaded.spec.parameters(),
            "kl_mean": quality.kl_mean,
            "perplexity": quality.perplexity,
            "seconds": round(seconds, 1),
        }


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: a row an ingredient, a column a budget; in brackets the KL as a multiple of that of `all`."""
    budgets = sorted({cell["bits"] for cell in cells})
    found = {(cell["row"], cell["bits"]): cell["kl_mean"] for cell in cells}
    lines = ["| | " + " | ".join(f"{bits:g} bits" for bits in budgets) + " |", "|---" * (len(budgets) + 1) + "|"]
    for name in dict.fromkeys(cell["row"] for cell in cells):
        shown = []
        for bits in budgets:
            kl, base = found.get((name, bits)), found.get(("all", bits))
            ratio = "" if not kl or not base else f" ({kl / base:.3f})"
            shown.append("-" if kl is None else f"{kl:.4f}{ratio}")
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def run(asked: argparse.Namespace, make: Callable[[argparse.Namespace], Any]) -> list[dict[str, Any]]:
    """All cells, found or made by what `make` returns."""
    asked.out.mkdir(parents=True, exist_ok=True)
    chosen = [row for row in ROWS if asked.rows is None or row.name in asked.rows]
    laboratory, cells = None, []
    for bits in asked.bits:
        for row in chosen:
            stem = row.name.translate({ord(" "): "-", ord(","): None, ord("'"): None})
            file = asked.out / f"{stem}-{bits:g}.json"
            if not file.is_file():
                laboratory = laboratory or make(asked)
                write_atomic(file, json.dumps(laboratory.cell(row, bits), indent=1) + "\n")
            cells.append(json.loads(file.read_text(encoding="utf-8")))
    return cells


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="as for jpq-export; by default the embedded one")
    parser.add_argument("--bits", type=lambda text: [float(part) for part in text.split(",")], required=True)
    parser.add_argument("--rows", type=lambda text: text.split(";"), help="only these, separated by semicolons")
    parser.add_argument("--effort", default="quick", choices=("quick", "standard", "max"))
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    names = [row.name for row in ROWS]
    if unknown := [name for name in asked.rows or () if name not in names]:
        parser.error(f"--rows {unknown[0]!r}: expected one of {'; '.join(names)}")
    torch.manual_seed(0)
    sys.stdout.write(table(run(asked, Laboratory)) + "\n")


if __name__ == "__main__":
    main()
