"""Pictures of the report, as SVG from plain numbers: layer errors, the size-quality front, the staircase."""

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


def layer_errors(runtime: Raw, as_run: Raw | None = None) -> Markup:
    """Relative RMS of every tap on a log axis, the bound of rounding, and `as_run`'s errors as rings."""
    rows, rough = runtime["layers"], as_run["layers"] if as_run else []
    values = [v for row in [*rows, *rough] for v in (row["rel_rms"], row["bound"]) if v]
    low, high = decades(values)
    y = Axis(low, high, 270, 16, log=True)
    step = (WIDTH - 90) / max(len(rows), 1)
    at = {row["name"]: 70 + step * (i + 0.5) for i, row in enumerate(rows)}
    parts = [_horizontal(y, 62, WIDTH - 12, _power)]
    parts += [_bound(rows, list(at.values()), step, y)]
    parts += [_ring(row, at[row["name"]], y) for row in rough if row["name"] in at and row["rel_rms"]]
    parts += [_error_dot(row, at[row["name"]], y) for row in rows]
    parts += _layer_labels(rows, list(at.values()))
    wrong = runtime.get("divergence")
    if wrong and wrong["sublayer"] in at:
        x, low_side = at[wrong["sublayer"]], at[wrong["sublayer"]] < WIDTH / 2
        parts.append(line(x, 16, x, 270, "wrong"))
        told = text(
            x + (7 if low_side else -7), 27, f"first wrong: {wrong['place']}", "note strong", **_anchor(low_side)
        )
        parts.append(told)
    return svg(WIDTH, 324, *parts, label=f"relative RMS error of every sub-layer, {runtime['name']}")


