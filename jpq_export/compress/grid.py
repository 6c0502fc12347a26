"""The points that rows of a weight may be rounded to, in torch: what a scale multiplies, before the zero is taken off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from jpq_export.numerics.levels import MIDDLE, NORMAL_WIDTHS, normal_bytes
from jpq_export.numerics.row_blocks import RowLayout
from jpq_export.numerics.scheme import Scheme

FINE = 4  # places a unit for which the nearest level is known: a place off by an eighth of one changes nothing
PLACES = 256 * FINE


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Points of rows: the codes 0 to `top` [N]; where `table` is not negative [N], levels as bytes: those of that table.

    A stack of rows may mix widths.
    """

    top: Tensor
    table: Tensor | None = None

    @staticmethod
    def of(schemes: Sequence[tuple[Scheme, int]], device: torch.device) -> Grid:
        """Of rows that come in blocks: (scheme, rows)."""
        counts = torch.tensor([rows for _, rows in schemes])
        top = torch.tensor([float(s.max_code) for s, _ in schemes]).repeat_interleave(counts).to(device)
        if not any(s.normal for s, _ in schemes):
            return Grid(top)
        tables = torch.tensor([NORMAL_WIDTHS.index(int(s.bits)) if s.normal else -1 for s, _ in schemes])
        return Grid(top, tables.repeat_interleave(counts).to(device))

    def __getitem__(self, rows: slice | Tensor) -> Grid:
        """Of some rows."""
        return Grid(self.top[rows], None if self.table is None else self.table[rows])

    @staticmethod
    def over(top: Grid | Tensor) -> Grid:
        """Of the largest codes of rows [N] alone: evenly spaced; a Grid as it is."""
        return top if isinstance(top, Grid) else Grid(top)

    @staticmethod
    def joined(grids: Sequence[Grid]) -> Grid:
        """Of the rows of all, one after the other."""
        tables = None
        if any(grid.table is not None for grid in grids):
            tables = torch.cat([torch.full_like(g.top, -1).long() if g.table is None else g.table for g in grids])
        return Grid(torch.cat([grid.top for grid in grids]), tables)

    def __len__(self) -> int:
        """Rows."""
        return len(self.top)

    def split(self, rows: int) -> list[Grid]:
        """In parts of so many rows."""
        return [self[start : start + rows] for start in range(0, max(1, len(self)), rows)]

    @property
    def normal(self) -> Tensor:
        """Which rows have normal levels [N]."""
        return torch.zeros_like(self.top, dtype=torch.bool) if self.table is None else self.table >= 0

    def reach(self) -> Tensor:
        """How far the outermost point of a symmetric row is from the middle [N]."""
        if self.table is None:
            return self.top / 2
        outermost = torch.tensor([float(normal_bytes(bits)[-1]) - MIDDLE for bits in NORMAL_WIDTHS])
        return torch.where(self.normal, outermost.to(self.top.device)[self.table.clamp(min=0)], self.top / 2)

    def middle(self, *, integer_zero: bool) -> Tensor:
        """The zero of symmetric rows, in points [N]."""
        even = (self.top / 2).ceil() if integer_zero else self.top / 2
        return even if self.table is None else torch.where(self.normal, float(MIDDLE), even)

    def nearest(self, places: Tensor) -> Tensor:
        """The nearest point of each place; places [N] or [N, ...], in points."""
        shape = (-1,) + (1,) * (places.dim() - 1)
        even = torch.minimum(places.round().clamp_(min=0), self.top.view(shape))
        if self.table is None:
            return even
        at = (places * FINE).round_().clamp_(0, PLACES - 1).add_(self.table.clamp(min=0).view(shape) * PLACES)
        found = torch.index_select(_nearest_levels(places.device), 0, at.flatten().long()).view_as(places)
        normal = self.normal
        return found if bool(normal.all()) else torch.where(normal.view(shape), found, even)


@cache
def _nearest_levels(device: torch.device) -> Tensor:
    """The nearest level of every place, of all tables: float32 [tables * PLACES]."""
    places, out = np.arange(PLACES) / FINE, []
    for bits in NORMAL_WIDTHS:
        levels = normal_bytes(bits).astype(np.float32)
        out.append(levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, places)])
    return torch.from_numpy(np.concatenate(out)).to(device)


def grid_of(scheme: Scheme | RowLayout, rows: int, device: torch.device) -> Grid:
    """Of every row of a weight."""
    if not isinstance(scheme, RowLayout):
        return Grid.of([(scheme, rows)], device)
    grid = Grid.of(scheme.blocks, device)
    if scheme.order is None:
        return grid
    return grid[torch.argsort(torch.tensor(scheme.order)).to(device)]
