"""The options of a search on the command line, and how they become a Request."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from jpq_export.errors import UsageError
from jpq_export.format.spec import FLOAT_CACHE, KV_CACHES
from jpq_export.numerics.scheme import read_width

WIDTHS_HELP = "Bits a matrix may have, by commas; default 2,3,4,5,6,8. Also 1 and 1.6 (ternary)."
GROUP_SIZES = (32, 64, 128, 256, 512, 1024)
EFFORTS = ("quick", "standard", "max")
ACTIVATION_BITS = ("16", "8", "4", "3.2")
METHODS = ("jpq", "gptq", "rtn", "toga", "qpruner", "llm-pruner")
LARGEST_SEED = 2**63 - 1  # torch takes no larger one
UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_bytes(text: str, option: str = "--size") -> float:
    """'60MB', '1.5 GiB', '42000000' -> bytes; UsageError otherwise."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in UNITS or not 0 < float(match[1]) < 1e18:
        raise UsageError(f"{option} {text!r}: expected a positive number of bytes such as 60MB, 1.5GB or 64MiB")
    return float(match[1]) * UNITS[match[2].upper()]


def latency_ms(text: str) -> float:
    """'8ms', '0.5 s', '900us' -> milliseconds; UsageError otherwise."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(us|ms|s)?\s*", text)
    if not match or not 0 < float(match[1]) < 1e18:
        raise UsageError(f"--latency {text!r}: expected a positive time such as 8ms, 900us or 0.1s")
    return float(match[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3, None: 1.0}[match[2]]


def budget_request(
    size: str | None, bits: float | None, ratio: float | None, latency: str | None, default: float
) -> Any:
    """One of the four budgets, or the target's default bits."""
    from jpq_export.compress.plan import BudgetRequest

    given = [
        n for n, v in (("--size", size), ("--bits", bits), ("--ratio", ratio), ("--latency", latency)) if v is not None
    ]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)}: only one budget can be met at a time; keep one of them")
    if size is not None:
        return BudgetRequest("size", size_bytes(size))
    if latency is not None:
        return BudgetRequest("latency", latency_ms(latency))
    if ratio is not None:
        if not 0 < ratio <= 1:
            raise UsageError(f"--ratio {ratio}: expected a fraction of the fp16 size above 0, up to 1, such as 0.2")
        return BudgetRequest("ratio", ratio)
    if bits is not None and not 0 < bits <= 16:
        raise UsageError(f"--bits {bits}: expected bits per weight above 0, up to 16, such as 3.0")
    return BudgetRequest("bits", default if bits is None else bits)


