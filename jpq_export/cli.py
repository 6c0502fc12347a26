"""The command line: its commands."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import click

from jpq_export import __version__
from jpq_export.cli_group import Commands, given
from jpq_export.cli_options import (
    EFFORTS,
    WIDTHS_HELP,
    make_request,
    search_options,
    search_widths,
    size_bytes,
    task_options,
)
from jpq_export.cli_study import study
from jpq_export.errors import JpqError, UncoveredError, UsageError
from jpq_export.numerics.scheme import BIT_WIDTHS
from jpq_export.peers.layout import PEERS
from jpq_export.ranks import launched, rank

# Threads that wait without spinning: beside two busy processes on two cores a tuning step took 4.5 s instead of 29 s.
# Read when torch loads, so it is set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # some microseconds: a recovery step takes 2.4 s, without 2.8

COMPARED = ("gptq-uniform", "prune-then-quantize", "bits-only", "joint")
COMPARABLE = (*COMPARED, "rtn-uniform", "toga", "qpruner", "qpruner-lora", "srcr", "llm-pruner", *PEERS)
STOPS = ("plan", "compress", "onnx")
EXAMPLES = """
\b
Examples:
  jpq-export --target jetson                         the default model, 4.0 bits over the whole file
  jpq-export ./my-llama --target jetson --size 60MB --out bundle
  jpq-export gemma-3-270m --target agx-orin-64gb --bits 3
  jpq-export --target orin-nano-8gb --latency 2ms    chosen for decode latency instead of bytes
  jpq-export run bundle "The capital of France is"
  jpq-export serve bundle                            OpenAI's HTTP interface on http://127.0.0.1:8000/v1
  jpq-export verify bundle
  jpq-export build bundle                            on the board: plugin, TensorRT engine, recorded vectors
"""


@click.group(
    cls=Commands, epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)  # fmt: skip
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Log what the library does.")
def main(*, verbose: bool) -> None:
    """Compress a language model for an edge device, lower it to ONNX, and prove that every runtime computes it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ✓ shows ? instead of a traceback
    quiet = logging.WARNING if rank() == 0 else logging.ERROR  # under torchrun one process speaks
    logging.basicConfig(level=logging.INFO if verbose else quiet, format="%(name)s: %(message)s")


main.add_command(study)


@main.command(epilog=EXAMPLES)
@search_options
@click.option("--plan", type=click.Path(path_type=Path), help="Use this plan.json instead of searching.")
@click.option("--until", type=click.Choice(STOPS), help="Stop after this stage and keep what exists.")
def export(**options: Any) -> None:
    """Export MODEL (hub id, folder, .gguf file; default: SmolLM2-135M-Instruct) to a bundle folder."""
    from jpq_export.progress import Stages

    budgets = [name for name in ("size", "bits", "ratio", "latency") if options[name] is not None]
    if options["plan"] and budgets:
        raise UsageError(
            f"--{budgets[0]}: {options['plan']} already answers a budget; keep one of --plan and --{budgets[0]}"
        )
    request = make_request(options)
    from jpq_export.pipeline import Export  # with torch: a wrong option is told before

    try:
        result = Export(request, Stages()).run()
    except UncoveredError as error:  # raised by the loading, before anything was written
        if launched():
            raise UsageError(f"{error}; torch.onnx.export works in one process: start it without torchrun") from None
        from jpq_export.fallback.export import FallbackExport

        result = FallbackExport(request, Stages()).run()
    if rank():
        return
    from jpq_export.summary import show_summary

    show_summary(result)
    if "parity" in result and not result["parity"].passed:
        raise click.exceptions.Exit(1)


@main.command()
@search_options
def plan(**options: Any) -> None:
    """Search only: write plan.json and the size-quality front. A second budget of the same model takes seconds.

    An export goes further: it rounds the best plan of every kind and may keep another one than the first.
    """
    from jpq_export.pipeline import Export
    from jpq_export.progress import Stages
    from jpq_export.summary import show_summary

    result = Export(make_request(options, until="plan"), Stages()).run()
    if rank() == 0:
        show_summary(result)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def targets(*, as_json: bool) -> None:
    """List the boards this installation knows."""
    from dataclasses import asdict

    from jpq_export.format.target import list_targets
    from jpq_export.summary import show_targets

    found = list_targets()
    if as_json:
        click.echo(json.dumps([asdict(target) for target in found], indent=1))
    else:
        show_targets(found)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
