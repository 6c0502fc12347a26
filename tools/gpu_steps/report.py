"""The results as JSON for programs and Markdown for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MARKS = {"passed": "passed", "failed": "**FAILED**", "not run": "not run"}


def write(folder: Path, record: dict[str, Any]) -> None:
    """gpu_check.json and gpu_check.md; each replaced as a whole, so that a reader never sees half of one."""
    for name, text in (("gpu_check.json", json.dumps(record, indent=1) + "\n"), ("gpu_check.md", markdown(record))):
        scratch = folder / f".{name}"
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(folder / name)


def markdown(record: dict[str, Any]) -> str:
    """The page: what ran where, a line a step, then each step's facts and table."""
    machine = record["machine"]
    lines = [f"# GPU check: {machine.get('gpu', 'unknown GPU')}", ""]
    if record["rehearsal"]:
        lines += [
            "**A rehearsal on a CPU: interpreter and host shim. Nothing here ran on a GPU, no time means anything.**",
            "",
        ]
    lines += [f"Command: `{record['command']}`", ""]
    lines += table([{"": name, "value": shown(value)} for name, value in machine.items()])
    lines += ["", "| step | result | seconds | reason |", "|---|---|---|---|"]
    for name, step in record["steps"].items():
        lines.append(f"| {name} | {MARKS[step['status']]} | {step['seconds']:.0f} | {cell(step['reason'])} |")
    for name, step in record["steps"].items():
        if name != "environment" and (step["facts"] or step["rows"]):
            lines += ["", f"## {name}", "", *(f"- {key}: {shown(value)}" for key, value in step["facts"].items())]
            lines += ["", *table(step["rows"])] if step["rows"] else []
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table; columns in order of the first row."""
    if not rows:
        return []
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(cell(shown(row.get(head, ""))) for head in heads) + " |" for row in rows]


def shown(value: Any) -> str:
    """Three digits of a number, all of a large one; anything else as it is."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def cell(text: str) -> str:
    """Text that cannot break a table."""
    return text.replace("|", "\\|").replace("\n", " ")
