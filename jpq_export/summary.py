"""What the user sees at the end: one short table, and what to do next."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jpq_export.format.plan import Plan
from jpq_export.format.target import Target
from jpq_export.format.wording import Wording
from jpq_export.parity.pictures import size


def show_summary(result: dict[str, Any]) -> None:
    """The table of an export, or of a run that stopped early."""
    console, out = Console(), Path(result["out"])
    if "manifest" not in result:
        _show_plan(console, result["plan"], out, result["wording"], result.get("activations"))
        return
    manifest, parity = result["manifest"], result["parity"]
    quality = manifest.quality
    table = Table(title=f"{escape(manifest.model['name'])} for {manifest.target['name']}", show_header=False)
    before, after = manifest.original_bytes, manifest.weight_bytes
    table.add_row("size", f"{size(before)} (fp16) -> {size(after)}, {before / after:.1f}x smaller")
    table.add_row("bits per weight", f"{manifest.bits_per_weight:.3f}, embedding and head included")
    if manifest.kind == "encoder":
        _show_encoder(console, table, result, out)
        return
    table.add_row(
        "KL to the teacher", f"{quality['kl_mean']:.4f} nats a token, top-1 agreement {quality['top1_agreement']:.1%}"
    )
    table.add_row("perplexity", f"{quality['teacher_perplexity']:.2f} -> {quality['perplexity']:.2f} on held-out text")
    if manifest.kv_cache:
        table.add_row("KV cache", kv_cache_line(manifest.kv_cache))
    if manifest.activations:
        table.add_row("activations", activations_line(manifest.activations))
    verdict = "[green]passed[/green]" if parity.passed else "[red]FAILED[/red]"
    table.add_row("parity", f"{verdict}, PyTorch against {', '.join(r.name for r in parity.runtimes)}")
    if parity.as_run is not None:
        price, greedy = parity.as_run.logits.kl_mean, parity.as_run.greedy
        table.add_row(
            "8-bit activations",
            f"{price:.4f} nats, {greedy.equal} of {greedy.steps} tokens: onnxruntime by its defaults",
        )
    if manifest.fallback:
        lacks = "; ".join(manifest.fallback["lacks"])
        table.add_row("fallback", escape(f"torch.onnx.export wrote the graph: {lacks}"))
    if manifest.engine:
        table.add_row("engine", escape(_engine(manifest.engine)))
    table.add_row("report", escape(str(out / "parity.html")))
    console.print(table)
    if not parity.passed and parity.first_diverging:
        console.print(f"first diverging: {parity.first_diverging}")
    shown = escape(shlex.quote(str(out)))
    console.print(
        f'next: jpq-export run {shown} "Once upon a time"   |   on the device: jpq-export verify {shown}',
        soft_wrap=True,
    )


def activations_line(found: dict[str, Any]) -> str:
    """What rounding activations costs."""
    without = found["without"]
    return (
        f"{found['bits']:g} bits a token: KL {found['kl_mean']:.4f} nats, perplexity {found['perplexity']:.2f} "
        f"(not rounded: {without['kl_mean']:.4f}, {without['perplexity']:.2f})"
    )


def kv_cache_line(cache: dict[str, Any]) -> str:
    """Kind, memory and price of the cache."""
    told = f"{cache['type']}, {cache['bytes_per_token']:,} bytes a token"
    if "kl_to_float" not in cache:
        return told
    without = cache["without"]["kl_mean"]
    return (
        f"{told} instead of {cache['float_bytes_per_token']:,}; costs {cache['kl_to_float']:.5f} nats (KL to the same "
        f"model with a float cache, whose KL to the teacher is {without:.4f})"
    )


def _show_encoder(console: Console, table: Table, result: dict[str, Any], out: Path) -> None:
    """What differs for a sentence encoder."""
    quality, parity = result["manifest"].quality, result["parity"]
    told = f"{quality['distance_mean']:.5f} (1 - cosine), 99th percentile {quality['distance_p99']:.5f}"
    table.add_row("distance to the teacher", f"{told}, {quality['texts']} held-out texts")
    verdict = "[green]passed[/green]" if parity.passed else "[red]FAILED[/red]"
    table.add_row("parity", f"{verdict}, PyTorch against {', '.join(r.name for r in parity.runtimes)}")
    table.add_row("report", escape(str(out / "parity.html")))
    console.print(table)
    if not parity.passed and parity.first_diverging:
        console.print(f"first diverging: {parity.first_diverging}")
    shown = escape(shlex.quote(str(out)))
    console.print(
        f'next: jpq-export run {shown} "A text" "Another"   |   jpq-export eval {shown} --pairs pairs.csv   |   '
        f"on the device: jpq-export verify {shown}",
        soft_wrap=True,
    )


def _engine(engine: dict[str, Any]) -> str:
    if engine["file"] is None:
        return f"none: {engine['reason']}"
    return f"{engine['file']}, {size(engine['bytes'])}, TensorRT-RTX {engine['version']}: built, not run"


def _show_plan(
    console: Console, plan: Plan, out: Path, words: Wording, activations: dict[str, Any] | None = None
) -> None:
    budget = plan.budget
    asked = size(budget.bytes) if budget.bytes is not None else f"{budget.latency_ms:g} ms"
    table = Table(title=f"plan for {escape(plan.model_name)} on {plan.target}", show_header=False)
    table.add_row("budget", asked)
    table.add_row("stored bytes", size(plan.predicted.bytes))
    table.add_row(
        words.latency, f"{plan.predicted.latency_ms:.3f} ms a {words.item}, estimated from the target's data sheet"
    )
    widths = Counter(" and ".join(f"{bits:g}" for bits in sorted({s.bits for s in c.schemes})) for c in plan.choices)
    if plan.method == "jpq":
        gap = f"within {plan.predicted.gap:.2%} of the best possible"
        table.add_row(f"predicted {words.error}", f"{plan.predicted.kl:.4f} {words.amount} a {words.item}, {gap}")
    elif plan.method == "qpruner":
        told = f"{plan.predicted.kl:.4f} nats a token, the best of {len(plan.search['trials'])} trials"
        table.add_row("measured KL", f"{told}, before the final rounding")
    else:
        table.add_row(f"predicted {words.error}", f"not predicted: {plan.method} does not search")
    table.add_row("matrices by bits", ", ".join(f"{bits}: {widths[bits]}" for bits in sorted(widths)))
    table.add_row("removed", ", ".join(r.name for r in plan.removed) or "nothing")
    if activations:
        table.add_row("activations", activations_line(activations))
    table.add_row("written", escape(str(out)))
    console.print(table)


def show_targets(targets: Iterable[Target]) -> None:
    """One line a target."""
    table = Table()
    table.add_column("name", no_wrap=True)
    table.add_column("board", overflow="fold")
    for title in ("memory", "GB/s", "TFLOP/s", "TensorRT", "bits"):
        table.add_column(title, no_wrap=True)
    table.caption = "GB/s: memory bandwidth; TFLOP/s: fp16, dense; bits: per weight where no budget is given"
    for t in targets:
        table.add_row(
            t.name,
            t.title,
            f"{t.memory_bytes / 2**30:.0f} GiB",
            f"{t.bandwidth_gb_s:g}",
            f"{t.fp16_tflops:g}",
            t.tensorrt or "-",
            f"{t.default_bits:g}",
        )
    Console().print(table)