def verify(bundle: Path) -> None:
    """Check a bundle's hashes, then its recorded vectors with onnxruntime; exit code 1 names what differs."""
    from jpq_export.parity.verify import verify_bundle
    from jpq_export.progress import Stages

    result = None
    try:
        with Stages().stage("verify", "hashes, then recorded vectors") as report:
            result = verify_bundle(bundle, progress=report)
            if not result.passed:  # inside, so that no tick tells of success
                count = len(result.problems)
                raise JpqError(f"{bundle}: {count} problem(s) found; copy the bundle again, or export it again")
    except JpqError:
        for problem in result.problems if result else ():
            click.echo(f"{problem.place}: {problem.message}", err=True)
        raise
    click.echo(f"{bundle}: {result.files} files and the recorded vectors are as exported")


@main.command("build")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Engine file. Default: BUNDLE/device/model.engine")
@click.option(
    "--plugin",
    metavar="library|aot|FILE",
    default="library",
    show_default=True,
    help="The bundle's library, compiled here if need be; its compiled-ahead kernels without one; or a library file.",
)
@click.option("--workspace", default="512MB", show_default=True, help="Scratch memory of TensorRT.")
@click.option("--max-prompt", type=int, default=512, show_default=True, help="Longest prompt at once, in tokens.")
@click.option("--max-tokens", type=int, default=2048, show_default=True, help="Prompt and answer together.")
@click.option("--dry-run", is_flag=True, help="Check, and say what would be done.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable on stdout.")
def build_command(bundle: Path, *, dry_run: bool, as_json: bool, workspace: str, plugin: str, **options: Any) -> None:
    """On the board: check BUNDLE and board, build plugin and TensorRT engine, run the recorded vectors."""
    from jpq_export.engine.command import build_bundle
    from jpq_export.engine.settings import FOLDER, Settings

    options["out"] = options["out"] or bundle / FOLDER / "model.engine"
    file = None if plugin in ("library", "aot") else Path(plugin)
    scratch = int(size_bytes(workspace, "--workspace"))
    settings = Settings(bundle, plugin=file, aot=plugin == "aot", workspace_bytes=scratch, **options)
    build_bundle(settings, dry_run=dry_run, as_json=as_json)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt", nargs=-1, required=True)
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0 keeps all tokens.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--stop", multiple=True, help="Text that ends the continuation and is not shown. May be repeated.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1, 256), help="Default: all cores.")
@click.option("--fast", is_flag=True, help="Round activations: to 16 bits in our kernels, to 8 in onnxruntime's own.")
@click.option("--chat", is_flag=True, help="Wrap the prompt in the model's chat template.")
@click.pass_context
def run(ctx: click.Context, bundle: Path, prompt: tuple[str, ...], *, chat: bool, **options: Any) -> None:
    """Continue PROMPT with a bundle on onnxruntime, streaming; neither torch nor transformers is loaded.

    A sentence encoder prints the embedding of PROMPT as JSON, or of two the cosine of their angle.
    """
    from jpq_export.runtime import load
    from jpq_export.runtime.encoder import cosine

    loaded = load(bundle, threads=options.pop("threads"), exact=not options.pop("fast"), check=True)
    if len(prompt) > (1 if loaded.encoder is None else 2):
        raise UsageError(f"got {len(prompt)} prompts; put one into quotes (two only for a sentence encoder)")
    if loaded.encoder is not None:
        for option in given(ctx, but=("bundle", "prompt", "threads", "fast")):
            raise UsageError(f"{option}: {bundle} is a sentence encoder, which writes no text; leave the option out")
        vectors = loaded.embed(list(prompt))
        click.echo(json.dumps(vectors[0].tolist()) if len(prompt) == 1 else f"{cosine(*vectors):.6f}")
        return
    for piece in (loaded.chat if chat else loaded.generate)(prompt[0], stream=True, **options):
        click.echo(piece, nl=False)  # flushes
    click.echo()