def search_widths(text: str | None) -> tuple[float, ...] | None:
    """'1,1.6,4' -> (1, 1.6, 4), sorted; UsageError otherwise."""
    if text is None:
        return None
    try:
        widths = [read_width(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--widths {text!r}: {error}; expected widths by commas, such as 1.6,2,3,4") from None
    return tuple(sorted(set(widths)))


def _device(name: str) -> str:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA GPU is usable here; use --device cpu or auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def search_options(command: Any) -> Any:
    """Options shared by export and plan."""
    for option in reversed(
        (
            click.argument("model", required=False),
            click.option(
                "--target", required=True, metavar="NAME|FILE.toml", help="Board to export for; see `targets`."
            ),
            click.option("--size", help="Budget: bytes of all weights as stored, e.g. 60MB; a bare number is bytes."),
            click.option("--bits", type=float, help="Budget: bits per weight over the whole file, e.g. 3.0."),
            click.option("--ratio", type=float, help="Budget: fraction of the fp16 size, e.g. 0.2."),
            click.option(
                "--latency", help="Budget: decode latency of one token on the target, e.g. 8ms; a bare number is ms."
            ),
            click.option("--widths", help=WIDTHS_HELP),
            click.option(
                "--group-size",
                type=int,
                metavar="N",
                help="Weights that share a scale, or the next more that divide a row. Default: 512 where the stream is "
                "rotated, else 128. onnxruntime's own kernels, for machines without a C compiler, want 64.",
            ),
            click.option("--method", type=click.Choice(METHODS), default="jpq", show_default=True),
            click.option(
                "--effort",
                type=click.Choice(EFFORTS),
                default="standard",
                show_default=True,
                help="How much is computed. --method toga trains 30, 200 or, with max, the published steps: 10,000, "
                "2,000 with --no-prune.",
            ),
            click.option(
                "--calibration", type=click.Path(path_type=Path), help="Text file or folder; default: shipped text."
            ),
            click.option(
                "--context", type=int, default=2048, show_default=True, help="Tokens in the KV cache, for latency."
            ),
            click.option(
                "--kv-cache",
                type=click.Choice(KV_CACHES),
                default=FLOAT_CACHE,
                show_default=True,
                help="How a decoder keeps keys and values; int8 is for onnxruntime targets.",
            ),
            click.option(
                "--activation-bits",
                type=click.Choice(ACTIVATION_BITS),
                default="16",
                show_default=True,
                help="What every linear reads, rounded token by token, in training and evaluation (W4A4, W8A8, "
                "W3.2A3.2); of --method toga. 8 is exported for onnxruntime; 4 and 3.2 are measured, with --until "
                "compress.",
            ),
            click.option(
                "--prune/--no-prune", default=True, show_default=True, help="Let the search remove structure."
            ),
            click.option(
                "--rotate/--no-rotate",
                default=True,
                show_default=True,
                help="Let the residual stream have another basis where a trial says that it rounds better there.",
            ),
            click.option(
                "--adapters",
                type=click.IntRange(0),
                metavar="RANK",
                default=0,
                help="Low-rank branches of that rank beside every linear, trained (LoftQ, LoRA); of --method qpruner.",
            ),
            click.option("--seed", type=int, default=0, show_default=True),
            click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True),
            click.option(
                "--out", type=click.Path(path_type=Path), help="Bundle folder; default: named after model and target."
            ),
            click.option("--force", is_flag=True, help="Replace an existing bundle at --out."),
        )
    ):
        command = option(command)
    return command


def task_options(command: Any) -> Any:
    """Options shared by eval and compare."""
    for option in (
        click.option(
            "--task-data", type=click.Path(path_type=Path), help="Folder with arc_easy.jsonl, ... Default: the hub."
        ),
        click.option("--limit", type=click.IntRange(1), help="Questions a task. Default: all."),
        click.option("--tasks", help="Zero-shot tasks by commas, such as arc_easy,piqa; the extra `tasks` (lm-eval)."),
    ):
        command = option(command)
    return command


def _check_activations(bits: float, method: str, target: Any, until: str | None) -> None:
    """UsageError where nothing here rounds activations so, or no runtime has integer kernels for them."""
    if bits == 16:
        return
    asked = f"--activation-bits {bits:g}"
    if method != "toga":
        raise UsageError(f"{asked}: --method {method} does not round activations; use --method toga")
    if until in ("plan", "compress"):
        return
    if bits != 8:
        raise UsageError(
            f"{asked}: no runtime here has integer kernels for {bits:g}-bit activations; measure it with --until "
            "compress, or export with --activation-bits 8"
        )
    if engine := "TensorRT" if target.tensorrt else "TensorRT-RTX" if target.engine else "":
        raise UsageError(
            f"{asked}: {engine}, which {target.name} is for, has no integer kernels for weights in groups; export for "
            "onnxruntime, such as --target cpu-x86, or measure it with --until compress"
        )


def _check_group_size(size: int | None, method: str, target: Any) -> None:
    """UsageError where plans do not start from a size, or nothing could compute such groups."""
    if size is None:
        return
    if method != "jpq":
        raise UsageError(f"--group-size: --method {method} has its own; leave the option out")
    if size not in GROUP_SIZES:
        raise UsageError(f"--group-size {size}: expected one of {', '.join(map(str, GROUP_SIZES))}")
    if target.engine and size != 64:
        raise UsageError(f"--group-size {size}: the engine of {target.name} is built with groups of 64; leave it out")


def make_request(options: dict[str, Any], **extra: Any) -> Any:
    """A Request from click's values, or a UsageError."""
    from jpq_export.format.target import load_target
    from jpq_export.request import Request

    target = load_target(options["target"])
    if options["context"] < 1:
        raise UsageError(f"--context {options['context']}: expected at least 1 token")
    if not 0 <= options["seed"] <= LARGEST_SEED:
        raise UsageError(f"--seed {options['seed']}: expected 0 to {LARGEST_SEED}")
    kept = options.get("kv_cache", FLOAT_CACHE)
    if kept != FLOAT_CACHE and (engine := "TensorRT" if target.tensorrt else "TensorRT-RTX" if target.engine else ""):
        raise UsageError(
            f"--kv-cache {kept}: {engine}, which {target.name} is for, reads a {FLOAT_CACHE} cache only; leave the "
            "option out, or export for onnxruntime, such as --target cpu-x86"
        )
    if options["latency"] is not None and options["method"] != "jpq":
        raise UsageError(
            f"--latency: --method {options['method']} knows budgets of bytes only; give --size, --bits or --ratio"
        )
    if options.get("adapters") and options["method"] != "qpruner":
        raise UsageError(f"--adapters: --method {options['method']} trains none; use --method qpruner")
    _check_group_size(options.get("group_size"), options["method"], target)
    activation_bits = float(options.get("activation_bits", 16))
    _check_activations(activation_bits, options["method"], target, extra.get("until") or options.get("until"))
    budget = budget_request(options["size"], options["bits"], options["ratio"], options["latency"], target.default_bits)
    name = Path(options["model"]).name.removesuffix(".gguf") if options["model"] else "smollm2-135m"
    suffix = f"-{budget.kind}{budget.value:g}"
    until = extra.get("until") or options.get("until")  # a plan must not sit where the bundle will go
    suffix += f"-{until}" if until else ""
    out = options["out"] or Path(re.sub(r"[^A-Za-z0-9._-]", "-", f"jpq-{name}-{target.name}{suffix}"))
    if out.name in ("", ".."):
        out = out.resolve()  # the folder beside it that a run writes to needs a name
    taken = ("target", "size", "bits", "ratio", "latency", "widths", "out", "device", "activation_bits")
    rest = {k: v for k, v in options.items() if k not in taken}
    return Request(
        target=target,
        out=out,
        budget=budget,
        device=_device(options["device"]),
        widths=search_widths(options.get("widths")),
        activation_bits=activation_bits,
        **rest,
        **extra,
    )
