"""Which kernels there are to compile ahead of time: one `Variant` for each weight layout, type of X and tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jpq_export.numerics.scheme import KERNEL_NORMAL, KERNEL_TERNARY, KERNEL_WIDTHS
from jpq_kernels.low_bit_gather import GATHER_WARPS, gather_kernel, gather_units
from jpq_kernels.low_bit_matmul import (
    ADD_SPLITS_BLOCK,
    FP16_DOT_FROM,
    MANY_ROWS_TILES,
    FewRowsTile,
    ManyRowsTile,
    add_splits_kernel,
    block_units,
    constants_of,
    few_rows_kernel,
    few_rows_tiles,
    group_blocks,
    many_rows_kernel,
)
from jpq_kernels.weight import Layout, layout_of

WIDTHS = KERNEL_WIDTHS
GROUP_SIZES = (32, 64, 128)
X_TYPES = ("fp16", "fp32")
X_BYTES = {"fp16": 2, "fp32": 4}
POINTERS = frozenset({"x", "scales", "zeros", "bias", "out", "workspace", "indices"})


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel with its constants: all that fixes its code but the device.

    `arguments`: name -> Triton type, in order; `aligned`: those that must be multiples of 16 (pointers: of 16 bytes);
    `grid`: three expressions in the arguments and `rows`, `count`, `splits`; `meaning`: what it computes, for people
    and for whoever chooses among the kernels.
    """

    name: str
    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, int | bool]
    aligned: frozenset[str]
    num_warps: int
    num_stages: int
    grid: tuple[str, str, str]
    meaning: dict[str, Any]


def variants(
    *,
    bits: Sequence[int] = WIDTHS,
    group_sizes: Sequence[int] = GROUP_SIZES,
    x_types: Sequence[str] = X_TYPES,
    zero_points: Sequence[str] = ("symmetric", "asymmetric"),
) -> Iterator[Variant]:
    """Every kernel a weight of these layouts may need. Gather's outputs have the types of X."""
    for x_type in x_types:
        yield add_splits(x_type)
        for b in bits:
            for group_size in group_sizes:
                for zero_point in zero_points:
                    if b > KERNEL_NORMAL and zero_point != "symmetric":
                        continue  # normal levels have no zero points
                    layout = layout_of(b, group_size, symmetric=zero_point == "symmetric")
                    yield from of_layout(layout, x_type)


def of_layout(layout: Layout, x_type: str) -> Iterator[Variant]:
    """The kernels of one layout: the tiles `plan` may choose for this type of X, and the gather."""
    for few in few_rows_tiles(layout.bits):
        if x_type == "fp32" or few.rows < FP16_DOT_FROM:
            yield few_rows(layout, x_type, few)
    for many in MANY_ROWS_TILES:
        if x_type == "fp16" or many is not MANY_ROWS_TILES[0]:
            yield many_rows(layout, x_type, many)
    yield gather(layout, x_type)


def suffix(layout: Layout, x_type: str) -> str:
    """The part of a name that says the layout: `b4_g64_sym_fp16`, `ternary_g64_sym_fp16`, `normal4_g64_sym_fp16`."""
    width = "ternary" if layout.bits == KERNEL_TERNARY else f"b{layout.bits}"
    width = f"normal{layout.bits - KERNEL_NORMAL}" if layout.bits > KERNEL_NORMAL else width
    return f"{width}_g{layout.group_size}_{'sym' if layout.symmetric else 'asym'}_{x_type}"


def aligned(layout: Layout) -> frozenset[str]:
    """Arguments that may be taken for multiples of 16: pointers but `packed`, and K where the groups make it one."""
    return POINTERS | {"K"} if layout.group_size % 16 == 0 else POINTERS


def arguments(kernel: Any, layout: Layout | None, types: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    """Types of a kernel's run-time arguments, in its order."""
    elements = "*i32" if layout is None or layout.unit.element_bits == 32 else "*u8"
    known = {"packed": elements, "scales": "*fp16", "zeros": "*u8", "bias": "*fp32", "workspace": "*fp32"} | types
    return {name: known.get(name, "i32") for name in kernel.arg_names if name not in constants}


def few_rows(layout: Layout, x_type: str, tile: FewRowsTile) -> Variant:
    """`few_rows_kernel` for one tile."""
    constants = constants_of(layout, tile, X_BYTES[x_type])
    return Variant(
        name=f"few_rows_{tile.rows}_{suffix(layout, x_type)}",
        kernel=few_rows_kernel,
        arguments=arguments(few_rows_kernel, layout, {"x": f"*{x_type}", "out": f"*{x_type}"}, constants),
        constants=constants,
        aligned=aligned(layout),
        num_warps=tile.num_warps,
        num_stages=3,
        grid=(f"ceil(N / {tile.block_n})", "splits", f"ceil(rows / {tile.rows})"),
        meaning={"op": "LowBitMatMul", "x": x_type, "block_rows": tile.rows}
        | {"split_units": f"ceil(K / {layout.unit.codes} / splits)"},
    )


def many_rows(layout: Layout, x_type: str, tile: ManyRowsTile) -> Variant:
    """`many_rows_kernel` for one tile."""
    constants = constants_of(layout, tile, X_BYTES[x_type])
    blocks = group_blocks(layout, tile, X_BYTES[x_type])
    units = block_units(layout, tile, X_BYTES[x_type])
    return Variant(
        name=f"many_rows_{tile.block_m}_{suffix(layout, x_type)}",
        kernel=many_rows_kernel,
        arguments=arguments(many_rows_kernel, layout, {"x": f"*{x_type}", "out": f"*{x_type}"}, constants),
        constants=constants,
        aligned=aligned(layout) | {"packed"},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        grid=(f"ceil(N / {tile.block_n})", f"ceil(rows / {tile.block_m})", "splits"),
        meaning={"op": "LowBitMatMul", "x": x_type, "block_codes": units * layout.unit.codes}
        | {"split_blocks": f"ceil(K / {layout.group_size} * {blocks} / splits)"},
    )


def gather(layout: Layout, out_type: str) -> Variant:
    """`gather_kernel` writing `out_type`."""
    units = gather_units(layout.unit.codes)
    constants = layout.constants() | {"BLOCK_UNITS": units}
    return Variant(
        name=f"gather_{suffix(layout, out_type)}",
        kernel=gather_kernel,
        arguments=arguments(gather_kernel, layout, {"indices": "*i64", "out": f"*{out_type}"}, constants),
        constants=constants,
        aligned=aligned(layout) | {"packed"},
        num_warps=GATHER_WARPS,
        num_stages=3,
        grid=("count", f"ceil(K / {units * layout.unit.codes})", "1"),
        meaning={"op": "LowBitGather", "out": out_type},
    )


def add_splits(out_type: str) -> Variant:
    """`add_splits_kernel` writing `out_type`."""
    constants = {"BLOCK": ADD_SPLITS_BLOCK}
    return Variant(
        name=f"add_splits_{out_type}",
        kernel=add_splits_kernel,
        arguments=arguments(add_splits_kernel, None, {"out": f"*{out_type}"}, constants),
        constants=constants,
        aligned=POINTERS,
        num_warps=4,
        num_stages=3,
        grid=(f"ceil(count / {ADD_SPLITS_BLOCK})", "1", "1"),
        meaning={"op": "sum of the splits", "out": out_type},
    )