@main.command("serve")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Another address requires an API key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--name", help="Model name that clients give. Default: the exported model's.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="File of the key. Default: JPQ_API_KEY, or none.")
@click.option("--slots", type=click.IntRange(1, 256), default=8, show_default=True, help="Sequences in one pass.")
@click.option("--queue", type=click.IntRange(0), default=64, show_default=True, help="How many others may wait.")
@click.option(
    "--max-tokens", type=click.IntRange(1), default=2048, show_default=True, help="Prompt and answer together."
)
@click.option("--threads", type=click.IntRange(1, 256), help="Default: all cores.")
@click.option("--fast", is_flag=True, help="Round activations: to 16 bits in our kernels, to 8 in onnxruntime's own.")
@click.pass_context
def serve_command(ctx: click.Context, *, fast: bool, **options: Any) -> None:
    """Serve BUNDLE to OpenAI clients: completions, chats (streamed too), embeddings. Needs `jpq-export[serve]`."""
    from jpq_export.serve.command import Settings, serve

    verbose = bool(ctx.parent and ctx.parent.params["verbose"])
    serve(Settings(**options, exact=not fast, verbose=verbose), lambda line: click.echo(line))


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
def report(bundle: Path) -> None:
    """Write parity.html of a bundle anew from its JSON files."""
    from jpq_export.parity.report import write_report

    click.echo(write_report(bundle))


@main.command("eval")
@click.argument("model", required=False)
@click.option("--text", type=click.Path(path_type=Path), help="UTF-8 text, .raw, or .jsonl with key text.")
@click.option("--pairs", type=click.Path(path_type=Path), help="For encoders: .csv of text, text, score; or .jsonl.")
@click.option("--windows", type=click.IntRange(1), default=20, show_default=True)
@click.option("--context", type=click.IntRange(2), default=2048, show_default=True)
@click.option("--teacher", help="To compare with; default: the manifest's, none for encoders.")
@click.option("--no-teacher", is_flag=True, help="Perplexity only.")
@task_options
@click.option("--json", "json_out", type=click.Path(path_type=Path), help="Write the result here.")
def evaluate(
    *, tasks: str | None, limit: int | None, task_data: Path | None, pairs: Path | None, **options: Any
) -> None:
    """Perplexity of MODEL or BUNDLE on a text, its KL and top-1 agreement against a teacher, and zero-shot tasks.

    MODEL may also be the folder of an export that stopped early (--until compress): the compressed model in PyTorch.
    Of a sentence encoder: Spearman's correlation with the scores of --pairs, and retrieval recall; with --teacher (a
    model or another bundle) also how near the embeddings are, and whether the scores tell both apart.
    """
    from jpq_export.encoder_evaluation import evaluate_encoder
    from jpq_export.evaluate.task_data import task_choice
    from jpq_export.evaluation import evaluate_model

    json_out = options.pop("json_out")
    check_result_file("--json", json_out)
    choice = task_choice(tasks, limit=limit, folder=task_data)
    asks_text = options["text"] is not None or choice is not None
    if asks_text == (pairs is not None):
        raise UsageError(
            "give --text or --tasks for a language model, or --pairs for a sentence encoder. "
            "See `jpq-export eval --help`."
        )
    if pairs:
        result = evaluate_encoder(options["model"], pairs=pairs, teacher=options["teacher"])
    else:
        result = evaluate_model(**options, tasks=choice)
    text = json.dumps(result, indent=1)
    if json_out:
        json_out.write_text(text + "\n", encoding="utf-8")
    click.echo(text)


def check_result_file(option: str, path: Path | None) -> None:
    """A result that cannot be written is said before it is measured."""
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise UsageError(f"{option} {path}: give a file in a folder that exists")


