"""The points that rows of a weight may be rounded to, in torch: what a scale multiplies, the zero not yet taken off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from jpq_export.numerics.levels import MIDDLE, NORMAL_WIDTHS, normal_bytes, normal_levels
from jpq_export.numerics.row_blocks import RowLayout
from jpq_export.numerics.scheme import Scheme

FINE = 2  # cells a unit: points are integers, so that all of a cell is nearest to one of them
CELLS = 256 * FINE
EVEN_TOPS = (1, 2, 3, 7, 15, 31, 63, 255)  # largest codes of evenly spaced points; tables of normal levels follow


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Points of rows: the codes 0 to `top` [N]; or levels as bytes, where `table` [N] (of `_nearest_points`) says so.

    A stack of rows may mix both. Without `table` all are evenly spaced.
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
        tables = torch.tensor([_table_of(s) for s, _ in schemes]).repeat_interleave(counts)
        return Grid(top, tables.to(device))

    @staticmethod
    def over(top: Grid | Tensor) -> Grid:
        """Of the largest codes of rows [N] alone: evenly spaced; a Grid as it is."""
        return top if isinstance(top, Grid) else Grid(top)

    @staticmethod
    def joined(grids: Sequence[Grid]) -> Grid:
        """Of the rows of all, one after the other."""
        top = torch.cat([grid.top for grid in grids])
        if all(grid.table is None for grid in grids):
            return Grid(top)
        return Grid(top, torch.cat([grid._tables() for grid in grids]))

    def __getitem__(self, rows: slice | Tensor | tuple[slice, slice]) -> Grid:
        """Of some rows."""
        return Grid(self.top[rows], None if self.table is None else self.table[rows])

    def __len__(self) -> int:
        """Rows."""
        return len(self.top)

    def split(self, rows: int) -> list[Grid]:
        """In parts of so many rows."""
        return [self[start : start + rows] for start in range(0, max(1, len(self)), rows)]

    def view(self, *shape: int) -> Grid:
        """Rows in a shape of their own, [N] or more dimensions."""
        return Grid(self.top.view(shape), None if self.table is None else self.table.view(shape))

    def _tables(self) -> Tensor:
        """The table of every row, also where all are evenly spaced [N]."""
        if self.table is not None:
            return self.table
        return torch.bucketize(self.top, torch.tensor(EVEN_TOPS, dtype=self.top.dtype, device=self.top.device))

    @property
    def normal(self) -> Tensor:
        """Which rows have normal levels [N]."""
        return torch.zeros_like(self.top, dtype=torch.bool) if self.table is None else self.table >= len(EVEN_TOPS)

    def reach(self) -> Tensor:
        """How far the outermost point of a symmetric row is from the middle [N]."""
        if self.table is None:
            return self.top / 2
        outermost = [top / 2 for top in EVEN_TOPS] + [float(normal_levels(bits)[-1]) for bits in NORMAL_WIDTHS]
        return torch.tensor(outermost, device=self.top.device)[self.table]

    def middle(self, *, integer_zero: bool) -> Tensor:
        """The zero of symmetric rows, in points [N]."""
        even = (self.top / 2).ceil() if integer_zero else self.top / 2
        return even if self.table is None else torch.where(self.normal, float(MIDDLE), even)

    def nearest(self) -> Callable[[Tensor], Tensor]:
        """What finds the nearest point of each place [N] or [N, ...], in points; it may overwrite the places."""
        if self.table is None:
            return lambda places: torch.minimum(places.round_().clamp_(min=0), _beside(self.top, places))
        first = self.table.to(torch.float32) * CELLS
        points = _nearest_points(self.top.device)

        def look_up(places: Tensor) -> Tensor:
            at = torch.add(_beside(first, places), places.clamp_(0, 256 - 0.5 / FINE), alpha=FINE).int()
            return torch.index_select(points, 0, at.view(-1)).view_as(places)

        return look_up


def _beside(rows: Tensor, places: Tensor) -> Tensor:
    """[N] as [N, 1, ...]."""
    return rows.view(rows.shape + (1,) * (places.dim() - rows.dim()))


def _table_of(scheme: Scheme) -> int:
    """Which of the tables."""
    if scheme.normal:
        return len(EVEN_TOPS) + NORMAL_WIDTHS.index(int(scheme.bits))
    return EVEN_TOPS.index(scheme.max_code)


@cache
def _nearest_points(device: torch.device) -> Tensor:
    """The nearest point of every cell, of all tables: float32 [tables * CELLS]."""
    places = (np.arange(CELLS) + 0.5) / FINE
    kinds = [np.arange(top + 1) for top in EVEN_TOPS] + [normal_bytes(bits) for bits in NORMAL_WIDTHS]
    out = []
    for points in (kind.astype(np.float32) for kind in kinds):
        out.append(points[np.searchsorted((points[1:] + points[:-1]) / 2, places)])
    return torch.from_numpy(np.concatenate(out)).to(device)


def grid_of(scheme: Scheme | RowLayout, rows: int, device: torch.device) -> Grid:
    """Of every row of a weight."""
    if not isinstance(scheme, RowLayout):
        return Grid.of([(scheme, rows)], device)
    grid = Grid.of(scheme.blocks, device)
    if scheme.order is None:
        return grid
    return grid[torch.argsort(torch.tensor(scheme.order)).to(device)]
