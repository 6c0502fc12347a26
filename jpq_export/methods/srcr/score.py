"""What a cell is worth: retention, the theoretical rate, our score of both, and which cells are recommended."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
# Of the rate: a cell whose counted zeros fall shorter has not reached it. SmolLM2-135M, 25% and 4 bits: case A falls
# 0.0024 short, structural units add up to within 0.0002.
SHORT = 0.002
BALANCE = "balance = 2 Sr TCr / (Sr + TCr), the harmonic mean of both; ours, not the paper's SrCr"
RETENTION = {
    "tasks": "Sr: mean over the tasks of the score of the compressed model / the original's (arXiv 2505.07289)",
    "perplexity": "Sr by perplexity: the original's perplexity / the compressed model's, on held-out text; it stands "
    "in for the paper's task scores, which --tasks asks for",
}


def balance(retention: float, rate: float) -> float:
    """The harmonic mean: near the smaller of both, so that neither can be bought with the other alone."""
    return 2 * retention * rate / (retention + rate) if retention + rate > 0 else 0.0


def task_retention(tasks: Row, original: Row) -> float:
    """Mean over tasks of score / original score; the normalised accuracy where a task has one."""
    shares = [_score(tasks[name]) / max(_score(original[name]), 1e-9) for name in original]
    return sum(shares) / len(shares)


def _score(result: Row) -> float:
    return result["acc_norm" if "acc_norm" in result else "acc"]


def scored(row: Row) -> Row:
    """The row with `retention`, `top1_agreement`, rates by the formula, by counted zeros and as stored, `balance`s."""
    quality, sizes = row["quality"], row["sizes"]
    by_text = quality["teacher_perplexity"] / quality["perplexity"]
    by = "tasks" if "tasks" in row else "perplexity"
    retention = task_retention(row["tasks"], row["original_tasks"]) if by == "tasks" else by_text
    stored = 1 - sizes["stored_bytes"] / sizes["original_bytes"]
    return row | {
        "retention_by": by,
        "retention": retention,
        "perplexity_retention": by_text,
        "top1_agreement": quality["top1_agreement"],
        "counted_rate": 1 - (1 - sizes["zeros"]) * row["bits"] / 16,
        "stored_rate": stored,
        "balance": balance(retention, row["rate"]),
        "stored_balance": balance(retention, stored),
    }


def reaches(row: Row) -> bool:
    """True when the counted zeros give the rate: case A may lose some of them to rounding."""
    return row["counted_rate"] >= row["rate"] - SHORT


def recommend(rows: list[Row]) -> Row:
    """Names: `cell`, the best balance; `stored`, the best of stored bytes; `by_rate`, the best retention of each rate.

    Cells that miss their rate are out; of equal ones the first counts.
    """
    good = [row for row in rows if reaches(row)]
    rates = sorted({row["rate"] for row in good})
    best = {f"{rate:g}": max((r for r in good if r["rate"] == rate), key=lambda r: r["retention"]) for rate in rates}
    return {
        "cell": max(good, key=lambda row: row["balance"])["name"] if good else None,
        "stored": max(rows, key=lambda row: row["stored_balance"])["name"],
        "by_rate": {rate: row["name"] for rate, row in best.items()},
    }
