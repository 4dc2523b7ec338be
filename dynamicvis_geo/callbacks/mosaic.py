"""Where the feature maps of a grid of chips lie in one array."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dynamicvis_geo.datasets.chip_table import CHIP
from dynamicvis_geo.errors import OutputError

Ints = NDArray[np.int64]
Window = tuple[int, int]
Shard = tuple[int, int, int]

#: A time that is not limited: chips whose window has no start, or no end. It is what
#: NumPy and xarray read as NaT.
OPEN = int(np.iinfo(np.int64).min)

#: Deviations below this share of a pixel are rounding, not geometry.
TOLERANCE = 1e-3

#: Bytes of a chunk, which is read as a whole, and of a shard, which is one file.
CHUNK_BYTES = (256 * 2**10, 8 * 2**20)
SHARD_BYTES = 64 * 2**20

_INSTEAD = (
    "write one GeoTIFF a chip instead (format='geotiff', a folder whose name does not "
    'end in .zarr)'
)


def open_times(chips: NDArray[np.void]) -> NDArray[np.void]:
    """Return a copy of chips in which times without limit are :data:`OPEN`."""
    chips = chips.copy()
    chips['start'][chips['start'] == pd.Timestamp.min.value] = OPEN
    chips['end'][chips['end'] == pd.Timestamp.max.value] = OPEN
    return chips


@dataclass(frozen=True)
class ChipGrid:
    """The pixel lattice that all chips of one CRS share.

    Attributes:
        crs: Name of the CRS, for errors.
        x: Easting of the westernmost corner.
        y: Northing of the northernmost corner.
        size: Height and width of a chip in pixels.
        resolution: Height and width of a pixel in CRS units.
        step: Pixels, down and across, of which all distances between corners are
            multiples; the size of a chip where there is no distance.
    """

    crs: str
    x: float
    y: float
    size: tuple[int, int]
    resolution: tuple[float, float]
    step: tuple[int, int]

    @classmethod
    def of(cls, crs: str, chips: NDArray[np.void]) -> ChipGrid:
        """Return the lattice of chips, at least one.

        Raises:
            OutputError: If the chips differ in size or resolution, or do not lie whole
                pixels apart.
        """
        first = chips[0]
        height, width = int(first['height']), int(first['width'])
        yres, xres = float(first['yres']), float(first['xres'])
        different = (
            (chips['height'] != height)
            | (chips['width'] != width)
            # Rounding must not add up to a visible part of a pixel across a chip.
            | (np.abs(chips['yres'] - yres) * height > TOLERANCE * yres)
            | (np.abs(chips['xres'] - xres) * width > TOLERANCE * xres)
        )
        if different.any():
            two = _size_text(first), _size_text(chips[different][0])
            raise OutputError(
                f'the chips in {crs} have different sizes or resolutions ({two[0]} and '
                f'{two[1]}), but one Zarr array has one grid: give each its own '
                f'output, or {_INSTEAD}'
            )
        grid = cls(
            crs,
            float(chips['x'].min()),
            float(chips['y'].max()),
            (height, width),
            (yres, xres),
            (height, width),
        )
        offsets = grid.offsets(chips)
        down, across = (int(np.gcd.reduce(axis)) for axis in offsets.T)
        step = down or height, across or width
        return cls(crs, grid.x, grid.y, grid.size, grid.resolution, step)

    def offsets(self, chips: NDArray[np.void]) -> Ints:
        """Return how many pixels south and east of the corner chips begin, ``[n, 2]``.

        Raises:
            OutputError: If they are not whole numbers.
        """
        yres, xres = self.resolution
        exact = np.stack(
            [(self.y - chips['y']) / yres, (chips['x'] - self.x) / xres], axis=1
        )
        offsets: Ints = np.round(exact).astype(np.int64)
        off = (np.abs(exact - offsets) > TOLERANCE).any(axis=1)
        if off.any():
            wrong = chips[off][0]
            raise OutputError(
                f'the chips in {self.crs} do not lie on one grid of pixels: the corner '
                f'({wrong["x"]:.10g}, {wrong["y"]:.10g}) is not a whole number of '
                f'pixels from ({self.x:.10g}, {self.y:.10g}), so that one Zarr array '
                f'cannot hold both; {_INSTEAD}'
            )
        return offsets

    def check_points(self) -> None:
        """Refuse chips around points that share no cells, whatever the feature map.

        Raises:
            OutputError: If cells would have to be as small as pixels.
        """
        for size, step in zip(self.size, self.step, strict=True):
            if size > 1 and math.gcd(size, step) == 1:
                raise OutputError(
                    f'the chips in {self.crs} lie around points, {step} pixels or '
                    f'multiples of that apart, and so share no grid of feature cells '
                    f'for one Zarr array: {_INSTEAD}'
                )

    def check_cells(self, cells: tuple[int, int]) -> None:
        """Check that chips lie whole cells apart.

        Args:
            cells: Rows and columns of the feature map of a chip.

        Raises:
            OutputError: If they do not.
        """
        names = ('height', 'vertical'), ('width', 'horizontal')
        for (side, direction), size, step, count in zip(
            names, self.size, self.step, cells, strict=True
        ):
            if step * count % size == 0:
                continue
            unit = size // math.gcd(size, count)
            near = max(1, round(step / unit)) * unit
            raise OutputError(
                f'the chips in {self.crs} do not share a grid of feature cells: their '
                f'{side} is {size} pixels for {count} cells of {size / count:.6g} '
                f'pixels, and they lie {step} pixels apart, which is '
                f'{step * count / size:.6g} cells. A {direction} stride that is a '
                f'multiple of {unit} pixels, such as {near}, makes one array (so does '
                f'a stride as large as the chip); for chips at any place, as around '
                f'points, {_INSTEAD}'
            )


@dataclass(frozen=True)
class Layout:
    """One array of feature maps: its place, its axes and how it is cut into files.

    Cells are counted from the north-west corner, southwards and eastwards.

    Attributes:
        x: Easting of the west edge.
        y: Northing of the north edge.
        size: Height and width of a chip in pixels.
        resolution: Height and width of a pixel in CRS units.
        map_size: Rows and columns of the feature map of a chip.
        dimensions: Length of an embedding.
        dtype: Type of the values.
        rows: Number of cells from north to south.
        columns: Number of cells from west to east.
        times: Start and end of each time window in nanoseconds, or :data:`OPEN`.
        chunk: Rows and columns of a chunk.
        shard: Rows and columns of a shard, multiples of those of a chunk.
    """

    x: float
    y: float
    size: tuple[int, int]
    resolution: tuple[float, float]
    map_size: tuple[int, int]
    dimensions: int
    dtype: str
    rows: int
    columns: int
    times: tuple[Window, ...]
    chunk: tuple[int, int]
    shard: tuple[int, int]

    @classmethod
    def plan(
        cls,
        grid: ChipGrid,
        chips: NDArray[np.void],
        maps: tuple[int, int, int],
        dtype: str,
        existing: Layout | None = None,
    ) -> Layout:
        """Lay out an array that holds chips, and what an existing array holds.

        Args:
            grid: Lattice of *chips* and of the existing array.
            chips: The chips.
            maps: ``(D, h, w)``, the shape of the feature map of a chip.
            dtype: Type of the values.
            existing: The array that is there already.

        Returns:
            The layout; *existing* itself if all chips have their place in it.

        Raises:
            OutputError: If the feature maps do not fit together.
        """
        dimensions, *map_size = maps
        height, width = map_size
        grid.check_cells((height, width))
        corners = grid.offsets(chips) * map_size // grid.size
        times = {(int(a), int(b)) for a, b in np.unique(chips[['start', 'end']])}
        low, high = corners.min(axis=0), corners.max(axis=0) + map_size
        if existing is not None:
            existing.check_same(grid.crs, maps, dtype)
            corner = grid.offsets(existing.corner)[0] * map_size // grid.size
            extent = (existing.rows, existing.columns)
            inside = (low >= corner).all() and (high <= corner + extent).all()
            if inside and times <= set(existing.times):
                return existing
            low, high = np.minimum(low, corner), np.maximum(high, corner + extent)
            times |= set(existing.times)
        rows, columns = (high - low).tolist()
        step = tuple(
            across * count // size
            for across, count, size in zip(grid.step, map_size, grid.size, strict=True)
        )
        cell_bytes = dimensions * np.dtype(dtype).itemsize
        chunk = _chunk(step, (height, width), cell_bytes)
        cell = [
            res * size / count
            for res, size, count in zip(
                grid.resolution, grid.size, map_size, strict=True
            )
        ]
        return cls(
            x=grid.x + float(low[1]) * cell[1],
            y=grid.y - float(low[0]) * cell[0],
            size=grid.size,
            resolution=grid.resolution,
            map_size=(height, width),
            dimensions=dimensions,
            dtype=dtype,
            rows=rows,
            columns=columns,
            times=tuple(sorted(times)),
            chunk=chunk,
            shard=_shard(chunk, (rows, columns), cell_bytes),
        )

    @property
    def cell(self) -> tuple[float, float]:
        """Height and width of a cell in CRS units."""
        (yres, xres), (height, width) = self.resolution, self.size
        return yres * height / self.map_size[0], xres * width / self.map_size[1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the array: time, embedding, y, x."""
        return len(self.times), self.dimensions, self.rows, self.columns

    @property
    def corner(self) -> NDArray[np.void]:
        """The north-west corner as if a chip were there, ``[1]``."""
        chip = np.zeros(1, CHIP)
        chip['x'], chip['y'] = self.x, self.y
        chip['height'], chip['width'] = self.size
        chip['yres'], chip['xres'] = self.resolution
        return chip

    def check_same(self, crs: str, maps: tuple[int, int, int], dtype: str) -> None:
        """Check that feature maps are like those in this array.

        Raises:
            OutputError: If they are not.
        """
        old = (self.dimensions, *self.map_size, self.dtype)
        if old != (*maps, dtype):
            old_text, new_text = (
                f'{D} x {h} x {w} {kind}' for D, h, w, kind in (old, (*maps, dtype))
            )
            raise OutputError(
                f'the output holds feature maps of {old_text} for the chips in {crs}, '
                f'but those of this run are {new_text}: choose another output'
            )

    def place(self, chips: NDArray[np.void]) -> Ints:
        """Return time, row and column of the first cell of chips, ``[n, 3]``."""
        (yres, xres), (height, width) = self.resolution, self.size
        pixels = np.stack([(self.y - chips['y']) / yres, (chips['x'] - self.x) / xres])
        cells = np.round(pixels).astype(np.int64).T * self.map_size // (height, width)
        index = pd.MultiIndex.from_tuples(self.times)
        windows = pd.MultiIndex.from_arrays([chips['start'], chips['end']])
        return np.column_stack([index.get_indexer(windows), cells])

    def offset_of(self, other: Layout) -> Ints:
        """Return the row and the column here of the first cell of another layout."""
        cells = (self.y - other.y) / self.cell[0], (other.x - self.x) / self.cell[1]
        offset: Ints = np.round(cells).astype(np.int64)
        return offset

    def shards_of(self, places: Ints) -> dict[Shard, Ints]:
        """Say which chips lie in which shard.

        Args:
            places: As :meth:`place` gives them, ``[n, 3]``.

        Returns:
            For each shard with chips (numbers along time, y and x, in this order), the
            rows of *places*.
        """
        shard, size = np.array(self.shard), np.array(self.map_size)
        first = places[:, 1:] // shard
        last = (places[:, 1:] + size - 1) // shard
        pairs = []
        for down, across in np.ndindex(*((last - first).max(axis=0, initial=0) + 1)):
            at = first + np.array([down, across])
            there = np.flatnonzero((at <= last).all(axis=1))
            pairs.append(np.column_stack([places[there, 0], at[there], there]))
        table = np.concatenate(pairs)
        table = table[np.lexsort(table.T[::-1])]
        cuts = np.flatnonzero((np.diff(table[:, :3], axis=0) != 0).any(axis=1)) + 1
        return {
            (int(part[0, 0]), int(part[0, 1]), int(part[0, 2])): part[:, 3]
            for part in np.split(table, cuts)
            if len(part)
        }

    def window(self, shard: Shard) -> tuple[int, int, int, int]:
        """Return first row, first column, rows and columns of a shard."""
        row, column = shard[1] * self.shard[0], shard[2] * self.shard[1]
        return (
            row,
            column,
            min(self.shard[0], self.rows - row),
            min(self.shard[1], self.columns - column),
        )

    def owners(self, places: Ints, window: tuple[int, int, int, int]) -> Ints:
        """Say which chip each cell of a window takes its values from.

        It is the chip whose centre is nearest; of several, the northernmost, and of
        these the westernmost. This depends on the chips alone, not on their order.

        Args:
            places: Chips of one time, ``[n, 3]``.
            window: First row, first column, rows and columns.

        Returns:
            Rows of *places*, ``[rows, columns]``; -1 where there is no chip.
        """
        rows, columns = window[2:]
        height, width = self.map_size
        aspect = self.cell[0] / self.cell[1]
        # Whole numbers, where cells are square, so that ties are ties.
        aspect = 1.0 if math.isclose(aspect, 1.0, rel_tol=1e-9) else aspect
        owner = np.full((rows, columns), -1, np.int64)
        nearest = np.full((rows, columns), np.inf)
        # Half cells from the centre of a chip to the centres of its cells.
        down = (2 * np.arange(height) + 1 - height) * aspect
        across = 2 * np.arange(width) + 1 - width
        distance = down[:, None] ** 2 + across[None, :] ** 2
        for i in np.lexsort((places[:, 2], places[:, 1])).tolist():
            here, inside = overlap(places[i, 1:], (height, width), window)
            closer = distance[inside] < nearest[here]
            nearest[here][closer] = distance[inside][closer]
            owner[here][closer] = i
        return owner


