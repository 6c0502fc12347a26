"""Size against quality as a picture: in the page of a comparison, and as a file for a README."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from jpq_export.parity.svg import Axis, element, svg, text

Row = dict[str, Any]
WIDTH, HEIGHT, LEFT, RIGHT = 760, 380, 64, 190
TITLE = 30  # above each part of a file
COLOURS = ("#2f6fbd", "#c9701c", "#1d7f4e", "#8e44ad", "#c0332b", "#5d6878", "#b8860b", "#17808a", "#a0527a")
FILE_STYLE = "text { font: 12px system-ui, sans-serif; fill: #333; } .title { font-size: 15px; font-weight: 600; }"


def texts_of(rows: list[Row]) -> list[str]:
    """Names of the evaluation texts, from any row that ran."""
    return next((list(row["texts"]) for row in rows if "texts" in row), [])


def picture(rows: list[Row], name: str) -> Markup:
    """KL on text `name`, on a log axis, against stored bits, a line a method."""
    return svg(WIDTH, HEIGHT, *_plot(rows, name), label=_label(name))


def picture_file(rows: list[Row], model: str) -> str:
    """An SVG file: the same for every text, one below the other."""
    parts = [element("style", Markup(FILE_STYLE)), element("rect", width=WIDTH, height="100%", fill="#fff")]
    names = texts_of(rows)
    for i, name in enumerate(names):
        title = text(LEFT, 20, f"{model}: KL to the original, nats a token, {name}", "title")
        plot = element("g", *_plot(rows, name), transform=f"translate(0 {TITLE})")
        parts.append(element("g", title, plot, transform=f"translate(0 {i * (HEIGHT + TITLE)})"))
    height = len(names) * (HEIGHT + TITLE)
    size = {"width": WIDTH, "height": height, "viewBox": f"0 0 {WIDTH} {height}"}
    label = "; ".join(map(_label, names))
    return element("svg", *parts, xmlns="http://www.w3.org/2000/svg", role="img", aria_label=label, **size) + "\n"


def _label(name: str) -> str:
    return f"KL against bits per weight on {name}"


def _plot(rows: list[Row], name: str) -> list[Markup]:
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
        parts.append(text(WIDTH - RIGHT + 12, height, method, style=f"fill:{colour}"))
    return parts
