"""Kernels that TensorRT embeds in the engine: PTX for each layout a bundle's graph uses, written into the bundle.

    python -m jpq_kernels.aot BUNDLE --sm 110

For boards where no plugin library can be compiled or shipped: `jpq-export build BUNDLE --plugin aot` there registers
what this wrote (jpq_export/engine/aot.py) and needs no compiler and no Triton. TensorRT launches a kernel with the
node's inputs, then 32-bit scalars, then the output; `relist` gives Triton's entry points that list of parameters.
Only the kernels for few rows are used: the one for many rounds X to fp16, more than recorded vectors forgive.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import onnx
from triton.backends.nvidia.compiler import get_ptxas

from jpq_export.engine.aot import FOLDER, FORMAT, INPUTS, LAYOUT, MANIFEST
from jpq_export.errors import JpqError
from jpq_export.format.bundle import hash_file, read_manifest, write_manifest
from jpq_kernels.compile import TARGETS, compile_variant, resources
from jpq_kernels.low_bit_matmul import FEW_ROWS_TILES
from jpq_kernels.variants import Variant, few_rows, gather
from jpq_kernels.weight import WIDTHS, layout_of

NEWEST_PTX = (9, 0)  # what CUDA 13.0, the oldest with TensorRT's ahead-of-time plugins on Jetson, reads
TILES = (FEW_ROWS_TILES[0], FEW_ROWS_TILES[-1])  # TensorRT times both: one row for decode, eight for prompts
WHOLE_ROW = 1 << 30  # units in a split: more than any row has
SCALARS = ("rows", "N", "K", "bias_length", "zero_row_bytes")
PARAMETER = re.compile(r"^\s*\.param \.(u\d+)[^\n]*?(\w+_param_\d+)(\[\d+\])?,?$", re.MULTILINE)


class CompileError(JpqError):
    """A graph has operators these kernels cannot do, or a rewritten kernel does not assemble."""


def layouts_of(graph: Path) -> list[dict[str, Any]]:
    """The different layouts of a graph's `jpq::` nodes, in order: `LAYOUT`'s facts."""
    found = {}
    for node in onnx.load(graph, load_external_data=False).graph.node:
        if node.domain != "jpq" or node.op_type not in INPUTS:
            continue
        facts: dict[str, Any] = {a.name: a.i for a in node.attribute}
        symmetric = bool(facts["symmetric"])
        biased = len(node.input) > (3 if symmetric else 4)
        layout = {"op": node.op_type, "bits": facts["bits"], "group_size": facts["group_size"]}
        found[json.dumps(layout | {"symmetric": symmetric, "bias": biased})] = None
    return [json.loads(text) for text in sorted(found)]


def variants_of(layout: Mapping[str, Any]) -> list[Variant]:
    """The kernels of one layout, fp32 in and out; TensorRT's tactic 1 is the first."""
    if layout["bits"] not in WIDTHS:
        raise CompileError(f"{layout['op']}: no kernel for bits {layout['bits']}; known are {WIDTHS}")
    try:
        form = layout_of(layout["bits"], layout["group_size"], symmetric=layout["symmetric"])
    except ValueError as error:
        raise CompileError(f"{layout['op']}: {error}; build with --plugin library") from error
    if layout["op"] == "LowBitGather":
        return [gather(form, "fp32")]
    return [few_rows(form, "fp32", tile) for tile in TILES]


