"""A weight whose output rows lie in blocks of their own widths: the record, its bytes, and back to numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from jpq_export.numerics.affine import QuantizedWeight, store
from jpq_export.numerics.scheme import Scheme


@dataclass(frozen=True, slots=True, eq=False)
class RowBlocks:
    """A weight [N, K]: `blocks` one below the other, all with one group size and kind of zero.

    positions: int32 [N], where each row of the weight lies among the stored ones; None when they lie in order.
    """

    blocks: tuple[QuantizedWeight, ...]
    positions: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Check: blocks that do not fit together or a wrong order are a ValueError."""
        if not self.blocks:
            raise ValueError("a weight in row blocks has at least one")
        kinds = {(b.shape[1], replace(b.scheme, bits=8, normal=False)) for b in self.blocks}
        if len(kinds) > 1:
            raise ValueError("blocks of one weight differ in columns, group size or kind of zero")
        if self.positions is not None:
            rows = np.arange(self.shape[0], dtype=np.int32)
            if self.positions.dtype != np.int32 or not np.array_equal(np.sort(self.positions), rows):
                raise ValueError(f"positions: expected int32, each of {len(rows)} rows once")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return sum(b.shape[0] for b in self.blocks), self.blocks[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes as stored, positions included."""
        return sum(b.nbytes for b in self.blocks) + (0 if self.positions is None else self.positions.nbytes)

    def _rows(self, parts: list[np.ndarray]) -> np.ndarray:
        joined = np.concatenate(parts)
        return joined if self.positions is None else joined[self.positions]

    def codes(self) -> np.ndarray:
        """Codes: uint8 [N, K]."""
        return self._rows([b.codes() for b in self.blocks])

    def points(self) -> np.ndarray:
        """Where codes stand: uint8 [N, K]."""
        return self._rows([b.points() for b in self.blocks])

    @property
    def scales(self) -> np.ndarray:
        """float16 [N, K/g]."""
        return self._rows([b.scales for b in self.blocks])

    def zero_points(self) -> np.ndarray:
        """Zero points in codes: float32 [N, K/g]."""
        return self._rows([b.zero_points() for b in self.blocks])

    def dequantize(self) -> np.ndarray:
        """The weight: float32 [N, K]."""
        return self._rows([b.dequantize() for b in self.blocks])

    def layout(self) -> RowLayout:
        """How its rows lie."""
        order = None if self.positions is None else tuple(int(row) for row in np.argsort(self.positions))
        return RowLayout(tuple((b.scheme, b.shape[0]) for b in self.blocks), order)


@dataclass(frozen=True, slots=True)
class RowLayout:
    """`blocks`: scheme and number of rows of each; `order`: the weight's row at each stored place, None = in order."""

    blocks: tuple[tuple[Scheme, int], ...]
    order: tuple[int, ...] | None = None

    @property
    def kind(self) -> Scheme:
        """A scheme with the group size and kind of zero of all blocks."""
        return self.blocks[0][0]

    def max_codes(self) -> np.ndarray:
        """The largest code of every row of the weight: float32 [N]."""
        stored = np.repeat([float(s.max_code) for s, _ in self.blocks], [n for _, n in self.blocks])
        out = stored.astype(np.float32)
        if self.order is not None:
            out[list(self.order)] = stored
        return out

    def weight_bytes(self, columns: int) -> int:
        """Bytes of the weight as stored."""
        order = 0 if self.order is None else 4 * len(self.order)
        return sum(scheme.weight_bytes(rows, columns) for scheme, rows in self.blocks) + order

    def store(self, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None) -> RowBlocks:
        """Pack codes uint8 [N, K], scales [N, K/g] and integer zeros uint8 [N, K/g], each in the weight's row order."""
        order = np.arange(len(codes)) if self.order is None else np.array(self.order)
        out, start = [], 0
        for scheme, rows in self.blocks:
            at = order[start : start + rows]
            out.append(store(codes[at], scales[at], None if zeros is None else zeros[at], scheme))
            start += rows
        return RowBlocks(tuple(out), None if self.order is None else np.argsort(order).astype(np.int32))


StoredWeight = QuantizedWeight | RowBlocks


def layout_of(weight: StoredWeight) -> Scheme | RowLayout:
    """How a stored weight is stored."""
    return weight.layout() if isinstance(weight, RowBlocks) else weight.scheme
