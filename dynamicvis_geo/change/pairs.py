"""Places that two outputs have in common, and their vectors at both dates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray

from dynamicvis_geo.errors import SourceError, SpecError
from dynamicvis_geo.formats.base import spread
from dynamicvis_geo.time_window import TimeWindow

if TYPE_CHECKING:
    from dynamicvis_geo.change.scores import Pair
    from dynamicvis_geo.outputs import Output

Ints = NDArray[np.int64]
Vectors = NDArray[np.float32]
Flags = NDArray[np.bool_]

_BOUNDS = ['minx', 'miny', 'maxx', 'maxy']
#: Corners that differ by less than this share of a chip's width are the same.
_ALIKE = 1e-5
#: Vectors that are read at a time; where rows have another order at the other date,
#: each piece takes a reading of the file, and few pieces are better than little memory.
_PIECE_BYTES, _LARGE_PIECE_BYTES = 2**24, 2**28
#: Feature maps that a sample of cells is taken from, at most.
_SAMPLED_MAPS = 256


def match_places(before: Output, after: Output) -> tuple[Ints, Ints]:
    """Find the chips that two outputs have in common.

    They have the same CRS and bounds and, where both know of points, the same point.
    Where one does not know its bounds, they have the same point, or else the same id.

    Args:
        before: An output; places that it has several times are paired in their order.
        after: Another.

    Returns:
        Rows of *before* and of *after*, in the order of *before*.

    Raises:
        SpecError: If a place has several dates in one of them, or there is none.
    """
    tables = _keys(before.chips, after.chips)
    for output, keys in zip((before, after), tables, strict=True):
        _refuse_dates(output, keys)
        # What is there several times is paired in its order, not each with each.
        keys.insert(0, 'repeat', keys.groupby([*keys.columns[:-1]]).cumcount())
    both = tables[0].merge(tables[1], on=[*tables[0].columns[:-1]], sort=False)
    both = both.sort_values(['row_x', 'row_y'])
    if not len(both):
        one, other = before.chips['id'].iloc[0], after.chips['id'].iloc[0]
        raise SpecError(
            f'{before.path} and {after.path} have no place in common: their chips, '
            f'such as {one} and {other}, differ in point, CRS or bounds. Embed the '
            'same points, or the same area with the same size of chips, for both dates'
        )
    return both['row_x'].to_numpy(np.int64), both['row_y'].to_numpy(np.int64)


def _keys(
    before: gpd.GeoDataFrame, after: gpd.GeoDataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return what tells places apart, and the number of each row, of two tables."""
    tables = before, after
    names = ['point_id'] if all('point_id' in table for table in tables) else []
    bounded = all(table[_BOUNDS].notna().all(axis=None) for table in tables)
    if not (names or bounded):
        names = ['id']
    found = []
    for table in tables:
        keys = table[names].astype(str).reset_index(drop=True)
        if bounded:
            bounds = table[_BOUNDS].to_numpy(np.float64)
            width = bounds[:, 2] - bounds[:, 0]
            keys['crs'] = table['crs'].astype(str).to_numpy()
            keys['width'] = width.astype(np.float32)
            sides = (bounds / (_ALIKE * width[:, None])).round().astype(np.int64)
            keys[_BOUNDS] = sides
        found.append(keys.assign(row=np.arange(len(keys))))
    return found[0], found[1]


def _refuse_dates(output: Output, keys: pd.DataFrame) -> None:
    """Refuse places that have several time windows."""
    names = [*keys.columns[:-1]]
    times = output.chips[['start', 'end']].reset_index(drop=True)
    dated = pd.concat([keys[names], times], axis=1).drop_duplicates()
    several = int(dated[names].duplicated().sum())
    if several:
        raise SpecError(
            f'{output.path} has several dates of the same place: '
            f'{", ".join(windows_of(output.chips))}. Choose one for each side with '
            "before='START/END' and after='START/END'"
        )


def windows_of(chips: pd.DataFrame) -> list[str]:
    """List the time windows of chips as START/END, the earliest first.

    Args:
        chips: With ``start`` and ``end``.
    """
    pairs = chips[['start', 'end']].drop_duplicates().sort_values(['start', 'end'])
    return [window_text(start, end) for start, end in pairs.itertuples(index=False)]


def window_text(start: pd.Timestamp, end: pd.Timestamp) -> str:
    """Write a time window as START/END.

    Args:
        start: First moment; NaT for no limit.
        end: Last moment.
    """
    window = TimeWindow.closed(start, end)
    return '/'.join(window.milliseconds) if window.is_limited else 'no date'


