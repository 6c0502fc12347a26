"""An encoder's bench for people: a table in the terminal and a page with bars."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from jpq_export.bench.encoder_baselines import FP32
from jpq_export.bench.encoders import EncoderBench
from jpq_export.bench.report import bars, frame
from jpq_export.parity.pictures import size
from jpq_export.parity.svg import element


def show_encoder_bench(result: EncoderBench) -> None:
    """The table; ratios are to fp32 when it was measured."""
    settings, base = result.settings, result.baselines.get(FP32)
    title = f"{settings.threads} thread(s), {result.processor}; texts of {result.mean_tokens:.0f} tokens on average"
    table = Table(title=title)
    table.add_column("runtime", no_wrap=True)
    batches = f"{settings.batch} texts, /s"
    for title in ("model", "1 text, /s", batches, "p50, p99 ms", "memory"):
        table.add_column(title, justify="right")
    table.add_column("Spearman", justify="right", no_wrap=True)
    for name, speed in result.speeds.items():
        single, batch = (
            f"{mine:.0f}" + (f" ({mine / theirs:.2f}x)" if base else "")
            for mine, theirs in (
                (speed.single_per_s, base.single_per_s if base else 1),
                (speed.batch_per_s, base.batch_per_s if base else 1),
            )
        )
        latency = f"{speed.latency_p50_ms:.2f}, {speed.latency_p99_ms:.2f}"
        rank = "–" if speed.spearman is None else f"{speed.spearman:.4f}"
        table.add_row(name, size(speed.file_bytes), single, batch, latency, size(speed.peak_rss_bytes), rank)
    console = Console()
    console.print(table)
    console.print("/s: embeddings a second; p50, p99: milliseconds of one text", highlight=False)
    for name, speed in result.speeds.items():
        for meter, joules in (speed.joules_per_text or {}).items():
            console.print(f"{name}: {joules:.3g} J a text ({meter})", highlight=False)
    if result.energy_reason:
        console.print(f"energy: {result.energy_reason}", highlight=False)


def encoder_page(results: Sequence[EncoderBench], title: str) -> str:
    """An HTML page without anything from outside."""
    return frame(results[0].processor, title, [_section(result) for result in results])


def _section(result: EncoderBench) -> Markup:
    settings, speeds, others = result.settings, result.speeds, set(result.baselines)
    why = (
        f"{settings.threads} thread(s) on {result.processor}; medians of {settings.rounds} rounds, taken in turns; "
        f"texts of {result.mean_tokens:.0f} tokens on average. The graphs compared with are the original model's."
    )
    parts = [
        element("p", why, class_="why"),
        bars("Embeddings per second, one text at a time", _of(speeds, "single_per_s"), others, "{:.0f}".format),
        bars(f"In batches of {settings.batch}", _of(speeds, "batch_per_s"), others, "{:.0f}".format),
        bars("Latency of one text, 99th percentile, ms", _of(speeds, "latency_p99_ms"), others, "{:.2f}".format),
        bars("Peak memory of the process", _of(speeds, "peak_rss_bytes"), others, size),
        bars("Model on disk", _of(speeds, "file_bytes"), others, size),
    ]
    ranks = {name: speed.spearman for name, speed in speeds.items() if speed.spearman is not None}
    if ranks and settings.pairs:
        title = f"Spearman's correlation with the scores of {settings.pairs.name}"
        parts.append(bars(title, ranks, others, "{:.4f}".format))
    return Markup().join(parts)


def _of(speeds: dict, field: str) -> dict[str, float]:
    return {name: float(getattr(speed, field)) for name, speed in speeds.items()}