@main.command("compare")
@click.argument("model", required=False)
@click.option("--target", required=True, metavar="NAME|FILE.toml", help="Board to compare for; see `targets`.")
@click.option("--budgets", default="2.5,3,4", show_default=True, help="Bits per weight of the whole file, by commas.")
@click.option(
    "--methods", default=",".join(COMPARED), show_default=True, help=f"Rows, by commas: {', '.join(COMPARABLE)}."
)
@click.option("--widths", help=f"{WIDTHS_HELP} Peers keep their own.")
@click.option("--text", "texts", type=click.Path(path_type=Path), multiple=True, required=True, help="May be repeated.")
@click.option("--windows", type=click.IntRange(1), default=20, show_default=True)
@click.option("--window-context", type=click.IntRange(2), default=2048, show_default=True)
@task_options
@click.option("--effort", type=click.Choice(EFFORTS), default="standard", show_default=True)
@click.option("--calibration", type=click.Path(path_type=Path), help="Text file or folder; default: shipped text.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the cells; a killed comparison goes on there.")
@click.option("--keep", is_flag=True, help="Keep cells that other code made; each names its commit.")
def compare_command(
    *,
    keep: bool,
    budgets: str,
    methods: str,
    texts: tuple[Path, ...],
    windows: int,
    window_context: int,
    tasks: str | None,
    limit: int | None,
    task_data: Path | None,
    **options: Any,
) -> None:
    """Joint search against separate searches, uniform rounding and other quantizers, at equal stored bytes.

    Other people's quantizers (hqq, auto-round) come with the extra `peers`; gptqmodel is a package of its own, and
    llama.cpp's llama-quantize is taken from the PATH. The table is printed as Markdown; --out gets comparison.json,
    comparison.html, comparison.svg and a file a cell. --tasks adds columns, now or later.
    """
    from jpq_export.comparison import Comparison, compare
    from jpq_export.comparison_report import made_by, markdown
    from jpq_export.evaluate.task_data import task_choice
    from jpq_export.progress import Stages

    try:
        bits = tuple(float(part) for part in budgets.split(","))
    except ValueError:
        raise UsageError(f"--budgets {budgets!r}: expected numbers by commas, such as 2.5,3,4") from None
    least = min(search_widths(options["widths"]) or BIT_WIDTHS)
    if not all(least < value <= 8 for value in bits):
        raise UsageError(f"--budgets {budgets!r}: expected bits per weight above {least:g}, up to 8, such as 2.5,3,4")
    rows = tuple(methods.split(","))
    if unknown := [row for row in rows if row not in COMPARABLE]:
        raise UsageError(f"--methods {methods!r}: {unknown[0]!r} is not one of {', '.join(COMPARABLE)}")
    choice = task_choice(tasks, limit=limit, folder=task_data)
    fixed = {"size": None, "bits": bits[0], "ratio": None, "latency": None, "method": "jpq", "context": 2048}
    request = make_request(options | fixed | {"prune": True, "force": True}, until="compare")
    cells = compare(Comparison(request, bits, rows, texts, windows, window_context, choice, keep), Stages())
    click.echo("\n".join((markdown(cells), "", *made_by(cells))))


@main.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("other", required=False, type=click.Path(path_type=Path))
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=(1,),
    show_default=True,
    multiple=True,
    help="May be given again: one measurement for each.",
)
@click.option("--widths", help="Measure our kernels at one width for all matrices too, e.g. 4,3,2,1.6,1.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of every runtime.")
@click.option("--prefill", type=click.IntRange(1), default=128, show_default=True, help="Tokens of the prompt.")
@click.option("--decode", type=click.IntRange(1), default=32, show_default=True, help="New tokens a turn.")
@click.option(
    "--gguf",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Compare with llama.cpp's llama-bench on this file; may be given again.",
)
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Texts at once, of an encoder.")
@click.option("--pairs", type=click.Path(path_type=Path), help="Of an encoder: measure Spearman on these, as `eval`.")
@click.option("--baselines/--no-baselines", default=True, help="Compare with onnxruntime in fp32 and 4 or 8 bits.")
@click.option("--json", "json_out", type=click.Path(path_type=Path), help="Write the result here.")
@click.option("--html", "html_out", type=click.Path(path_type=Path), help="Write a page with bars here.")
def bench_command(bundle: Path, *, json_out: Path | None, html_out: Path | None, **options: Any) -> None:
    """Speed and memory of BUNDLE on this machine, beside the original in other runtimes, and bundle OTHER if given.

    A sentence encoder is measured in embeddings per second, against onnxruntime's fp32 and dynamic int8; with --pairs
    the quality stands beside each.
    """
    from jpq_export.bench.command import measure

    for option, path in (("--json", json_out), ("--html", html_out)):
        check_result_file(option, path)
    options["widths"] = search_widths(options["widths"]) or ()
    text, page = measure(bundle, **options)
    if json_out:
        json_out.write_text(text, encoding="utf-8")
    if html_out:
        html_out.write_text(page, encoding="utf-8")
