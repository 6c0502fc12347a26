"""The study for people: a heat map for each theoretical rate, the table, and what each pattern is good for."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from jpq_export.methods.srcr.score import reaches
from jpq_export.parity.svg import element, svg, text

Row = dict[str, Any]
LEFT, TOP, WIDE, HIGH = 150, 44, 108, 46
WORST, MIDDLE, BEST = (233, 138, 128), (246, 222, 146), (118, 190, 142)  # light: dark letters stand on them
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, "Liberation Sans", Arial, sans-serif; max-width: 1080px; margin: 30px auto; padding: 0 16px; }}
h1 {{ font-size: 22px; }} h2 {{ font-size: 16px; margin: 26px 0 6px; }} .why {{ opacity: .7; }}
.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-size: 13px; }}
td, th {{ padding: 3px 8px; text-align: right; border-bottom: 1px solid #8884; }}
td:first-child, th:first-child {{ text-align: left; white-space: nowrap; }} .best {{ font-weight: 700; }}
svg text {{ font-size: 12px; fill: currentColor; }} svg .in {{ fill: #111; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""  # noqa: E501 a page's lines
HEADS = (
    "cell", "TCr", "TCr, zeros counted", "zeros", "Sr", "perplexity", "original's", "KL", "top-1 agreement", "balance",
    "stored MB", "stored rate", "stored balance", "layers stored MB", "layers by TCr MB", "layers with index MB",
    "seconds", "peak GB",
)  # fmt: skip


def page(study: Row) -> str:
    """A page that needs nothing from outside."""
    rows, best = study["cells"], study["recommended"]
    parts = [element("p", line) for line in _told(study)]
    for rate in sorted({row["rate"] for row in rows}):
        here = [row for row in rows if row["rate"] == rate]
        parts += [element("h2", f"TCr {rate:.2%}: semantic retention by sparsity and bits"), heat_map(here, best)]
    parts += [element("h2", "All numbers"), element("div", _table(rows, best), class_="wide")]
    parts += [element("h2", "What a target can use"), _notes(rows)]
    title = f"{study['model']['name']}: fewer weights or fewer bits"
    return PAGE.format(title=Markup.escape(title), body=Markup("\n").join(parts))


def _told(study: Row) -> list[str]:
    best, tokens = study["recommended"], study["tokens"]
    theory = "none, for no cell's counted zeros reach its rate"
    for row in study["cells"]:
        if row["name"] == best["cell"]:
            theory = f"{row['name']}, whose file is {row['stored_rate']:.1%} smaller than fp16, not {row['rate']:.1%}"
    return [
        f"Recommended by theoretical rate: {theory}. Recommended by stored bytes: {best['stored']}.",
        f"TCr = 1 - (1 - s) q / 16 over the layers' weights. {study['retention']}. {study['score']}.",
        "Case A: SparseGPT, then GPTQ of all weights, where some zeros are lost. Case B: both in one sweep, zeros "
        f"stay. {tokens['calibration']} calibration tokens, {tokens['measured']} measured tokens of {study['text']}. "
        "Embedding and head have 8 bits everywhere and do not count in TCr; they do in the stored bytes.",
    ]


def heat_map(rows: list[Row], best: Row) -> Markup:
    """One rate: a column for each pair of bits and sparsity, a row for each pattern and case."""
    columns = sorted({(row["bits"], row["sparsity"]) for row in rows})
    lines = list(dict.fromkeys(_line(row) for row in rows))
    low, high = min(row["retention"] for row in rows), max(row["retention"] for row in rows)
    parts = []
    for x, (bits, sparsity) in enumerate(columns):
        at = LEFT + (x + 0.5) * WIDE
        parts.append(text(at, 18, f"{bits} bits", text_anchor="middle"))
        parts.append(text(at, 34, f"s = {sparsity:.4g}" if sparsity else "no zeros", text_anchor="middle"))
    for y, name in enumerate(lines):
        parts.append(text(LEFT - 10, TOP + (y + 0.5) * HIGH + 4, name, text_anchor="end"))
    for row in rows:
        x, y = columns.index((row["bits"], row["sparsity"])), lines.index(_line(row))
        share = (row["retention"] - low) / (high - low) if high > low else 1.0
        parts.append(_square(row, LEFT + x * WIDE, TOP + y * HIGH, share, best))
    width, height = LEFT + len(columns) * WIDE + 10, TOP + len(lines) * HIGH + 8
    return svg(width, height, *parts, label=f"semantic retention at a theoretical rate of {rows[0]['rate']:.2%}")


def _square(row: Row, x: float, y: float, share: float, best: Row) -> Markup:
    chosen = row["name"] in (best["cell"], *best["by_rate"].values())
    told = f"{row['name']}: Sr {row['retention']:.4f}, perplexity {row['quality']['perplexity']:.2f}"
    told += "" if reaches(row) else f"; its zeros give only {row['counted_rate']:.2%}"
    colour, frame = "#{:02x}{:02x}{:02x}".format(*shade(share)), "currentColor" if chosen else "none"
    kind = {"x": x + 2, "y": y + 2, "width": WIDE - 4, "height": HIGH - 4}
    middle = x + WIDE / 2
    return element(
        "g",
        element("title", told),
        element("rect", fill=colour, stroke=frame, stroke_width=3, rx=4, **kind),
        text(middle, y + 21, f"Sr {row['retention']:.3f}" + ("" if reaches(row) else " *"), "in", text_anchor="middle"),
        text(middle, y + 36, f"ppl {row['quality']['perplexity']:.4g}", "in", text_anchor="middle"),
    )


def shade(share: float) -> tuple[int, ...]:
    """0 is red, 0.5 yellow, 1 green."""
    start, end, at = (WORST, MIDDLE, 2 * share) if share < 0.5 else (MIDDLE, BEST, 2 * share - 1)
    return tuple(round(a + (b - a) * at) for a, b in zip(start, end, strict=True))


def _line(row: Row) -> str:
    return f"{row['pattern']}, case {row['case']}" if row["case"] else row["pattern"]


def cells_of(row: Row) -> list[str]:
    """A row as texts, in the order of HEADS."""
    sizes, quality = row["sizes"], row["quality"]
    in_layers = [f"{sizes[f'{kind}_bytes'] / 1e6:.2f}" for kind in ("layer", "theoretical", "indexed")]
    return [
        row["name"],
        f"{row['rate']:.2%}",
        f"{row['counted_rate']:.2%}" + ("" if reaches(row) else " *"),
        f"{sizes['zeros']:.1%}",
        f"{row['retention']:.4f}",
        f"{quality['perplexity']:.2f}",
        f"{quality['teacher_perplexity']:.2f}",
        f"{quality['kl_mean']:.4f}",
        f"{row['top1_agreement']:.1%}",
        f"{row['balance']:.4f}",
        f"{sizes['stored_bytes'] / 1e6:.2f}",
        f"{row['stored_rate']:.2%}",
        f"{row['stored_balance']:.4f}",
        *in_layers,
        f"{row['seconds']:.0f}",
        f"{row['peak_rss_bytes'] / 1e9:.2f}",
    ]


def _table(rows: list[Row], best: Row) -> Markup:
    body = [element("tr", *(element("th", head) for head in HEADS))]
    for row in rows:
        chosen = "best" if row["name"] in (best["cell"], best["stored"]) else None
        body.append(element("tr", *(element("td", cell) for cell in cells_of(row)), class_=chosen))
    return element("table", *body) + element("p", "* the zeros that are left do not give this rate.", class_="why")


def _notes(rows: list[Row]) -> Markup:
    notes = {row["pattern"]: row["note"] for row in rows}
    return element("ul", *(element("li", element("b", name), f": {note}.") for name, note in notes.items()))


def markdown(study: Row) -> str:
    """The numbers that matter as a Markdown table, then what is recommended and by which formula."""
    heads = (
        "cell",
        "TCr",
        "counted",
        "Sr",
        "perplexity",
        "KL",
        "balance",
        "stored MB",
        "stored rate",
        "stored balance",
    )
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in study["cells"]:
        cells = cells_of(row)
        lines.append("| " + " | ".join(cells[i] for i in (0, 1, 2, 4, 5, 7, 9, 10, 11, 12)) + " |")
    lines += ["", *(f"{line}" for line in _told(study)[:2]), "* the zeros that are left do not give this rate."]
    by_rate = (f"{float(rate):.2%}: {name}" for rate, name in study["recommended"]["by_rate"].items())
    return "\n".join([*lines, "Highest Sr at each rate: " + ", ".join(by_rate)])
