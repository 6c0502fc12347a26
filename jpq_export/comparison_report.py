"""The comparison for people: a Markdown table, and a page with size against quality."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from jpq_export.parity.svg import Axis, element, svg, text

Row = dict[str, Any]
WIDTH_95 = 1.96  # standard errors
WIDTH, HEIGHT, LEFT, RIGHT = 760, 380, 64, 190
COLOURS = ("#2f6fbd", "#c9701c", "#1d7f4e", "#8e44ad", "#c0332b", "#5d6878", "#b8860b", "#17808a", "#a0527a")
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


def texts_of(rows: list[Row]) -> list[str]:
    """Names of the evaluation texts, from any row that ran."""
    return next((list(row["texts"]) for row in rows if "texts" in row), [])


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
    parts = [element("h2", name) + _picture(rows, name) for name in texts_of(rows)]
    parts.append(element("h2", "All numbers") + _table(rows))
    parts += [element("p", line, class_="why") for line in made_by(rows)]
    title = f"{model}: quality at equal bytes"
    return PAGE.format(title=Markup.escape(title), body=Markup("").join(parts))


def _picture(rows: list[Row], name: str) -> Markup:
    """KL on a log axis against stored bits, a line a method."""
    good = [row for row in rows if "texts" in row]
    kls = [row["texts"][name]["kl_mean"] for row in good]
    bits = [row["bits_per_weight"] for row in good]
    x = Axis(min(bits) - 0.1, max(bits) + 0.1, LEFT, WIDTH - RIGHT)
    y = Axis(min(kls) * 0.8, max(kls) * 1.25, HEIGHT - 40, 14, log=True)
    parts = [text(x.at(v), HEIGHT - 20, f"{v:g} bits", text_anchor="middle") for v in x.ticks(5)]
    for v in y.ticks():
        parts.append(text(LEFT - 8, y.at(v) + 4, f"{v:g}", text_anchor="end"))
        parts.append(element("path", d=f"M{LEFT} {y.at(v):.1f}H{WIDTH - RIGHT}", stroke="#8884"))
    ends: list[float] = []
    methods = sorted({row["method"] for row in good}, key=[row["method"] for row in good].index)
    for method, colour in zip(methods, COLOURS * 9, strict=False):
        points = sorted(
            (x.at(row["bits_per_weight"]), y.at(row["texts"][name]["kl_mean"]))
            for row in good
            if row["method"] == method
        )
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        parts.append(element("path", d=path, stroke=colour, fill="none", stroke_width=2))
        parts += [element("circle", cx=a, cy=b, r=3.5, fill=colour) for a, b in points]
        height = points[-1][1] + 4
        while any(abs(height - other) < 16 for other in ends):
            height -= 16  # labels of lines that end close together stand above each other
        ends.append(height)
        parts.append(text(WIDTH - RIGHT + 12, height, method, fill=colour))
    return svg(WIDTH, HEIGHT, *parts, label=f"KL against bits per weight on {name}")


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
