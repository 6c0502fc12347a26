"""The picture of every layer: bits of each weight as a coloured cell, kept KV heads, FFN channels, bytes."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from jpq_export.parity.pictures import WIDTH, Raw, number, size
from jpq_export.parity.svg import element, svg, text

COLUMNS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
CELL, GAP, LEFT = 64, 3, 62


def widths(plan: Raw, *, words: Mapping[str, str]) -> Markup:
    """Every weight as a cell coloured by its bits; kept KV heads, FFN width and bytes of the layer beside it.

    `words["cost"]` says what a choice costs.
    """
    by_name = {choice["name"]: {**choice, "cost": words["cost"]} for choice in plan["choices"]}
    gated = any(name.endswith(".mlp.gate") for name in by_name)  # without a gate nothing was removed there
    layers = plan["layers"]
    row = 20 if len(layers) <= 48 else 15
    total = {layer["index"]: _layer_bytes(by_name, layer["index"]) for layer in layers}
    most = max(total.values(), default=0) or 1
    parts, y = [*_column_titles(gated=gated)], 34.0
    if "embed" in by_name:
        told = "embedding" if "head" in by_name else words["embed"]
        parts.append(_wide(by_name["embed"], "embed", told, y, row))
        y += row + 6
    if "positions" in by_name:
        parts.append(_wide(by_name["positions"], "places", "positions", y, row))
        y += row + 6
    for layer in layers:
        parts.append(_layer_row(by_name, layer, y, row, total[layer["index"]], most, gated=gated))
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


def _columns(*, gated: bool) -> list[tuple[float, str]]:
    """(left edge, weight) of every column."""
    return [(_column_x(i), name) for i, name in enumerate(COLUMNS) if gated or name != "mlp.gate"]


def _column_titles(*, gated: bool) -> list[Markup]:
    titles = [text(x + CELL / 2, 24, name.split(".")[1], text_anchor="middle") for x, name in _columns(gated=gated)]
    titles += [text(LEFT, 10, "attention", "axis"), text(_column_x(4), 10, "MLP", "axis")]
    titles += [text(HEADS_X, 10, "KV heads", "axis"), text(FFN_X, 10, "FFN channels", "axis")]
    return [*titles, text(BYTES_X, 10, "bytes", "axis"), text(HEADS_X, 24, "kept"), text(FFN_X, 24, "kept of all")]


def hatch() -> Markup:
    """The pattern of removed things, `url(#removed)`, once a page."""
    stroke = element("path", d="M0 6L6 0", class_="hatch")
    return element("defs", element("pattern", stroke, id="removed", width=6, height=6, patternUnits="userSpaceOnUse"))


def _layer_row(
    by_name: Mapping[str, Raw], layer: Raw, y: float, row: int, own: int, most: int, *, gated: bool
) -> Markup:
    index, parts = layer["index"], []
    parts.append(text(LEFT - 10, y + row / 2 + 3.5, str(index), text_anchor="end"))
    for x, part in _columns(gated=gated):
        name = f"layers.{index}.{part}"
        parts.append(_cell(by_name.get(name), name, x, y, CELL, row - 2))
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
    cost = choice["cost"].format(number(choice.get("predicted_kl")))
    head = f"{choice['name']}: {choice['bits']} bits, groups of {choice['group_size']}, {kind}, {shape}"
    return f"{head}, {size(choice['bytes'])}, predicted {cost}. {choice.get('reason', '')}"


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