def parameters_of(layout: Mapping[str, Any], names: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """TensorRT's list of a kernel's parameters, and the values of those it does not pass."""
    absent = {"zeros", "zero_row_bytes"} if layout["symmetric"] else set()
    absent |= set() if layout["bias"] else {"bias", "bias_length"}
    names = list(names)
    inputs = [name for name in INPUTS[layout["op"]] if name not in absent]
    scalars = [name for name in SCALARS if name in names and name not in absent]
    listed = [*inputs, *scalars, "out"]
    constants = {name: WHOLE_ROW if name == "split_units" else 0 for name in names if name not in listed}
    return listed, constants


def relist(ptx: str, names: list[str], listed: list[str], constants: Mapping[str, int]) -> str:
    """Give an entry point the parameters `listed`, in that order; all others become constants.

    `names`: of the parameters as they stand. CompileError when one that goes is used otherwise than by loading it.
    """
    found = PARAMETER.findall(ptx.split(".entry", 1)[1].split(")", 1)[0])
    if len(found) != len(names):
        raise CompileError(f"a kernel takes {len(found)} parameters, expected {len(names)}: another version of Triton?")
    place = dict(zip(names, found, strict=True))
    for name, value in constants.items():
        load = rf"ld\.param\.[bus](32|64)(\s+)(%\w+), \[{place[name][1]}\];"
        ptx = re.sub(load, rf"mov.b\1\g<2>\3, {value};", ptx)
    head, rest = ptx.split(".entry", 1)
    opened, body = rest.split("(", 1)
    _, body = body.split(")", 1)
    for name in constants:
        if re.search(rf"\b{place[name][1]}\b", body):
            raise CompileError(f"parameter {name} of a kernel is more than loaded: another version of Triton?")
    declared = ",\n".join(f"\t.param .{place[name][0]} {place[name][1]}" for name in listed)
    return f"{_lowered(head)}.entry{opened}(\n{declared}\n){body}"


def _lowered(head: str) -> str:
    """The head of a PTX file with a version that `NEWEST_PTX` allows; whether that is enough, `assemble` finds out."""
    version = re.search(r"^\.version (\d+)\.(\d+)$", head, re.MULTILINE)
    if version is None:
        raise CompileError("a kernel's PTX states no version: another version of Triton?")
    major, minor = min((int(version[1]), int(version[2])), NEWEST_PTX)
    return head.replace(version[0], f".version {major}.{minor}")


def assemble(ptx: str, sm: int) -> dict[str, int]:
    """Registers and spills of a rewritten kernel; CompileError when ptxas does not take it."""
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch, "kernel.ptx"), Path(scratch, "kernel.cubin")
        source.write_text(ptx, encoding="utf-8")
        target = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
        assert target
        command = [get_ptxas(sm).path, f"-arch={target[1]}", str(source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode:
            raise CompileError(f"ptxas refuses a rewritten kernel: {done.stderr.strip().splitlines()[0]}")
        return resources(out.read_bytes())


def grid_of(variant: Variant) -> list[tuple[str, int]]:
    """Each dimension of the grid: a quantity, and what it is divided by, rounded up."""
    known = {"splits": ("one", 1), "1": ("one", 1), "count": ("rows", 1)}
    parts = [re.fullmatch(r"ceil\((\w+) / (\d+)\)", text) for text in variant.grid]
    return [(m[1], int(m[2])) if m else known[text] for m, text in zip(parts, variant.grid, strict=True)]


def compile_layout(layout: Mapping[str, Any], sm: int, folder: Path) -> list[dict[str, Any]]:
    """Write the kernels of a layout for one device; returns their entries of the manifest."""
    entries = []
    for tactic, variant in enumerate(variants_of(layout), 1):
        files, made = compile_variant(variant, sm)
        names = [argument["name"] for argument in made["arguments"]]
        listed, constants = parameters_of(layout, names)
        ptx = relist(files["ptx"].decode(), names, listed, constants)
        used = assemble(ptx, sm)
        name = f"{variant.name}{'_bias' if layout['bias'] else ''}.sm_{sm}.ptx"
        (folder / name).write_text(ptx, encoding="utf-8")
        launch = {"threads": made["threads"], "shared_bytes": made["shared_bytes"], "grid": grid_of(variant)}
        scalars = [name for name in listed if name in SCALARS]
        entries.append(
            {**{key: layout[key] for key in LAYOUT}, "tactic": tactic, "sm": sm, "entry_point": made["entry_point"]}
            | launch
            | {"scalars": scalars, **used, "file": name, "sha256": hashlib.sha256(ptx.encode()).hexdigest()}
        )
    return entries


def compile_bundle(bundle: Path, sms: Iterable[int]) -> list[dict[str, Any]]:
    """Write `aot/` into a bundle with a graph for TensorRT, and list it in the bundle's manifest; returns the entries.

    Raises:
        BundleError, CompileError: no bundle, no such graph, or layouts these kernels cannot do.
    """
    manifest = read_manifest(bundle)
    graph = (manifest.device or {}).get("graph")
    if graph not in manifest.files:
        raise CompileError(f"{bundle}: no graph for TensorRT; export with --target jetson")
    folder = bundle / FOLDER
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.ptx"):
        old.unlink()
    tasks = [(layout, sm) for layout in layouts_of(bundle / graph) for sm in sms]
    if not tasks:
        raise CompileError(f"{bundle}: {graph} has no low-bit operators; nothing to compile")
    with click.progressbar(tasks, label="compiling", show_pos=True) as bar:
        entries = [entry for layout, sm in bar for entry in compile_layout(layout, sm, folder)]
    about = {"format": FORMAT, "graph_sha256": manifest.files[graph].sha256}
    (bundle / MANIFEST).write_text(json.dumps({**about, "kernels": entries}, indent=1) + "\n", encoding="utf-8")
    names = {f"{FOLDER}/{entry['file']}" for entry in entries} | {MANIFEST}
    others = {name: entry for name, entry in manifest.files.items() if not name.startswith(f"{FOLDER}/")}
    listed = {name: hash_file(bundle / name) for name in sorted(names)}
    write_manifest(bundle, replace(manifest, files={**others, **listed}))
    return entries


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--sm", type=click.Choice([str(sm) for sm in TARGETS]), multiple=True, required=True, help="Devices.")
def main(bundle: Path, sm: tuple[str, ...]) -> None:
    """Compile the kernels BUNDLE's TensorRT graph needs into it, for `jpq-export build BUNDLE --plugin aot`."""
    try:
        entries = compile_bundle(bundle, [int(value) for value in sm])
    except JpqError as error:
        raise click.ClickException(str(error)) from error
    spilled = [f"{entry['file']}" for entry in entries if entry["spill_bytes"]]
    click.echo(f"{len(entries)} kernels in {bundle / FOLDER}; spilling registers: {', '.join(spilled) or 'none'}")


if __name__ == "__main__":
    main()
