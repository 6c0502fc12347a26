"""How a peer stores a model, and the uniform layout that fills a byte budget: the same choice our own baselines get.

No peer here quantizes an embedding that is also the head, which alone would be 3.4 bits a weight of SmolLM2 in fp16. So
all of them get the table that our GPTQ baseline has, and every row is compared at the bytes of a whole file.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import gcd

from jpq_export.errors import BudgetError
from jpq_export.format.spec import ModelSpec
from jpq_export.numerics.scheme import Scheme, choose_group_size, row_bytes

GROUP_SIZES = (32, 64, 128)
TABLE_BITS = (2, 3, 4, 5, 6, 8)
LAYOUT = "layout.json"  # what a program chose
MODEL = "model.safetensors"  # in a peer's folder: all weights of the finished row, fp32


@dataclass(frozen=True, slots=True)
class Peer:
    """A quantizer: package, and what its format stores: zero points of 16 bits, or of the codes' own width (None).

    `binary_groups`: its kernels take groups of powers of two only. `program`: it is one, not a Python package, and
    mixes the types of a whole file by itself. `install`: what to do where it is missing.
    """

    package: str
    widths: tuple[int, ...]
    zero_bits: int | None
    iterations: int = 0
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
    "auto-round": Peer("auto-round", (2, 3, 4, 8), None, iterations=200),
    "gptqmodel": Peer("gptqmodel", (2, 3, 4, 8), None, binary_groups=True, install=GPTQMODEL),
    "llama.cpp": Peer("llama.cpp", (), None, program="llama-quantize", install="build llama.cpp"),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """One width and group size for all linears, a scheme for embedding and head, and the bytes of the whole file."""

    bits: int
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
    best: tuple[tuple[int, int], Layout] | None = None
    for bits, group, table_bits, table_group in product(peer.widths, GROUP_SIZES, TABLE_BITS, GROUP_SIZES):
        if table_bits < bits:
            continue
        table = Scheme(table_bits, choose_group_size(spec.hidden, table_group), symmetric=False)
        size = layout_bytes(spec, peer, bits, group, table)
        if size <= budget_bytes and (best is None or (bits, size) > best[0]):
            best = (bits, size), Layout(bits, group, table, size)
    if best is None:
        raise BudgetError(f"{peer.package}: no uniform layout fits {budget_bytes / 1e6:.2f} MB; ask for more bits")
    return best[1]


def layout_bytes(spec: ModelSpec, peer: Peer, bits: int, group: int, table: Scheme) -> int:
    """Codes, fp16 scales and zero points of every matrix, and fp32 vectors."""
    total = 4 * sum(spec.vectors().values())
    for name, (rows, columns) in spec.matrices().items():
        if name in ("embed", "head"):
            total += table.weight_bytes(rows, columns)
            continue
        groups = columns // peer.group_size(columns, group)
        zeros = row_bytes(groups, bits if peer.zero_bits is None else peer.zero_bits)
        total += rows * (row_bytes(columns, bits) + 2 * groups + zeros)
    return total
