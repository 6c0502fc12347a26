"""The plugin without a library: kernels of the bundle (PTX) that TensorRT puts into the engine (`--plugin aot`).

NVIDIA calls this a quickly deployable plugin, ahead of time: Python tells the builder shapes, kernels and launches
(module `tensorrt.plugin`, from TensorRT 10.9 on); the engine then runs without it. `python -m jpq_kernels.aot` compiles
the kernels on the exporting machine. The library's prefill is faster: these kernels take at most eight rows at a time.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import mul
from pathlib import Path
from typing import Any

from jpq_export.engine.plugin import ABI, Plugin, PluginError
from jpq_export.format.bundle import hash_file, safe_name
from jpq_export.numerics.scheme import from_kernel_bits, row_bytes

FIRST_TENSORRT = (10, 9)
FOLDER, MANIFEST = "aot", "aot/manifest.json"
FORMAT = "jpq-aot/1"
INPUTS = {
    "LowBitMatMul": ("x", "packed", "scales", "zeros", "bias"),
    "LowBitGather": ("indices", "packed", "scales", "zeros"),
}
ATTRIBUTES = ("bits", "K", "N", "group_size", "symmetric")
LAYOUT = ("op", "bits", "group_size", "symmetric", "bias")
REMEDY = "python -m jpq_kernels.aot BUNDLE --sm {sm} where it was exported"
TYPES = {"FLOAT": "FP32", "HALF": "FP16"}  # names in `AutoTuneCombination` where they differ from DataType's


@dataclass(frozen=True, slots=True)
class Kernel:
    """One compiled kernel. `layout`: values of `LAYOUT`; `grid`: quantity and divisor of each dimension."""

    layout: tuple[Any, ...]
    tactic: int
    sm: int
    entry_point: str
    threads: int
    shared_bytes: int
    grid: tuple[tuple[str, int], ...]
    scalars: tuple[str, ...]
    ptx: str


@dataclass(frozen=True, slots=True)
class Kernels:
    """All of a bundle, compiled for the graph of `graph_sha256`; `sha256` is the list's own, which has the files'."""

    path: Path
    sha256: str
    graph_sha256: str
    kernels: tuple[Kernel, ...]

    @property
    def sms(self) -> tuple[int, ...]:
        """Devices there is code for."""
        return tuple(sorted({kernel.sm for kernel in self.kernels}))

    def of(self, layout: tuple[Any, ...], sm: int) -> dict[int, Kernel]:
        """Kernels of a layout on a device, by TensorRT's tactic; PluginError when there is none."""
        found = {kernel.tactic: kernel for kernel in self.kernels if kernel.layout == layout and kernel.sm == sm}
        if not found:
            what = ", ".join(f"{name} {value}" for name, value in zip(LAYOUT, layout, strict=True))
            raise PluginError(f"{self.path}: no kernel for {what} on sm_{sm}; {REMEDY.format(sm=sm)}")
        return found


def read_kernels(bundle: Path) -> Kernels:
    """The kernels, each of its recorded sha256; PluginError when they are absent, malformed or changed."""
    path = bundle / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']!r}, expected {FORMAT}")
        kernels = tuple(_kernel(path, entry) for entry in raw["kernels"])
        return Kernels(path, hash_file(path).sha256, str(raw["graph_sha256"]), kernels)
    except FileNotFoundError as error:
        raise PluginError(f"{error.filename}: not in this bundle; {REMEDY.format(sm='<board>')}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PluginError(f"{path}: not readable ({error!r}); copy the bundle again") from error


def _kernel(path: Path, raw: dict[str, Any]) -> Kernel:
    ptx = (path.parent / safe_name(raw["file"], path)).read_bytes()
    if hashlib.sha256(ptx).hexdigest() != raw["sha256"]:
        raise PluginError(f"{path.parent / raw['file']}: sha256 is not the recorded one; copy the bundle again")
    return Kernel(
        layout=tuple(raw[name] for name in LAYOUT),
        **{name: int(raw[name]) for name in ("tactic", "sm", "threads", "shared_bytes")},
        entry_point=str(raw["entry_point"]),
        grid=tuple((str(quantity), int(divisor)) for quantity, divisor in raw["grid"]),
        scalars=tuple(raw["scalars"]),
        ptx=ptx.decode(),
    )


def reason_against(kernels: Kernels, graph_sha256: str, sm: int | None, tensorrt: tuple[int, int] | None) -> str | None:
    """Why these kernels cannot serve a graph on a board; None when they can."""
    if tensorrt is not None and tensorrt < FIRST_TENSORRT:
        here, first = (".".join(map(str, version)) for version in (tensorrt, FIRST_TENSORRT))
        return f"TensorRT {here} has no ahead-of-time plugins (they came with {first}); use --plugin library"
    if sm not in kernels.sms:
        return f"for {', '.join(f'sm_{value}' for value in kernels.sms)}; {REMEDY.format(sm=sm or '<board>')}"
    if kernels.graph_sha256 != graph_sha256:
        return f"compiled for another graph; {REMEDY.format(sm=sm)}"
    return None


def as_plugin(kernels: Kernels, machine: str) -> Plugin:
    """For reports: the list of kernels in the place of a library."""
    return Plugin(kernels.path, kernels.sha256, kernels.sms, ABI, machine, "kernels compiled ahead of time")


def register(trt: Any, trtp: Any, kernels: Kernels, sm: int) -> None:
    """Tell TensorRT of both operators; `trtp` is its module `tensorrt.plugin`. Once a process."""
    for op, names in INPUTS.items():
        name = f"jpq::{op}"
        given: dict[str, Any] = {key: int if key in ATTRIBUTES else trtp.TensorDesc for key in (*names, *ATTRIBUTES)}
        trtp.register(name)(_signed(describer(trt, trtp, op), given, trtp.TensorDesc))
        tuned = given | {"outputs": tuple[trtp.TensorDesc]}
        trtp.autotune(name)(_signed(tuner(trtp, op, kernels, sm), tuned, list[trtp.AutoTuneCombination]))
        launched = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]
        trtp.aot_impl(name)(_signed(launcher(trtp, op, kernels, sm), tuned | {"tactic": int}, launched))


