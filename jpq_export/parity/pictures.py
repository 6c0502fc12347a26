"""The four pictures of the report, as SVG from plain numbers: layer errors, bits and widths, front, staircase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from jpq_export.parity.svg import Axis, decades, element, line, svg, text

WIDTH = 1080
Raw = Mapping[str, Any]


def number(value: float | None, digits: int = 3) -> str:
    """A few digits, or a dash."""
    return "–" if value is None else f"{value:.{digits}g}"


def size(value: float | None) -> str:
    """Bytes in decimal units, as disks and downloads count them."""
    if value is None:
        return "–"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.{2 if value < 10 * factor else 1}f} {unit}"
    return f"{value:.0f} B"


def layer_errors(runtime: Raw) -> Markup:
    """Relative RMS of every tap on a log axis, and the bound of rounding."""
    rows = runtime["layers"]
    values = [v for row in rows for v in (row["rel_rms"], row["bound"]) if v]
    low, high = decades(values)
    y = Axis(low, high, 270, 16, log=True)
    step = (WIDTH - 90) / max(len(rows), 1)
    at = [70 + step * (i + 0.5) for i in range(len(rows))]
    parts = [_horizontal(y, 62, WIDTH - 12, lambda v: f"{v:.0e}".replace("e-0", "e-"))]
    parts += [_bound(rows, at, step, y)]
    for row, x in zip(rows, at, strict=True):
        parts.append(_error_dot(row, x, y))
    parts += _layer_labels(rows, at)
    return svg(WIDTH, 312, *parts, label=f"relative RMS error of every sub-layer, {runtime['name']}")


def _horizontal(y: Axis, left: float, right: float, label: Any) -> Markup:
    """Grid lines and labels of a vertical axis."""
    parts = []
    for value in y.ticks():
        parts.append(line(left, y.at(value), right, y.at(value), "grid"))
        parts.append(text(left - 6, y.at(value) + 3.5, label(value), text_anchor="end"))
    return Markup("").join(parts)


def _bound(rows: Sequence[Raw], at: Sequence[float], step: float, y: Axis) -> Markup:
    """The bound as a stepped line."""
    points = [
        f"{x + side * step / 2:.1f},{y.at(row['bound']):.1f}"
        for row, x in zip(rows, at, strict=True)
        if row["bound"]
        for side in (-1, 1)
    ]
    return element("polyline", points=" ".join(points), class_="bound") if points else Markup("")


def _error_dot(row: Raw, x: float, y: Axis) -> Markup:
    """Circle for attention, square for MLP, diamond for the rest; red beyond the bound, hollow when exact."""
    error, kind = row["rel_rms"], row["name"].rsplit(".", 1)[-1]
    told = "not finite" if error is None else "exactly equal" if error == 0 else f"{error:.2e}"
    title = element("title", f"{row['name']}: {told}" + (f", bound {row['bound']:.1e}" if row["bound"] else ""))
    py = y.at(y.high if error is None else error or y.low)
    look = f"dot {kind if kind in ('attn', 'mlp') else 'other'}{'' if row['passed'] else ' bad'}{'' if error != 0 else ' exact'}"
    if kind == "attn":
        return element("circle", title, cx=x, cy=py, r=4.0, class_=look)
    if kind == "mlp":
        return element("rect", title, x=x - 3.5, y=py - 3.5, width=7.0, height=7.0, class_=look)
    corners = f"{x:.1f},{py - 5:.1f} {x + 5:.1f},{py:.1f} {x:.1f},{py + 5:.1f} {x - 5:.1f},{py:.1f}"
    return element("polygon", title, points=corners, class_=look)


def _layer_labels(rows: Sequence[Raw], at: Sequence[float]) -> list[Markup]:
    """Layer numbers under the axis, thinned so that they never touch."""
    starts: dict[str, float] = {}
    for row, x in zip(rows, at, strict=True):
        parts = row["name"].split(".")
        starts.setdefault(parts[1] if parts[0] == "layers" else parts[0], x)
    out, last = [], -100.0
    for label, x in starts.items():
        width = 26 if label.isdigit() else 44
        if x - last >= width or not label.isdigit():
            if out and x - last < width:
                out.pop()
            out.append(text(x, 290, label, text_anchor="middle"))
            last = x
    return [*out, text(WIDTH / 2, 309, "layer, in order of execution", "axis", text_anchor="middle")]


COLUMNS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
CELL, GAP, LEFT = 64, 3, 62


def widths(plan: Raw) -> Markup:
    """Every weight as a cell coloured by its bits, kept KV heads and FFN width beside it, bytes of the layer at the end."""
    by_name = {choice["name"]: choice for choice in plan["choices"]}
    layers = plan["layers"]
    row = 20 if len(layers) <= 48 else 15
    total = {layer["index"]: _layer_bytes(by_name, layer["index"]) for layer in layers}
    most = max(total.values(), default=0) or 1
    parts, y = [*_column_titles()], 34.0
    if "embed" in by_name:
        tied = "head" not in by_name
        parts.append(
            _wide(by_name["embed"], "embed", "embedding, also the output head (tied)" if tied else "embedding", y, row)
        )
        y += row + 6
    for layer in layers:
        parts.append(_layer_row(by_name, layer, y, row, total[layer["index"]], most))
        y += row
    if "head" in by_name:
        parts.append(_wide(by_name["head"], "head", "output head", y + 6, row))
        y += row + 6
    return svg(WIDTH, y + 8, *parts, label="bits and widths of every layer")


def _layer_bytes(by_name: Mapping[str, Raw], index: int) -> int:
    return sum(by_name[name]["bytes"] for part in COLUMNS if (name := f"layers.{index}.{part}") in by_name)


def _column_x(column: int) -> float:
    """Left edge of a weight column; a wider gap between attention and MLP."""
    return LEFT + column * (CELL + GAP) + (14 if column >= 4 else 0)


HEADS_X = _column_x(7) + 16
FFN_X = HEADS_X + 130
BYTES_X = FFN_X + 170


def _column_titles() -> list[Markup]:
    titles = [
        text(_column_x(i) + CELL / 2, 24, name.split(".")[1], text_anchor="middle") for i, name in enumerate(COLUMNS)
    ]
    titles += [text(LEFT, 10, "attention", "axis"), text(_column_x(4), 10, "MLP", "axis")]
    titles += [text(HEADS_X, 10, "KV heads", "axis"), text(FFN_X, 10, "FFN channels", "axis")]
    return [*titles, text(BYTES_X, 10, "bytes", "axis"), text(HEADS_X, 24, "kept"), text(FFN_X, 24, "kept of all")]


def hatch() -> Markup:
    """The pattern of removed things, `url(#removed)`, once a page."""
    stroke = element("path", d="M0 6L6 0", class_="hatch")
    return element("defs", element("pattern", stroke, id="removed", width=6, height=6, patternUnits="userSpaceOnUse"))


def _layer_row(by_name: Mapping[str, Raw], layer: Raw, y: float, row: int, own: int, most: int) -> Markup:
    index, parts = layer["index"], []
    parts.append(text(LEFT - 10, y + row / 2 + 3.5, str(index), text_anchor="end"))
    for column, part in enumerate(COLUMNS):
        name = f"layers.{index}.{part}"
        parts.append(_cell(by_name.get(name), name, _column_x(column), y, CELL, row - 2))
    parts.append(_heads(layer, y, row))
    parts.append(_bar(layer["ffn"], layer["ffn_of"], FFN_X, y, 90, row, f"{layer['ffn']}", full=True))
    parts.append(_bar(own, most, BYTES_X, y, 80, row, size(own), full=False))
    return Markup("").join(parts)


def _cell(choice: Raw | None, name: str, x: float, y: float, width: float, height: float) -> Markup:
    """One weight: its bits as colour and number, the rest in the tooltip; hatched when removed."""
    if choice is None:
        title = element("title", f"{name}: removed")
        return element("rect", title, x=x, y=y, width=width, height=height, rx=2, class_="gone", fill="url(#removed)")
    bits = choice["bits"]
    title = element("title", describe(choice))
    box = element("rect", title, x=x, y=y, width=width, height=height, rx=2, class_=f"b{str(bits).replace('.', '_')}")
    look = f"cell t{str(bits).replace('.', '_')}"
    return box + text(x + width / 2, y + height / 2 + 3.5, str(bits), look, text_anchor="middle")


def describe(choice: Raw) -> str:
    """One line on one weight."""
    kind = "symmetric" if choice.get("symmetric") else "with zero points"
    shape = f"{choice['rows']} × {choice['columns']}"
    cost = number(choice.get("predicted_kl"))
    head = f"{choice['name']}: {choice['bits']} bits, groups of {choice['group_size']}, {kind}, {shape}"
    return f"{head}, {size(choice['bytes'])}, predicted KL {cost} nats. {choice.get('reason', '')}"


def _wide(choice: Raw, label: str, told: str, y: float, row: int) -> Markup:
    """The embedding or the head: one cell as wide as all the weights of a layer."""
    width = _column_x(6) + CELL - LEFT
    name = text(LEFT - 10, y + row / 2 + 3.5, label, text_anchor="end")
    return (
        name
        + _cell(choice, label, LEFT, y, width, row - 2)
        + text(HEADS_X, y + row / 2 + 3.5, f"{told}, {size(choice['bytes'])}")
    )


def _heads(layer: Raw, y: float, row: int) -> Markup:
    """One small square a KV head; as numbers when there are too many to draw."""
    kept, count = set(layer["kv_heads"]), layer["kv_heads_of"]
    if count > 8:
        return text(HEADS_X, y + row / 2 + 3.5, f"{len(kept)} of {count}")
    parts = []
    for head in range(count):
        title = element("title", f"KV head {head}: {'kept' if head in kept else 'removed'}")
        look = {"class_": "kept"} if head in kept else {"class_": "gone", "fill": "url(#removed)"}
        parts.append(element("rect", title, x=HEADS_X + head * 14.0, y=y + 3, width=11, height=row - 8, rx=2, **look))
    return Markup("").join(parts)


def _bar(value: float, of: float, x: float, y: float, width: float, row: int, label: str, *, full: bool) -> Markup:
    """A bar with its label; `full` draws the removed rest hatched."""
    share = value / of if of else 0.0
    parts = []
    if full and share < 1:
        rest = {"x": x + width * share, "width": width * (1 - share)}
        parts.append(element("rect", y=y + 4, height=row - 10, class_="gone", fill="url(#removed)", **rest))
    parts.append(element("rect", x=x, y=y + 4, width=width * share, height=row - 10, class_="bar"))
    return Markup("").join(parts) + text(x + width + 8, y + row / 2 + 3.5, label)


def front(plan: Raw) -> Markup:
    """The size-quality (or latency-quality) front with the chosen point."""
    by_latency = plan["budget"].get("kind") == "latency"
    key = "latency_ms" if by_latency else "bytes"
    points = sorted((p for p in plan["front"] if p.get(key)), key=lambda p: p[key])
    chosen = plan["predicted"]
    factor = 1.0 if by_latency else 1e-6
    xs, ys = [p[key] * factor for p in points], [p["predicted_kl"] for p in points]
    low, high = decades([*ys, chosen["kl"]])
    margin = (xs[-1] - xs[0]) * 0.03 or 1.0
    x, y = Axis(xs[0] - margin, xs[-1] + margin, 62, WIDTH - 16), Axis(low, high, 300, 14, log=True)
    parts = [_horizontal(y, 62, WIDTH - 16, lambda v: f"{v:g}")]
    for value in x.ticks(10):
        parts += [
            line(x.at(value), 14, x.at(value), 300, "grid"),
            text(x.at(value), 318, f"{value:g}", text_anchor="middle"),
        ]
    path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in zip(xs, ys, strict=True))
    parts.append(element("polyline", points=path, class_="front"))
    parts += [_front_dot(p, x.at(a), y.at(b)) for p, a, b in zip(points, xs, ys, strict=True)]
    parts += _budget_line(plan["budget"].get(key), factor, x, by_latency)
    if chosen.get(key):
        parts += _chosen(chosen, x.at(chosen[key] * factor), y.at(chosen["kl"]))
    unit = "predicted time of one token, milliseconds" if by_latency else "weights as stored, megabytes"
    parts.append(text(WIDTH / 2, 338, f"{unit} (vertical: predicted KL, nats a token)", "axis", text_anchor="middle"))
    return svg(WIDTH, 344, *parts, label="front of " + unit + " against predicted KL")


def _front_dot(point: Raw, x: float, y: float) -> Markup:
    latency = f", {point['latency_ms']:.2f} ms" if point.get("latency_ms") else ""
    told = f"{size(point['bytes'])}, {point['bits_per_weight']:.2f} bits a weight{latency}: KL {number(point['predicted_kl'])}"
    return element("circle", element("title", told), cx=x, cy=y, r=2.6, class_="point")


def _budget_line(budget: float | None, factor: float, x: Axis, by_latency: bool) -> list[Markup]:
    if not budget or not x.low <= budget * factor <= x.high:
        return []
    told = f"budget {budget:.2f} ms" if by_latency else f"budget {size(budget)}"
    at = x.at(budget * factor)
    anchor = "end" if at > WIDTH - 160 else "start"
    return [
        line(at, 14, at, 300, "budget"),
        text(at + (6 if anchor == "start" else -6), 26, told, "note", text_anchor=anchor),
    ]


def _chosen(chosen: Raw, x: float, y: float) -> list[Markup]:
    told = f"chosen: {size(chosen['bytes'])}, KL {number(chosen['kl'])}"
    mark = element("circle", element("title", told), cx=x, cy=y, r=7.0, class_="chosen")
    anchor, side = ("end", -14) if x > WIDTH - 220 else ("start", 14)
    return [mark, text(x + side, y - 10, told, "note strong", text_anchor=anchor)]


def staircase(steps: Sequence[Raw]) -> Markup:
    """Held-out KL after every stage as bars; a stage that was tried and left out is hatched."""
    values = [step["heldout_kl"] for step in steps if step["heldout_kl"] is not None]
    x = Axis(0.0, max(values, default=1.0) or 1.0, 190, WIDTH - 130)
    parts = []
    for row, step in enumerate(steps):
        y, value = 6 + row * 27, step["heldout_kl"] or 0.0
        look = {"class_": "bar"} if step.get("applied", True) else {"class_": "gone", "fill": "url(#removed)"}
        parts.append(text(178, y + 15, str(step["stage"]), "label", text_anchor="end"))
        parts.append(element("rect", x=190, y=y, width=max(x.at(value) - 190, 1.0), height=20, rx=2, **look))
        told = number(step["heldout_kl"]) + ("" if step.get("applied", True) else ", not kept")
        parts.append(text(x.at(value) + 8, y + 15, told, "label"))
    return svg(WIDTH, 14 + 27 * len(steps), *parts, label="held-out KL after every stage")
