"""`jpq-export compare`: joint search against separate ones at equal stored bytes, one table.

Rows: uniform-bit GPTQ; pruning first, then one width for what is left; bits-only search; the joint search. All see the
same calibration tokens; the searched ones get the same recovery. The teacher is the permuted model (see `permute`).
Every cell is a JSON file: a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jpq_export.evaluate.text_quality import evaluate_text
from jpq_export.evaluate.texts import read_text, token_windows
from jpq_export.pipeline import Export, Request
from jpq_export.progress import Stages
from jpq_export.workspace import write_atomic

METHODS = ("gptq-uniform", "prune-then-quantize", "bits-only", "joint")


@dataclass(frozen=True, slots=True)
class Comparison:
    """What to compare: budgets in bits per weight of the whole file, evaluation texts, windows of `context` tokens."""

    request: Request
    bits: tuple[float, ...]
    texts: tuple[Path, ...]
    windows: int
    context: int


class PermutedExport(Export):
    """An export whose teacher is the permuted model."""

    def load(self) -> Any:
        """The permuted teacher, with a name of its own in every cache."""
        from jpq_export.compress.permute import permuted

        loaded = super().load()
        return replace(loaded, model=permuted(loaded.model, seed=self.request.seed), sha256=f"permuted-{loaded.sha256}")


def compare(comparison: Comparison, stages: Stages) -> list[dict[str, Any]]:
    """All cells, computed or found; also written to `<out>/comparison.json`."""
    out = comparison.request.out
    out.mkdir(parents=True, exist_ok=True)
    loaded = PermutedExport(comparison.request, stages).load()
    rows = []
    for bits in comparison.bits:
        for method in METHODS:
            cell = out / f"{method}-{bits:g}.json"
            if not cell.is_file():
                stages.console.rule(f"{method}, {bits:g} bits")
                write_atomic(cell, json.dumps(_cell(comparison, loaded, method, bits, stages), indent=1))
            rows.append(json.loads(cell.read_text(encoding="utf-8")))
    write_atomic(out / "comparison.json", json.dumps(rows, indent=1) + "\n")
    return rows


def request_for(comparison: Comparison, method: str, bits: float) -> Request:
    """The export request of one cell."""
    request = comparison.request
    folder = request.out / f"{method}-{bits:g}"
    request = replace(
        request, out=folder, budget=replace(request.budget, kind="bits", value=bits), until="compress", force=True
    )
    if method == "gptq-uniform":
        return replace(request, method="gptq")
    if method == "bits-only":
        return replace(request, prune=False)
    if method == "prune-then-quantize":
        return replace(request, widths=(int(bits) + 1,))  # the next wider uniform width, made room for by pruning
    return request


def _cell(comparison: Comparison, loaded: Any, method: str, bits: float, stages: Stages) -> dict[str, Any]:
    from jpq_export.compress.student import dequantized
    from jpq_export.format.compressed import CompressedModel

    request = request_for(comparison, method, bits)
    export = PermutedExport(request, stages)
    export.run()
    compressed = CompressedModel.load(request.out / "compressed.safetensors")
    row: dict[str, Any] = {
        "method": method,
        "asked_bits": bits,
        "bits_per_weight": compressed.weight_bytes * 8 / loaded.spec.parameters(),
        "weight_bytes": compressed.weight_bytes,
        "seconds": sum(record.seconds for record in stages.records),
        "staircase": export.staircase,
        "texts": {},
    }
    stages.records.clear()
    student = dequantized(compressed)
    for path in comparison.texts:
        sequences = _windows(comparison, loaded, path)
        with stages.stage("evaluate", f"{path.name}: {comparison.windows} windows") as report:
            row["texts"][path.name] = asdict(evaluate_text(student, loaded.model, sequences, progress=report))
    return row


def _windows(comparison: Comparison, loaded: Any, path: Path) -> np.ndarray:
    bos_id = loaded.spec.bos_id if loaded.spec.add_bos else None
    return token_windows(
        read_text(path), loaded.encode, windows=comparison.windows, context=comparison.context, bos_id=bos_id
    )


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown, best of each budget in bold."""
    texts = list(rows[0]["texts"])
    head = ["bits asked", "method", "bits stored"]
    for text in texts:
        head += [f"{text} perplexity", "KL", "top-1"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [f"{row['asked_bits']:g}", row["method"], f"{row['bits_per_weight']:.3f}"]
        for text in texts:
            rivals = [r["texts"][text]["kl_mean"] for r in rows if r["asked_bits"] == row["asked_bits"]]
            quality = row["texts"][text]
            mark = "**" if quality["kl_mean"] == min(rivals) else ""
            cells += [
                f"{mark}{quality['perplexity']:.2f}{mark}",
                f"{mark}{quality['kl_mean']:.4f}{mark}",
                f"{quality['top1_agreement']:.1%}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