def _signed(function: Callable[..., Any], parameters: dict[str, Any], returned: Any) -> Callable[..., Any]:
    """Give a function a signature for TensorRT, which knows no optional inputs: all. It takes fewer, too."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    listed = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    vars(function)["__signature__"] = inspect.Signature(listed, return_annotation=returned)
    return function


def describer(trt: Any, trtp: Any, op: str) -> Callable[..., Any]:
    """Function: inputs and attributes of a node -> its output's shape and type."""

    def describe(*tensors: Any, **attributes: int) -> Any:
        first = tensors[0]
        if op == "LowBitMatMul":
            return trtp.from_shape_expr((*list(first.shape_expr)[:-1], attributes["N"]), first.dtype)
        return trtp.from_shape_expr((*first.shape_expr, attributes["K"]), trt.float32)

    return describe


def tuner(trtp: Any, op: str, kernels: Kernels, sm: int) -> Callable[..., Any]:
    """Function: a node -> its kernels as tactics, which TensorRT times for each profile."""

    def tune(*given: Any) -> list[Any]:
        tensors, values, outputs = _split(given, 1)
        found = kernels.of(_layout(op, tensors, values), sm)
        types = [str(tensor.dtype.name) for tensor in (*tensors, *outputs[0])]
        if (types[0], types[-1]) != (("FLOAT" if op == "LowBitMatMul" else "INT64"), "FLOAT"):
            raise PluginError(f"jpq::{op}: {types[0]} in, {types[-1]} out: compiled for fp32; use --plugin library")
        return [trtp.AutoTuneCombination(",".join(TYPES.get(t, t) for t in types), "LINEAR", sorted(found))]

    return tune


def launcher(trtp: Any, op: str, kernels: Kernels, sm: int) -> Callable[..., Any]:
    """Function: a node and a tactic -> entry point, PTX, launch and scalars, symbolic where shapes are."""

    def launch(*given: Any) -> tuple[str, str, Any, Any]:
        tensors, values, (_, tactic) = _split(given, 2)
        kernel = kernels.of(_layout(op, tensors, values), sm)[tactic]
        known = quantities(op, list(tensors[0].shape_expr), values)
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = (_divided(trtp, known[q], by) for q, by in kernel.grid)
        launch.block_x, launch.shared_mem = kernel.threads, kernel.shared_bytes
        scalars = trtp.SymIntExprs(len(kernel.scalars))
        for i, name in enumerate(kernel.scalars):
            scalars[i] = trtp.SymInt32(known[name])
        return kernel.entry_point, kernel.ptx, launch, scalars

    return launch


def quantities(op: str, shape: list[Any], values: dict[str, int]) -> dict[str, Any]:
    """What grids and scalars are made of. `rows`: of X, or indices; symbolic where the shape varies."""
    counted = shape[:-1] if op == "LowBitMatMul" else shape
    groups = values["K"] // values["group_size"]
    return {
        "one": 1,
        "rows": reduce(mul, counted) if counted else 1,
        "N": values["N"],
        "K": values["K"],
        "bias_length": values["N"],
        "zero_row_bytes": row_bytes(groups, from_kernel_bits(values["bits"])),
    }


def _split(given: tuple[Any, ...], last: int) -> tuple[tuple[Any, ...], dict[str, int], tuple[Any, ...]]:
    """Inputs, attributes by name, and the `last` arguments of a call by TensorRT."""
    first = len(given) - last - len(ATTRIBUTES)
    return given[:first], dict(zip(ATTRIBUTES, given[first:-last], strict=True)), given[-last:]


def _layout(op: str, tensors: tuple[Any, ...], values: dict[str, int]) -> tuple[Any, ...]:
    symmetric = bool(values["symmetric"])
    return op, values["bits"], values["group_size"], symmetric, len(tensors) > (3 if symmetric else 4)


def _divided(trtp: Any, quantity: Any, by: int) -> Any:
    if isinstance(quantity, int):
        return -(-quantity // by)
    return quantity if by == 1 else trtp.cdiv(quantity, by)
