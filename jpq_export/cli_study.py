"""The command line of `jpq-export study`: its options, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jpq_export.cli_options import EFFORTS, LARGEST_SEED, make_request, task_options
from jpq_export.errors import UsageError
from jpq_export.numerics.scheme import BIT_WIDTHS

if TYPE_CHECKING:
    from jpq_export.study import Settings

RATES = "75,81.25,87.5"
PATTERNS = "unstructured,2:4,2:8,structural"
CASES = ("A", "B")
EXAMPLES = """
\b
Examples:
  jpq-export study --effort quick                        the default model, case B, a small grid
  jpq-export study ./my-llama --rates 81.25 --widths 3,4 3 bits against a quarter of zeros and 4 bits
  jpq-export study --tasks arc_easy,piqa --limit 200     retention of task scores, as published
  jpq-export study --effort max --calibration c4.jsonl   128 x 2048 tokens, all widths, both cases: for a GPU
  jpq-export study --effort quick --export bundle --target cpu
"""


@click.command("study", epilog=EXAMPLES)
@click.argument("model", required=False)
@click.option("--rates", default=RATES, show_default=True, help="Theoretical compression rates in percent, by commas.")
@click.option("--widths", help="Bits, by commas. Default: 2,3,4,8 (quick), with 6 (standard), with 5 too (max).")
@click.option("--patterns", default=PATTERNS, show_default=True, help="Where zeros may be; n:m is n zeros in every m.")
@click.option("--cases", help="A: SparseGPT, then GPTQ. B: both in one sweep. Default: B (quick), else A,B.")
@click.option(
    "--text", type=click.Path(path_type=Path), help="Measure on this text. Default: held-out calibration text."
)
@click.option("--windows", type=click.IntRange(1), default=20, show_default=True, help="Of --text.")
@click.option("--window-context", type=click.IntRange(2), default=2048, show_default=True, help="Tokens of a window.")
@task_options
@click.option("--effort", type=click.Choice(EFFORTS), default="standard", show_default=True)
@click.option("--calibration", type=click.Path(path_type=Path), help="Text file or folder; default: shipped text.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of study.json, study.html and the cells.")
@click.option("--export", "bundle", type=click.Path(path_type=Path), help="Then export the recommended cell here.")
@click.option("--target", metavar="NAME|FILE.toml", help="Board to export for; see `targets`.")
@click.option("--cell", help="Export this cell instead, named as in the table.")
@click.option("--force", is_flag=True, help="Replace an existing bundle at --export.")
def study(**options: Any) -> None:
    """Fewer weights or fewer bits? Zeros and widths of MODEL at equal theoretical compression rates (SrCr).

    TCr = 1 - (1 - s) q / 16 for a share s of zeros and q bits, over the layers' weights. Every cell is compressed,
    measured and kept as a file: a killed study goes on where it stopped. study.html has heat maps, bytes as really
    stored beside the theoretical ones, and which patterns a target can run faster.
    """
    from jpq_export.methods.srcr.page import markdown
    from jpq_export.progress import Stages
    from jpq_export.study import Study
    from jpq_export.summary import show_summary

    request = _export_request(options)
    stages = Stages()
    run = Study(_settings(options), stages)
    cell = run.cell_named(options["cell"]) if options["cell"] else None
    if request:
        from jpq_export.workspace import check_output

        check_output(request.out, force=request.force)
    result = run.run()
    click.echo(markdown(result))
    click.echo(f"\n{run.settings.out / 'study.html'}")
    if request is None:
        return
    from jpq_export.study_export import export_cell

    if cell is None and result["recommended"]["cell"] is None:
        raise UsageError("--export: no cell reaches its rate, so none is recommended; name one with --cell")
    shown = export_cell(run, cell or run.cell_named(result["recommended"]["cell"]), request, stages)
    show_summary(shown)
    if "parity" in shown and not shown["parity"].passed:
        raise click.exceptions.Exit(1)


def _settings(options: dict[str, Any]) -> Settings:
    from jpq_export.cli_options import _device
    from jpq_export.evaluate.task_data import task_choice
    from jpq_export.methods.srcr.points import check_pattern
    from jpq_export.study import Settings

    if not 0 <= options["seed"] <= LARGEST_SEED:
        raise UsageError(f"--seed {options['seed']}: expected 0 to {LARGEST_SEED}")
    name = Path(options["model"]).name.removesuffix(".gguf") if options["model"] else "smollm2-135m"
    return Settings(
        model=options["model"],
        out=options["out"] or Path(f"jpq-study-{name}-{options['effort']}"),
        rates=rates(options["rates"]),
        patterns=tuple(dict.fromkeys(check_pattern(part.strip()) for part in options["patterns"].split(","))),
        effort=options["effort"],
        widths=widths(options["widths"]),
        cases=cases(options["cases"]),
        calibration=options["calibration"],
        text=options["text"],
        windows=options["windows"],
        context=options["window_context"],
        tasks=task_choice(options["tasks"], limit=options["limit"], folder=options["task_data"]),
        seed=options["seed"],
        device=_device(options["device"]),
    )


def rates(given: str) -> tuple[float, ...]:
    """'75,81.25' -> (0.75, 0.8125); UsageError otherwise."""
    try:
        found = tuple(float(part) / 100 for part in given.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < rate < 1 for rate in found):
        raise UsageError(f"--rates {given!r}: expected percents between 0 and 100 by commas, such as {RATES}")
    return tuple(dict.fromkeys(found))


def widths(given: str | None) -> tuple[int, ...] | None:
    """'3,4' -> (3, 4); UsageError for what cannot hold an exact zero or is no width."""
    if given is None:
        return None
    parts = [part.strip() for part in given.split(",")]
    known = {str(bits): bits for bits in BIT_WIDTHS}
    if wrong := [part for part in parts if part not in known]:
        raise UsageError(f"--widths {given!r}: {wrong[0]!r} is not one of {', '.join(known)}")
    return tuple(sorted({known[part] for part in parts}))


def cases(given: str | None) -> tuple[str, ...] | None:
    """'A,B' -> ("A", "B"); UsageError otherwise."""
    if given is None:
        return None
    found = tuple(sorted({part.strip() for part in given.split(",")}))
    if not set(found) <= set(CASES):
        raise UsageError(f"--cases {given!r}: expected A, B or A,B")
    return found


def _export_request(options: dict[str, Any]) -> Any:
    """The export's request; None without --export. UsageError when its options come alone."""
    if options["bundle"] is None:
        for option in ("target", "cell"):
            if options[option] is not None:
                raise UsageError(f"--{option}: goes with --export; name a folder for the bundle")
        return None
    if options["target"] is None:
        raise UsageError("--export: needs --target, such as --target cpu; see `jpq-export targets`")
    fixed = {"size": None, "bits": None, "ratio": None, "latency": None, "widths": None, "method": "jpq"}
    rest = {key: options[key] for key in ("model", "target", "effort", "calibration", "seed", "device", "force")}
    return make_request(rest | fixed | {"context": 2048, "prune": True, "out": options["bundle"]})
