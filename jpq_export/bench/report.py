"""A bench result for people: a table in the terminal and a page with bars."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container
from statistics import median

from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from jpq_export.bench.layers import LayerRate
from jpq_export.bench.rounds import BenchResult, Speed
from jpq_export.numerics.scheme import ALL_WIDTHS
from jpq_export.parity.pictures import size
from jpq_export.parity.svg import element, svg, text

WIDTH, ROW, LEFT = 720, 26, 190
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Speed on {processor}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, "Liberation Sans", Arial, sans-serif; max-width: 760px; margin: 30px auto; padding: 0 16px; }}
h1 {{ font-size: 22px; }} h2 {{ font-size: 16px; margin: 26px 0 6px; }} .why {{ opacity: .7; }}
svg text {{ font-size: 13px; fill: currentColor; }} .ours {{ fill: #2f6fbd; }} .other {{ fill: #9aa5b4; }} .value {{ font-weight: 600; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""  # noqa: E501 a page's lines


def show_bench(result: BenchResult) -> None:
    """The table; ratios are to fp32 when it was measured."""
    console, speeds = Console(), _all(result)
    base = result.baselines.get("onnxruntime-fp32")
    table = Table(title=f"{result.settings.threads} thread(s), {result.processor}")
    table.add_column("runtime", no_wrap=True)
    prefill_title = f"prefill of {result.settings.prefill}, tokens/s"
    for title in ("model", "decode tokens/s", prefill_title, "peak memory", "cache, 1,000 tokens"):
        table.add_column(title, justify="right")
    for name, speed in speeds.items():
        decode, prefill = (
            f"{mine:.1f}" + (f" ({mine / theirs:.2f}x)" if base else "")
            for mine, theirs in (
                (speed.decode_tokens_per_s, base.decode_tokens_per_s if base else 1),
                (speed.prefill_tokens_per_s, base.prefill_tokens_per_s if base else 1),
            )
        )
        cache = size(1000 * speed.cache_bytes_per_token) if speed.cache_bytes_per_token else "-"
        table.add_row(name, size(speed.file_bytes), decode, prefill, size(speed.peak_rss_bytes), cache)
    console.print(table)
    for name, speed in speeds.items():
        console.print(_latency(name, speed, result.settings.prefill), highlight=False)
    if result.energy_reason:
        console.print(f"energy: {result.energy_reason}", highlight=False)
    for bits, (count, rate) in by_bits(result).items():
        share = f", {rate / result.read_gb_s:.0%} of the read bandwidth" if result.read_gb_s else ""
        console.print(f"{bits:g} bits: {count} operators at {rate:.1f} GB/s{share}", highlight=False)


def _latency(name: str, speed: Speed, prefill: int) -> str:
    """One line: first token, then the time between tokens, energy where it is known."""
    parts = [f"first token after {speed.first_token_ms:.0f} ms ({prefill} tokens)"] if speed.first_token_ms else []
    if speed.token_p50_ms is not None:
        parts.append(f"then every {speed.token_p50_ms:.2f} ms, 1 in 100 takes {speed.token_p99_ms:.2f} ms or more")
    parts += [f"{joules:.3g} J a token ({meter})" for meter, joules in (speed.joules_per_token or {}).items()]
    return f"{name}: {'; '.join(parts)}"


def by_bits(result: BenchResult) -> dict[float, tuple[int, float]]:
    """Bits -> (operators, median GB/s)."""
    return {
        bits: (len(layers), median(layer.gb_s for layer in layers)) for bits, layers in _layers_by_bits(result).items()
    }


def _layers_by_bits(result: BenchResult) -> dict[float, list[LayerRate]]:
    """An operator with weights of several widths counts at that nearest their mean."""
    found = defaultdict(list)
    for layer in result.layers:
        found[min(ALL_WIDTHS, key=lambda bits: abs(bits - layer.bits))].append(layer)
    return dict(sorted(found.items()))


def page(results: list[BenchResult], title: str) -> str:
    """An HTML page without anything from outside."""
    return frame(results[0].processor, title, [_section(result) for result in results])


def frame(processor: str, title: str, sections: list[Markup]) -> str:
    """The page around its sections."""
    return PAGE.format(processor=Markup.escape(processor), title=Markup.escape(title), body=Markup().join(sections))


def _section(result: BenchResult) -> Markup:
    settings, others = result.settings, set(result.baselines)
    why = (
        f"{settings.threads} thread(s) on {result.processor}; medians of {settings.rounds} rounds, taken in turns; "
        f"prompts of {settings.prefill} tokens. The graphs compared with have the original model's shapes."
    )
    parts = [
        element("p", why, class_="why"),
        bars("Decoded tokens per second", _of(result, "decode_tokens_per_s"), others, "{:.1f}".format),
        bars("Tokens of the prompt per second", _of(result, "prefill_tokens_per_s"), others, "{:.0f}".format),
        *_latency_bars(result, others),
        bars("Peak memory of the process", _of(result, "peak_rss_bytes"), others, size),
    ]
    if result.layers and result.read_gb_s:
        parts.append(_layers(result))
    return Markup().join(parts)


def _all(result: BenchResult) -> dict[str, Speed]:
    return result.bundle | result.uniform | result.compared | result.baselines


def _of(result: BenchResult, field: str) -> dict[str, float]:
    return {name: float(getattr(speed, field)) for name, speed in _all(result).items()}


def _latency_bars(result: BenchResult, others: set[str]) -> list[Markup]:
    """Of the runtimes that tell it."""
    titles = {
        "first_token_ms": f"Milliseconds to the first token, prompt of {result.settings.prefill}",
        "token_p99_ms": "Milliseconds between tokens, 99th percentile",
    }
    out = []
    for field, title in titles.items():
        values = {name: getattr(speed, field) for name, speed in _all(result).items()}
        known = {name: float(value) for name, value in values.items() if value is not None}
        out += [bars(title, known, others, "{:.1f}".format)] if known else []
    return out


def bars(title: str, values: dict[str, float], others: Container[str], shown: Callable[[float], str]) -> Markup:
    """A bar for every name; `others` are drawn as not ours."""
    most, parts = max(max(values.values()), 1e-9), []
    for i, (name, value) in enumerate(values.items()):
        y, length = i * ROW + 4, (WIDTH - LEFT - 90) * max(value, 0.0) / most
        parts += [
            text(LEFT - 8, y + 14, name, text_anchor="end"),
            element(
                "rect",
                x=LEFT,
                y=y,
                width=max(length, 1),
                height=ROW - 8,
                rx=3,
                class_="other" if name in others else "ours",
            ),
            text(LEFT + length + 6, y + 14, shown(value), "value"),
        ]
    picture = svg(WIDTH, len(values) * ROW + 8, *parts, label=title)
    return element("h2", title) + picture


def _layers(result: BenchResult) -> Markup:
    """Each product's rate as a dot, by bits, against the read bandwidth."""
    height, parts = 190, []
    columns = _layers_by_bits(result)
    for i, (bits, column) in enumerate(columns.items()):
        x = LEFT + (i + 0.5) * (WIDTH - LEFT - 20) / len(columns)
        for j, layer in enumerate(column):
            y = height - 30 - (height - 50) * min(1.0, layer.gb_s / result.read_gb_s)
            dot = element("title", f"{layer.name}, {layer.bits:.3g} bits: {layer.gb_s:.1f} GB/s")
            parts.append(element("circle", dot, cx=x + (j % 9 - 4) * 6, cy=y, r=3, class_="ours"))
        parts.append(text(x, height - 8, f"{bits:g} bits", text_anchor="middle"))
    for share in (0.0, 0.5, 1.0):
        y = height - 30 - (height - 50) * share
        parts.append(text(LEFT - 8, y + 4, f"{share * result.read_gb_s:.1f} GB/s", text_anchor="end"))
    title = "Bytes per second of every product, up to the measured read bandwidth"
    return element("h2", title) + svg(WIDTH, height, *parts, label=title)
