"""Small SVG pieces: an element with escaped content, and an axis."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup, escape


def element(name: str, *children: str | Markup, **attributes: object) -> Markup:
    """`<name attributes>children</name>`, everything escaped; `class_` is class, `stroke_width` is stroke-width."""
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    text = "".join(f' {key}="{escape(_short(value))}"' for key, value in pairs)
    inside = "".join(str(escape(child)) for child in children)
    return Markup(f"<{name}{text}>{inside}</{name}>")


def _short(value: object) -> object:
    """Coordinates to a tenth of a pixel: the page stays small."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


def svg(width: float, height: float, *children: Markup, label: str) -> Markup:
    """A picture that shrinks with the page; `label` is what a screen reader says."""
    return element(
        "svg",
        *children,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        role="img",
        aria_label=label,
        style=f"max-width:{width:.0f}px",
    )


def text(x: float, y: float, content: str, class_: str = "tick", **attributes: object) -> Markup:
    """A line of text."""
    return element("text", content, x=x, y=y, class_=class_, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps [low, high] to pixels [start, end], linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Pixel of a value; values outside stay on the edge."""
        low, high, value = (self._scale(v) for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def _scale(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value

    def ticks(self, count: int = 6) -> list[float]:
        """Round values inside; whole decades on a log axis, with 2 and 5 when there are few."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if len(decades) <= 3 else (1,)
            found = [m * 10.0**d for d in decades for m in steps]
            return [v for v in found if self.low * 0.999 <= v <= self.high * 1.001]
        step = nice_step((self.high - self.low) / max(count, 1))
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def nice_step(rough: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    if rough <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)


def decades(values: list[float]) -> tuple[float, float]:
    """The whole decades around positive values; (1e-9, 1) without any."""
    positive = [v for v in values if v > 0]
    if not positive:
        return 1e-9, 1.0
    low = 10.0 ** math.floor(math.log10(min(positive)))
    high = 10.0 ** math.ceil(math.log10(max(positive)))
    return low, high if high > low else low * 10