def overlap(
    corner: Ints, size: tuple[int, int], window: tuple[int, int, int, int]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return the common part of a box of cells and a window, as slices of each.

    Args:
        corner: First row and column of the box.
        size: Rows and columns of the box.
        window: First row, first column, rows and columns of the window.

    Returns:
        Slices of the window, and slices of the box.
    """
    here, inside = zip(*_overlaps(corner, size, window), strict=True)
    return (here[0], here[1]), (inside[0], inside[1])


def _overlaps(
    corner: Ints, size: tuple[int, int], window: tuple[int, int, int, int]
) -> Iterator[tuple[slice, slice]]:
    for begin, length, first, count in zip(
        corner.tolist(), size, window[:2], window[2:], strict=True
    ):
        low = max(begin, first)
        high = max(low, min(begin + length, first + count))
        yield slice(low - first, high - first), slice(low - begin, high - begin)


def _size_text(chip: np.void) -> str:
    return (
        f'{chip["height"]} x {chip["width"]} pixels of {chip["yres"]:.6g} x '
        f'{chip["xres"]:.6g}'
    )


def _chunk(
    step: tuple[int, ...], map_size: tuple[int, int], cell_bytes: int
) -> tuple[int, int]:
    """Return the rows and columns of a chunk: as far as from one chip to the next."""
    # Chips far apart say nothing of how they will be read.
    sides = [a if a < 2 * b else b for a, b in zip(step, map_size, strict=True)]
    least, most = CHUNK_BYTES
    while sides[0] * sides[1] * cell_bytes < least:
        sides = [2 * side for side in sides]
    while max(sides) > 1 and sides[0] * sides[1] * cell_bytes > most:
        sides = [-(-side // 2) for side in sides]
    return sides[0], sides[1]


def _shard(
    chunk: tuple[int, int], extent: tuple[int, int], cell_bytes: int
) -> tuple[int, int]:
    """Return the rows and columns of a shard: as many chunks each way."""
    count = max(1, math.isqrt(SHARD_BYTES // (chunk[0] * chunk[1] * cell_bytes)))
    rows, columns = (
        side * min(count, -(-length // side))
        for side, length in zip(chunk, extent, strict=True)
    )
    return rows, columns