@dataclass(frozen=True)
class PooledPairs:
    """Rows of pooled embeddings.

    Attributes:
        before: An output.
        after: Another, or the same.
        rows: Of each, the rows that belong together.
    """

    before: Output
    after: Output
    rows: tuple[Ints, Ints]

    def __iter__(self) -> Iterator[Pair]:
        yield from self._read(np.arange(len(self.rows[0])))

    def sample(self, most: int) -> Iterator[Pair]:
        """Yield the vectors of some places, at even distances.

        Args:
            most: Number of places.
        """
        yield from self._read(spread(len(self.rows[0]), most))

    def _read(self, places: Ints) -> Iterator[Pair]:
        one, other = _Rows(self.before), _Rows(self.after)
        ordered = all((np.diff(rows[places]) >= 0).all() for rows in self.rows)
        most = _PIECE_BYTES if ordered else _LARGE_PIECE_BYTES
        step = max(1, most // (4 * max(1, self.before.dimensions)))
        for first in range(0, len(places), step):
            some = places[first : first + step]
            yield one.take(self.rows[0][some]), other.take(self.rows[1][some])


class _Rows:
    """Reads vectors front to back, and from the front again for rows that lie behind.

    Rows in the order of the file take one reading; others one for each piece.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._rewind()

    def take(self, rows: Ints) -> Vectors:
        """Read some rows, in any order: float32 ``[n, D]``."""
        found = np.empty((len(rows), self._output.dimensions), np.float32)
        if rows.min() < self._first:
            self._rewind()
        last = rows.max()
        while True:
            place = rows - self._first
            here = (place >= 0) & (place < len(self._block))
            found[here] = self._block[place[here]]
            if last < self._first + len(self._block):
                return found
            self._next()

    def _rewind(self) -> None:
        self._blocks = self._output.format.read_vectors(self._output.path)
        self._first = 0
        self._block: Vectors = np.empty((0, self._output.dimensions), np.float32)

    def _next(self) -> None:
        self._first += len(self._block)
        self._block = next(self._blocks)
        if self._block.shape[1] != self._output.dimensions:
            raise SourceError(
                f'{self._output.path}: its files have embeddings of '
                f'{self._output.dimensions} and of {self._block.shape[1]} numbers: '
                'keep those of one model in a folder'
            )


@dataclass(frozen=True)
class CellPairs:
    """Cells of feature maps, chip by chip.

    Attributes:
        before: An output.
        after: Another, or the same.
        rows: Of each, the chips that belong together.
        cells: Of each such chip, the cells to read: bool ``[h * w]``, along the rows.
    """

    before: Output
    after: Output
    rows: tuple[Ints, Ints]
    cells: list[Flags]

    def __iter__(self) -> Iterator[Pair]:
        yield from self._read(np.arange(len(self.cells)))

    def sample(self, most: int) -> Iterator[Pair]:
        """Yield the vectors of some cells, at even distances.

        Args:
            most: Number of cells.
        """
        chips = spread(len(self.cells), _SAMPLED_MAPS)
        for before, after in self._read(chips):
            some = spread(len(before), -(-most // len(chips)))
            yield before[some], after[some]

    def _read(self, chips: Ints) -> Iterator[Pair]:
        one = self.before.maps(self.before.chips.iloc[self.rows[0][chips]])
        other = self.after.maps(self.after.chips.iloc[self.rows[1][chips]])
        for chip, before, after in zip(chips, one, other, strict=True):
            if before.shape != after.shape:
                name = self.after.chips['id'].iloc[self.rows[1][chip]]
                raise SpecError(
                    f'the feature maps of {name} are {before.shape} in '
                    f'{self.before.path} and {after.shape} in {self.after.path}: embed '
                    'one of them again with the settings of the other'
                )
            cells = self.cells[chip]
            yield _of_cells(before, cells), _of_cells(after, cells)


def _of_cells(maps: Vectors, cells: Flags) -> Vectors:
    return maps.reshape(len(maps), -1).T[cells]


def own_cells(chips: pd.DataFrame) -> list[Flags]:
    """Find the cells of each chip that are of no nearer chip.

    Where chips overlap, a cell is of the one whose centre is nearest, then of the
    northernmost, then of the westernmost, as in mosaics.

    Args:
        chips: ``crs``, ``minx`` to ``maxy``, ``height`` and ``width`` (cells).

    Returns:
        bool ``[h * w]`` each, along the rows.
    """
    sizes = chips[['height', 'width']].to_numpy(np.int64)
    own = [np.ones(height * width, np.bool_) for height, width in sizes]
    bounds = chips[_BOUNDS].to_numpy(np.float64)
    for rows in chips.groupby('crs').indices.values():
        for i, j in _overlapping(bounds[rows], sizes[rows]):
            one, other = rows[i], rows[j]
            x, y = cell_centres(bounds[one], sizes[one])
            own[one] &= ~_is_nearer(x, y, bounds[other], bounds[one], sizes[one])
    return own


def _overlapping(bounds: NDArray[np.float64], sizes: Ints) -> Ints:
    """Return pairs of chips that share more than a bit of a cell, ``[n, 2]``."""
    pairs = shapely.STRtree(shapely.box(*bounds.T)).query(shapely.box(*bounds.T)).T
    one, other = bounds[pairs[:, 0]], bounds[pairs[:, 1]]
    shared = np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2])
    cell = (one[:, 2:] - one[:, :2]) / sizes[pairs[:, 0]][:, ::-1]
    apart = pairs[:, 0] != pairs[:, 1]
    found: Ints = pairs[(shared > 0.01 * cell).all(axis=1) & apart]
    return found


def cell_centres(
    bounds: NDArray[np.float64], size: Ints
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the centres of the cells of a chip, along the rows from the north.

    Args:
        bounds: West, south, east and north.
        size: Rows and columns.
    """
    west, south, east, north = bounds
    height, width = size
    x = west + (np.arange(width) + 0.5) * (east - west) / width
    y = north - (np.arange(height) + 0.5) * (north - south) / height
    across, down = np.meshgrid(x, y)
    return across.ravel(), down.ravel()


def _is_nearer(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    other: NDArray[np.float64],
    own: NDArray[np.float64],
    size: Ints,
) -> Flags:
    """Tell which places lie in another chip, and before their own one there."""
    inside = (x > other[0]) & (x < other[2]) & (y > other[1]) & (y < other[3])
    cell = (own[2] - own[0]) / size[1]
    # In parts of a cell that rounding does not change.
    away, here = (
        (np.hypot(x - b[[0, 2]].mean(), y - b[[1, 3]].mean()) / cell).round(6)
        for b in (other, own)
    )
    first = (-other[3], other[0]) < (-own[3], own[0])
    nearer: Flags = inside & ((away < here) | ((away == here) & first))
    return nearer