def _power(value: float) -> str:
    """1e-6 for 0.000001."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _anchor(start: bool) -> dict[str, str]:
    return {"text_anchor": "start" if start else "end"}


def _ring(row: Raw, x: float, y: Axis) -> Markup:
    title = element("title", f"{row['name']} with 8-bit activations: {row['rel_rms']:.2e}")
    return element("circle", title, cx=x, cy=y.at(row["rel_rms"]), r=3.0, class_="ring")


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
    shape = kind if kind in ("attn", "mlp") else "other"
    look = f"dot {shape}{'' if row['passed'] else ' bad'}{' exact' if error == 0 else ''}"
    if kind == "attn":
        return element("circle", title, cx=x, cy=py, r=4.0, class_=look)
    if kind == "mlp":
        return element("rect", title, x=x - 3.5, y=py - 3.5, width=7.0, height=7.0, class_=look)
    corners = f"{x:.1f},{py - 5:.1f} {x + 5:.1f},{py:.1f} {x:.1f},{py + 5:.1f} {x - 5:.1f},{py:.1f}"
    return element("polygon", title, points=corners, class_=look)


def _layer_labels(rows: Sequence[Raw], at: Sequence[float]) -> list[Markup]:
    """Layer numbers under the axis, what has a name in a line below, both thinned so that they never touch."""
    starts: dict[str, float] = {}
    for row, x in zip(rows, at, strict=True):
        parts = row["name"].split(".")
        starts.setdefault(parts[1] if parts[0] == "layers" else parts[0], x)
    numbers = [(label, x) for label, x in starts.items() if label.isdigit()]
    names = [(label, x) for label, x in starts.items() if not label.isdigit()]
    out: list[Markup] = []
    for labels, width, y in ((numbers, 26, 287), (names, 44, 300)):
        shown: list[tuple[str, float]] = []
        for label, x in labels:
            if not shown or x - shown[-1][1] >= width:
                shown.append((label, x))
        if labels and shown[-1] != labels[-1]:  # the last one is where a reader looks for how many there are
            shown[-1:] = [labels[-1]]
        out += [text(x, y, label, text_anchor="middle") for label, x in shown]
    return [*out, text(WIDTH / 2, 320, "layer, in order of execution", "axis", text_anchor="middle")]


def front(plan: Raw, *, words: Mapping[str, str]) -> Markup:
    """The size-quality (or latency-quality) front with the chosen point; `words` name what is predicted.

    Measured trials of a search that lists them by bytes are dots beside it.
    """
    by_latency = plan["budget"].get("kind") == "latency"
    key = "latency_ms" if by_latency else "bytes"
    points = sorted((p for p in plan["front"] if p.get(key)), key=lambda p: p[key])
    chosen = plan["predicted"]
    factor = 1.0 if by_latency else 1e-6
    xs, ys = [p[key] * factor for p in points], [p["predicted_kl"] for p in points]
    tried = [] if by_latency else [t for t in plan["search"].get("trials", ()) if "bytes" in t]
    low, high = decades([*ys, chosen["kl"], *(t["kl"] for t in tried)])
    left, right = (end([*xs, *(t["bytes"] * factor for t in tried)]) for end in (min, max))
    margin = (right - left) * 0.03 or 1.0
    x, y = Axis(left - margin, right + margin, 62, WIDTH - 16), Axis(low, high, 300, 14, log=True)
    parts = [_horizontal(y, 62, WIDTH - 16, lambda v: f"{v:g}")]
    for value in x.ticks(10):
        parts += [
            line(x.at(value), 14, x.at(value), 300, "grid"),
            text(x.at(value), 318, f"{value:g}", text_anchor="middle"),
        ]
    parts += [_trial_dot(t, i, x.at(t["bytes"] * factor), y.at(t["kl"]), words["short"]) for i, t in enumerate(tried)]
    path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in zip(xs, ys, strict=True))
    parts.append(element("polyline", points=path, class_="front"))
    parts += [_front_dot(p, x.at(a), y.at(b), words["short"]) for p, a, b in zip(points, xs, ys, strict=True)]
    parts += _budget_line(plan["budget"].get(key), factor, x, by_latency)
    if chosen.get(key):
        parts += _chosen(chosen, x.at(chosen[key] * factor), y.at(chosen["kl"]), words["short"], by_latency=by_latency)
    unit = f"{words['time']}, milliseconds" if by_latency else "weights as stored, megabytes"
    long = f"{words['short']} as measured in each trial, nats a token" if tried else words["long"]
    parts.append(text(WIDTH / 2, 338, f"{unit} (vertical: {long})", "axis", text_anchor="middle"))
    return svg(WIDTH, 344, *parts, label=f"front of {unit} against predicted {words['short']}")


def _front_dot(point: Raw, x: float, y: float, measure: str) -> Markup:
    latency = f", {point['latency_ms']:.2f} ms" if point.get("latency_ms") else ""
    told = f"{size(point['bytes'])}, {point['bits_per_weight']:.2f} bits a weight{latency}: "
    told += f"{measure} {number(point['predicted_kl'])}"
    return element("circle", element("title", told), cx=x, cy=y, r=2.6, class_="point")


def _trial_dot(trial: Raw, index: int, x: float, y: float, measure: str) -> Markup:
    bits = " ".join(f"{bits:g}" for bits in trial["bits"])
    told = f"trial {index + 1}, {size(trial['bytes'])}: {measure} {number(trial['kl'])}; bits by layer {bits}"
    return element("circle", element("title", told), cx=x, cy=y, r=4.0, class_="trial")


def _budget_line(budget: float | None, factor: float, x: Axis, by_latency: bool) -> list[Markup]:
    if not budget or not x.low <= budget * factor <= x.high:
        return []
    told = f"budget {budget:.2f} ms" if by_latency else f"budget {size(budget)}"
    at = x.at(budget * factor)
    right = at <= WIDTH - 160
    return [
        line(at, 14, at, 300, "budget"),
        text(at + (6 if right else -6), 26, told, "note", **_anchor(right)),
    ]


def _chosen(chosen: Raw, x: float, y: float, measure: str, *, by_latency: bool) -> list[Markup]:
    latency = f"{chosen['latency_ms']:.2f} ms, " if by_latency else ""
    told = f"chosen: {latency}{size(chosen['bytes'])}, {measure} {number(chosen['kl'])}"
    mark = element("circle", element("title", told), cx=x, cy=y, r=7.0, class_="chosen")
    right = x <= WIDTH - 260
    return [mark, text(x + (14 if right else -14), y - 10, told, "note strong", **_anchor(right))]


def staircase(steps: Sequence[Raw], measure: str) -> Markup:
    """Held-out `measure` after every stage as bars; a stage that was tried and left out is hatched."""
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
    return svg(WIDTH, 14 + 27 * len(steps), *parts, label=f"held-out {measure} after every stage")
