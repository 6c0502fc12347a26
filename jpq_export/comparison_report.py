"""The comparison for people: a Markdown table, and a page with size against quality."""

from __future__ import annotations

from markupsafe import Markup

from jpq_export.comparison_picture import Row, picture, texts_of
from jpq_export.parity.svg import element

WIDTH_95 = 1.96  # standard errors
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, "Liberation Sans", Arial, sans-serif; max-width: 980px; margin: 30px auto; padding: 0 16px; }}
h1 {{ font-size: 22px; }} h2 {{ font-size: 16px; margin: 26px 0 6px; }} .why {{ opacity: .7; }}
table {{ border-collapse: collapse; }} td, th {{ padding: 3px 10px; text-align: right; border-bottom: 1px solid #8884; }}
td:nth-child(2), th:nth-child(2), .error {{ text-align: left; }} .best {{ font-weight: 700; }}
svg text {{ font-size: 12px; fill: currentColor; }}
</style>
<h1>{title}</h1>
<p class="why">Every row is a whole file at the bytes shown, embedding and head included; the same calibration tokens for
all; KL to the original model in nats a token. Lower is better; shares of right answers with 95% intervals.</p>
{body}
</html>
"""  # noqa: E501 a page's lines


def tasks_of(rows: list[Row]) -> dict[str, tuple[str, Row]]:
    """Task -> (its metric, the teacher's result), in the order asked, from any row that has them."""
    row = next((row for row in rows if "tasks" in row), None)
    teacher = row["teacher_tasks"] if row else {}
    return {name: ("acc_norm" if "acc_norm" in result else "acc", result) for name, result in teacher.items()}


def share(result: Row | None, metric: str) -> str:
    """'46.5% ± 3.1': a share with the half width of its 95% interval, where there is one; '-' where none."""
    if result is None or metric not in result:
        return "-"
    error = result.get(f"{metric}_stderr")
    return f"{result[metric]:.1%}" + ("" if error is None else f" ± {WIDTH_95 * error:.1%}"[:-1])


def task_heads(rows: list[Row]) -> list[str]:
    """Column heads with what the original reaches."""
    return [f"{name} {metric} (original {share(result, metric)})" for name, (metric, result) in tasks_of(rows).items()]


def task_cells(row: Row, rows: list[Row]) -> list[str]:
    """A row's answers in the order of `task_heads`."""
    return [share(row.get("tasks", {}).get(name), metric) for name, (metric, _) in tasks_of(rows).items()]


def made_by(rows: list[Row]) -> list[str]:
    """'commit 1234567, 2026-11-23, AMD EPYC, 2 cores: joint, gptq-uniform': who made which rows."""
    makers: dict[str, dict[str, None]] = {}
    for row in rows:
        makers.setdefault(_maker(row), {})[row["method"]] = None
        asked = row.get("tasks_made")
        if asked and _maker(asked) != _maker(row):
            makers.setdefault(_maker(asked), {})[f"tasks of {row['method']}"] = None
    return [f"{maker}: {', '.join(methods)}" for maker, methods in makers.items()]


def _maker(facts: Row) -> str:
    return f"commit {facts['commit']}, {facts['date']}, {facts['machine']}"


def is_best(row: Row, rows: list[Row], name: str) -> bool:
    """True when no other row of this budget has a lower KL on this text."""
    rivals = [r["texts"][name]["kl_mean"] for r in rows if r["asked_bits"] == row["asked_bits"] and "texts" in r]
    return row["texts"][name]["kl_mean"] == min(rivals)


def markdown(rows: list[Row]) -> str:
    """The table as Markdown, the lowest KL of each budget in bold; a row that failed says why."""
    names = texts_of(rows)
    head = ["bits asked", "method", "bits stored"]
    for name in names:
        head += [f"{name} perplexity", "KL", "top-1"]
    head += task_heads(rows)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [f"{row['asked_bits']:g}", row["method"]]
        if "error" in row:
            lines.append("| " + " | ".join([*cells, f"did not run: {row['error']}"]) + " |" * (len(head) - 2))
            continue
        cells.append(f"{row['bits_per_weight']:.3f}")
        for name in names:
            quality, mark = row["texts"][name], "**" if is_best(row, rows, name) else ""
            cells += [
                f"{mark}{quality['perplexity']:.2f}{mark}",
                f"{mark}{quality['kl_mean']:.4f}{mark}",
                f"{quality['top1_agreement']:.1%}",
            ]
        cells += task_cells(row, rows)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(rows: list[Row], model: str) -> str:
    """An HTML page without anything from outside: one picture a text, then the table."""
    parts = [element("h2", name) + picture(rows, name) for name in texts_of(rows)]
    parts.append(element("h2", "All numbers") + _table(rows))
    parts += [element("p", line, class_="why") for line in made_by(rows)]
    title = f"{model}: quality at equal bytes"
    return PAGE.format(title=Markup.escape(title), body=Markup("").join(parts))


def _table(rows: list[Row]) -> Markup:
    names = texts_of(rows)
    heads = [
        "asked",
        "method",
        "stored",
        "MB",
        *(f"{n} {what}" for n in names for what in ("perplexity", "KL", "p99", "top-1")),
        *task_heads(rows),
    ]
    body = [element("tr", *(element("th", head) for head in [*heads, "seconds", "peak GB"]))]
    for row in rows:
        cells = [element("td", f"{row['asked_bits']:g}"), element("td", row["method"])]
        if "error" in row:
            cells.append(element("td", f"did not run: {row['error']}", colspan=len(heads), class_="error"))
            body.append(element("tr", *cells))
            continue
        cells += [element("td", f"{row['bits_per_weight']:.3f}"), element("td", f"{row['weight_bytes'] / 1e6:.2f}")]
        for name in names:
            q, best = row["texts"][name], "best" if is_best(row, rows, name) else None
            cells += [
                element("td", f"{q['perplexity']:.2f}", class_=best),
                element("td", f"{q['kl_mean']:.4f}", class_=best),
                element("td", f"{q['kl_p99']:.2f}"),
                element("td", f"{q['top1_agreement']:.1%}"),
            ]
        cells += [element("td", cell) for cell in task_cells(row, rows)]
        cells += [element("td", f"{row['seconds']:.0f}"), element("td", f"{row['peak_rss_bytes'] / 1e9:.2f}")]
        body.append(element("tr", *cells))
    return element("table", *body)
