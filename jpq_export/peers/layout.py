"""How a peer stores a model, and the uniform layout that fills a byte budget: the same choice our own baselines get.

No peer here quantizes an embedding that is also the head, which alone would be 3.4 bits a weight of SmolLM2 in fp16. So
all of them get the table that our GPTQ baseline has, and every row is compared at the bytes of a whole file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import gcd

from jpq_export.errors import BudgetError
from jpq_export.format.spec import ModelSpec
from jpq_export.numerics.scheme import Scheme, choose_group_size, row_bytes

GROUP_SIZES = (32, 64, 128)
TABLE_BITS = (2, 3, 4, 5, 6, 8)
TABLES = ("embed", "head")
LAYOUT = "layout.json"  # what a program chose
WIDTHS = "widths.json"  # what a mixed peer chose, by linear
MODEL = "model.safetensors"  # in a peer's folder: all weights of the finished row, fp32


@dataclass(frozen=True, slots=True)
class Peer:
    """A quantizer: package, and what its format stores: zero points of 16 bits, or of the codes' own width (None).

    `binary_groups`: its kernels take groups of powers of two only. `mixed`: it gives every linear a width of its own.
    `iterations`, `rate`: its training steps, and their size where it is not its default. `program`: it is one, not a
    Python package, and mixes the types of a whole file by itself. `install`: what to do where it is missing.
    """

    package: str
    widths: tuple[int, ...]
    zero_bits: int | None
    iterations: int = 0
    rate: float | None = None
    mixed: bool = False
    binary_groups: bool = False
    program: str | None = None
    install: str = "pip install 'jpq-export[peers]'"

    def group_size(self, columns: int, wanted: int) -> int:
        """The group of a matrix of so many columns."""
        return gcd(columns, wanted) if self.binary_groups else choose_group_size(columns, wanted)


# 7.7 asks for a newer torch than ours, and runs with 2.13
GPTQMODEL = "pip install --no-deps gptqmodel, then what its import misses"
PEERS = {
    "hqq": Peer("hqq", (2, 3, 4, 5, 6, 8), 16),
    "auto-round-rtn": Peer("auto-round", (2, 3, 4, 8), None),
    "auto-round-light": Peer("auto-round", (2, 3, 4, 8), None, iterations=50, rate=5e-3),  # its own preset of that name
    "auto-round": Peer("auto-round", (2, 3, 4, 8), None, iterations=200),
    "auto-scheme": Peer("auto-round", (2, 3, 4, 8), None, mixed=True),
    "auto-scheme-light": Peer("auto-round", (2, 3, 4, 8), None, iterations=50, rate=5e-3, mixed=True),
    "gptqmodel": Peer("gptqmodel", (2, 3, 4, 8), None, binary_groups=True, install=GPTQMODEL),
    "llama.cpp": Peer("llama.cpp", (), None, program="llama-quantize", install="build llama.cpp"),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """One width and group size for all linears, a scheme for embedding and head, and the bytes of the whole file.

    `bits` of a mixed peer: what a weight of the linears takes on average, scales and zero points included.
    """

    bits: float
    group_size: int
    table: Scheme
    bytes: int


@dataclass(frozen=True, slots=True)
class FileLayout:
    """What a program chose for a whole file: a preset of its own, the embedding's type where another one was needed."""

    preset: str
    table: str | None
    bytes: int


def layout_for(spec: ModelSpec, peer: Peer, budget_bytes: int) -> Layout:
    """The widest linears that fit, then the largest file; BudgetError when nothing fits."""
    if peer.mixed:
        return _mixed_layout(spec, peer, budget_bytes)
    best: tuple[tuple[int, int], Layout] | None = None
    for bits, group, table_bits, table_group in product(peer.widths, GROUP_SIZES, TABLE_BITS, GROUP_SIZES):
        if table_bits < bits:
            continue
        table = Scheme(table_bits, choose_group_size(spec.hidden, table_group), symmetric=False)
        size = layout_bytes(spec, peer, dict.fromkeys(spec.matrices(), bits), group, table)
        if size <= budget_bytes and (best is None or (bits, size) > best[0]):
            best = (bits, size), Layout(bits, group, table, size)
    if best is None:
        raise BudgetError(f"{peer.package}: no uniform layout fits {budget_bytes / 1e6:.2f} MB; ask for more bits")
    return best[1]


def _mixed_layout(spec: ModelSpec, peer: Peer, budget_bytes: int) -> Layout:
    """The table whose bits a weight are nearest to those that it leaves for the linears."""
    shapes = {name: shape for name, shape in spec.matrices().items() if name not in TABLES}
    tables = {name: shape for name, shape in spec.matrices().items() if name in TABLES}
    group_size = gcd(max(GROUP_SIZES), *(columns for _, columns in shapes.values()))  # one for all
    weights, table_weights = (sum(n * k for n, k in part.values()) for part in (shapes, tables))
    ends = min(peer.widths), max(peer.widths)
    least, most = (layout_bytes(spec, peer, dict.fromkeys(shapes, bits), group_size, None) for bits in ends)
    best: tuple[float, Layout] | None = None
    for bits, group in product(TABLE_BITS, GROUP_SIZES):
        table = Scheme(bits, choose_group_size(spec.hidden, group), symmetric=False)
        table_bytes = sum(table.weight_bytes(*shape) for shape in tables.values())
        room = budget_bytes - table_bytes
        if room < least:
            continue
        average = 8 * (min(room, most) - 4 * sum(spec.vectors().values())) / weights
        distance = abs(8 * table_bytes / table_weights - average)
        if best is None or distance < best[0]:
            best = distance, Layout(average, group_size, table, min(room, most) + table_bytes)
    if best is None:
        raise BudgetError(f"{peer.package}: no mixed layout fits {budget_bytes / 1e6:.2f} MB; ask for more bits")
    return best[1]


def layout_bytes(spec: ModelSpec, peer: Peer, widths: Mapping[str, int], group: int, table: Scheme | None) -> int:
    """Codes, fp16 scales and zero points of every linear, fp32 vectors; embedding and head unless `table` is None."""
    total = 4 * sum(spec.vectors().values())
    for name, (rows, columns) in spec.matrices().items():
        if name in TABLES:
            total += table.weight_bytes(rows, columns) if table else 0
            continue
        bits = widths[name]
        groups = columns // peer.group_size(columns, group)
        zeros = row_bytes(groups, bits if peer.zero_bits is None else peer.zero_bits)
        total += rows * (row_bytes(columns, bits) + 2 * groups + zeros)
    return total
