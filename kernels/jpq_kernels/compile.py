"""Compile the kernels ahead of time: PTX, cubin and a manifest of how to launch them, without a GPU or driver.

    python -m jpq_kernels.compile --out DIR --sm 87 --bits 4 --group-size 64

The manifest lists, for every kernel and device, all a loader of the driver API needs: entry point, threads, shared
memory, grid, arguments in order with types and what they must be multiples of, and the files' SHA-256. The same
versions of Triton and of this package give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jpq_export.numerics.levels import NORMAL_WIDTHS
from jpq_export.numerics.scheme import ALL_WIDTHS, kernel_bits
from jpq_kernels.variants import GROUP_SIZES, WIDTHS, X_TYPES, Variant, variants

TARGETS = (87, 89, 90, 110, 120)  # Orin; L4, RTX 40; H100, H200; Thor; RTX 50
WIDTH_NAMES = {f"{bits:g}": kernel_bits(bits) for bits in ALL_WIDTHS} | {
    f"normal{bits}": kernel_bits(bits, normal=True) for bits in NORMAL_WIDTHS
}
Compiled = tuple[dict[str, bytes], dict[str, Any]]  # files by ending, entry of the manifest
ZERO_POINTS = ("symmetric", "asymmetric")
C_TYPES = {"i32": "int32"}  # the rest are pointers


def compile_variant(variant: Variant, sm: int) -> Compiled:
    """Compile one kernel for one device: the files' bytes by ending, and its entry of the manifest."""
    names = variant.kernel.arg_names
    signature = {name: variant.arguments.get(name, "constexpr") for name in names}
    multiples = {
        (names.index(name),): [["tt.divisibility", 16]] for name in variant.arguments if name in variant.aligned
    }
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    knobs.compilation.disable_line_info = True  # it would put this machine's paths into the PTX
    knobs.compilation.always_compile = True  # a cached kernel may carry line information
    source = ASTSource(variant.kernel, signature, dict(variant.constants), multiples)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    files = {"ptx": compiled.asm["ptx"].encode(), "cubin": compiled.asm["cubin"]}
    return files, entry(variant, sm, compiled.metadata, files)


def entry(variant: Variant, sm: int, metadata: Any, files: dict[str, bytes]) -> dict[str, Any]:
    """One kernel of the manifest."""
    return {
        "name": variant.name,
        "sm": sm,
        "entry_point": metadata.name,
        "threads": 32 * variant.num_warps,
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "shared_bytes": metadata.shared,
        **resources(files["cubin"]),
        "grid": list(variant.grid),
        "arguments": arguments(variant, files["ptx"].decode()),
        "constants": variant.constants,
        **variant.meaning,
        "files": {
            ending: {"name": f"{variant.name}.sm_{sm}.{ending}", "sha256": hashlib.sha256(body).hexdigest()}
            for ending, body in files.items()
        },
    }


def arguments(variant: Variant, ptx: str) -> list[dict[str, Any]]:
    """The parameters of the entry point, in order; RuntimeError when the PTX has others.

    Triton appends two pointers to scratch memory of its own; these kernels use none: pass null.
    """
    listed = [
        {"name": name, "type": C_TYPES.get(kind, kind), "multiple_of": 16 if name in variant.aligned else 1}
        for name, kind in variant.arguments.items()
    ]
    listed += [{"name": name, "type": "null", "multiple_of": 1} for name in ("global_scratch", "profile_scratch")]
    found = re.findall(r"^\s*\.param \.(\w+)", ptx.split(".entry", 1)[1].split("{", 1)[0], re.MULTILINE)
    wanted = ["u32" if argument["type"] == "int32" else "u64" for argument in listed]
    if found != wanted:
        raise RuntimeError(f"{variant.name}: the PTX takes {found}, expected {wanted}; is Triton another version?")
    return listed


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of stack a thread (registers that did not fit: spills), read from the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout))
    return {"registers": int(usage["REG"]), "spill_bytes": int(usage["STACK"]) + int(usage["LOCAL"])}


def compile_all(choice: dict[str, Any], tasks: list[tuple[str, int]], jobs: int) -> Iterator[Compiled]:
    """Compile kernels by (name, device), in that order; `choice`: the arguments of `variants` that list them."""
    if jobs == 1:
        yield from (compile_named(choice, *task) for task in tasks)
        return
    with ProcessPoolExecutor(jobs) as pool:
        pending = [pool.submit(compile_named, choice, *task) for task in tasks]
        yield from (future.result() for future in pending)


def compile_named(choice: dict[str, Any], name: str, sm: int) -> Compiled:
    """Compile one kernel by its name: kernels themselves cannot be sent to another process."""
    return compile_variant(next(variant for variant in variants(**choice) if variant.name == name), sm)


def write(folder: Path, compiled: Compiled) -> dict[str, Any]:
    """Write a kernel's files; returns its entry."""
    files, listed = compiled
    for ending, body in files.items():
        (folder / listed["files"][ending]["name"]).write_bytes(body)
    return listed


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write to.")
@click.option("--sm", type=click.Choice([str(sm) for sm in TARGETS]), multiple=True, help="Devices; default: all.")
@click.option("--bits", type=click.Choice(list(WIDTH_NAMES)), multiple=True, help="Widths; default: all.")
@click.option("--group-size", type=int, multiple=True, default=GROUP_SIZES, show_default=True)
@click.option("--x", "x_types", type=click.Choice(X_TYPES), multiple=True, default=X_TYPES, show_default=True)
@click.option("--zero-points", type=click.Choice(ZERO_POINTS), multiple=True, default=ZERO_POINTS, show_default=True)
@click.option("--only", multiple=True, help="Only kernels whose name begins so, such as few_rows_1_ or gather.")
@click.option("--jobs", type=int, default=1, show_default=True, help="Processes.")
def main(
    out: Path,
    sm: tuple[str, ...],
    bits: tuple[str, ...],
    group_size: tuple[int, ...],
    x_types: tuple[str, ...],
    zero_points: tuple[str, ...],
    only: tuple[str, ...],
    jobs: int,
) -> None:
    """Compile the Triton kernels for the devices and weight layouts given: PTX, cubin and manifest.json."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise click.UsageError("TRITON_INTERPRET=1 replaces Triton's compiler by its interpreter; unset it.")
    widths = tuple(WIDTH_NAMES[b] for b in bits) or WIDTHS
    choice = {"bits": widths, "group_sizes": group_size, "x_types": x_types, "zero_points": zero_points}
    try:
        names = [variant.name for variant in variants(**choice)]
    except ValueError as error:  # a group size no kernel reads
        raise click.UsageError(str(error)) from error
    names = [name for name in names if name.startswith(only or "")]
    if not names:
        known = "few_rows, many_rows, gather, add_splits"
        raise click.UsageError(f"no kernel begins with {' or '.join(only)}; known: {known}")
    tasks = [(name, target) for name in names for target in tuple(int(s) for s in sm) or TARGETS]
    out.mkdir(parents=True, exist_ok=True)
    with click.progressbar(compile_all(choice, tasks, jobs), length=len(tasks), label="compiling") as bar:
        kernels = [write(out, compiled) for compiled in bar]
    manifest = {"version": 1, "triton": triton.__version__, "kernels": kernels}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    spilled = [f"{kernel['name']} sm_{kernel['sm']}" for kernel in kernels if kernel["spill_bytes"]]
    click.echo(f"{len(kernels)} kernels in {out}; spilling registers: {', '.join(spilled) or 'none'}")


if __name__ == "__main__":
    main()
