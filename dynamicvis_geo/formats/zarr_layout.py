"""Place, axes and shards of the array in which feature maps of one CRS lie."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.grid import TOLERANCE, Grid
from dynamicvis_geo.time_window import recorded

Ints = NDArray[np.int64]
Window = tuple[int, int]
#: A shard of an array: number along time, down and across.
ArrayShard = tuple[int, int, int]

#: A time that is not limited: chips whose window has no start, or no end. It is what
#: NumPy and xarray read as NaT.
OPEN = int(np.iinfo(np.int64).min)

#: Bytes of a chunk, which is read as a whole, and of a shard, which is one file.
CHUNK_BYTES = (256 * 2**10, 8 * 2**20)
SHARD_BYTES = 64 * 2**20

_INSTEAD = (
    "write one GeoTIFF a chip instead (format='geotiff', a folder whose name does not "
    'end in .zarr)'
)


def open_times(chips: NDArray[np.void]) -> NDArray[np.void]:
    """Return a copy of chips with their times as files have them.

    Args:
        chips: Rows of a chip table.

    Returns:
        The copy; :data:`OPEN` where there is no limit.
    """
    chips = chips.copy()
    times = recorded(chips['start'], chips['end'])
    chips['start'], chips['end'] = (one.view(np.int64) for one in times)
    return chips


@dataclass(frozen=True)
class ChipGrid:
    """The pixel lattice that all chips of one CRS share.

    Attributes:
        first: A chip in the corner of the westernmost and the northernmost ones.
        step: Pixels, down and across, of which all distances between corners are
            multiples; the size of a chip where there is no distance.
    """

    first: Grid
    step: tuple[int, int]

    @classmethod
    def of(cls, crs: str, chips: NDArray[np.void]) -> ChipGrid:
        """Find the lattice that chips share.

        Args:
            crs: Their CRS, for errors.
            chips: Rows of a chip table, at least one.

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
        west, north = float(chips['x'].min()), float(chips['y'].max())
        grid = cls(Grid(crs, west, north, width, height, xres, yres), (height, width))
        down, across = (int(np.gcd.reduce(axis)) for axis in grid.offsets(chips).T)
        return replace(grid, step=(down or height, across or width))

    def offsets(self, chips: NDArray[np.void]) -> Ints:
        """Count the pixels south and east of the corner where chips begin.

        Args:
            chips: Rows of a chip table.

        Returns:
            int64 ``[n, 2]``.

        Raises:
            OutputError: If they are not whole numbers.
        """
        first = self.first
        exact = np.stack(
            [
                (first.y - chips['y']) / first.yres,
                (chips['x'] - first.x) / first.xres,
            ],
            axis=1,
        )
        offsets: Ints = np.round(exact).astype(np.int64)
        off = (np.abs(exact - offsets) > TOLERANCE).any(axis=1)
        if off.any():
            wrong = chips[off][0]
            raise OutputError(
                f'the chips in {first.crs} do not lie on one grid of pixels: the '
                f'corner ({wrong["x"]:.10g}, {wrong["y"]:.10g}) is not a whole number '
                f'of pixels from ({first.x:.10g}, {first.y:.10g}), so that one Zarr '
                f'array cannot hold both; {_INSTEAD}'
            )
        return offsets

    def check_points(self) -> None:
        """Refuse chips around points that share no cells, whatever the feature map.

        Raises:
            OutputError: If cells would have to be as small as pixels.
        """
        for size, step in zip(self.first.shape, self.step, strict=True):
            if size > 1 and math.gcd(size, step) == 1:
                raise OutputError(
                    f'the chips in {self.first.crs} lie around points, {step} pixels '
                    'or multiples of that apart, and so share no grid of feature cells '
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
            names, self.first.shape, self.step, cells, strict=True
        ):
            if step * count % size == 0:
                continue
            unit = size // math.gcd(size, count)
            near = max(1, round(step / unit)) * unit
            raise OutputError(
                f'the chips in {self.first.crs} do not share a grid of feature cells: '
                f'their {side} is {size} pixels for {count} cells of '
                f'{size / count:.6g} pixels, and they lie {step} pixels apart, which '
                f'is {step * count / size:.6g} cells. A {direction} stride that is a '
                f'multiple of {unit} pixels, such as {near}, makes one array (so does '
                f'a stride as large as the chip); for chips at any place, as around '
                f'points, {_INSTEAD}'
            )


@dataclass(frozen=True)
class Layout:
    """One array of feature maps: its place, its axes and how it is cut into files.

    Cells are counted from the north-west corner, southwards and eastwards.

    Attributes:
        cells: The cells of the array.
        size: Height and width of a chip in pixels.
        resolution: Height and width of a pixel in CRS units.
        map_size: Rows and columns of the feature map of a chip.
        dimensions: Length of an embedding.
        dtype: Type of the values.
        times: Start and end of each time window in nanoseconds, or :data:`OPEN`.
        chunk: Rows and columns of a chunk.
        shard: Rows and columns of a shard, multiples of those of a chunk.
    """

    cells: Grid
    size: tuple[int, int]
    resolution: tuple[float, float]
    map_size: tuple[int, int]
    dimensions: int
    dtype: str
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
        square: int | None,
    ) -> Layout:
        """Lay out an array that holds chips.

        Args:
            grid: Lattice of *chips*.
            chips: The chips.
            maps: ``(D, h, w)``, the shape of the feature map of a chip.
            dtype: Type of the values.
            square: Chips a side of the squares in which work is done, which hang from
                the north-west corner of *grid*; None if it is not done in squares.

        Raises:
            OutputError: If the feature maps do not fit together.
        """
        dimensions, *map_size = maps
        height, width = map_size
        grid.check_cells((height, width))
        size = np.array(map_size)
        chip = grid.first
        step = np.array(grid.step) * size // chip.shape
        extent = (grid.offsets(chips) * size // chip.shape).max(axis=0) + size
        cell_bytes = dimensions * np.dtype(dtype).itemsize
        chunk = _chunk((int(step[0]), int(step[1])), (height, width), cell_bytes)
        shard, margin = _shard(step, size, extent, np.array(chunk), cell_bytes, square)
        rows, columns = (extent + margin).tolist()
        top, left = margin.tolist()
        corner = replace(
            chip,
            xres=chip.xres * chip.width / width,
            yres=chip.yres * chip.height / height,
        )
        return cls(
            cells=corner.part(-top, -left, rows, columns),
            size=chip.shape,
            resolution=(chip.yres, chip.xres),
            map_size=(height, width),
            dimensions=dimensions,
            dtype=dtype,
            times=_times(chips),
            chunk=chunk,
            shard=(int(shard[0]), int(shard[1])),
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the array: time, embedding, y, x."""
        return len(self.times), self.dimensions, *self.cells.shape

    def check_same(self, crs: str, maps: tuple[int, int, int], dtype: str) -> None:
        """Check that feature maps are like those in this array.

        Args:
            crs: Their CRS, for errors.
            maps: ``(D, h, w)``, the shape of the feature map of a chip.
            dtype: Type of the values.

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

    def check_chips(self, crs: str, chips: NDArray[np.void]) -> None:
        """Check that chips have their places in this array.

        Args:
            crs: Their CRS, for errors.
            chips: Rows of a chip table.

        Raises:
            OutputError: If they have not.
        """
        example = chips[:1].copy()
        example['height'], example['width'] = self.size
        example['yres'], example['xres'] = self.resolution
        ChipGrid.of(crs, np.append(example, chips)).check_cells(self.map_size)
        exact = self._cells(chips)
        pixels = np.array(self.size) / self.map_size
        if (np.abs(exact - np.round(exact)) * pixels > TOLERANCE).any():
            raise OutputError(
                f'the chips in {crs} do not lie whole cells apart from those that the '
                f'output holds: choose another output, or {_INSTEAD}'
            )
        places = self.place(chips)
        low, high = places[:, 1:].min(axis=0), places[:, 1:].max(axis=0) + self.map_size
        instead = (
            'an array has its extent and its times from when it was begun. Choose '
            'another output for these chips, or begin anew with all places and times '
            'at once (overwrite=True)'
        )
        if (low < 0).any() or (high > self.cells.shape).any():
            beyond = ', '.join(
                f'{count} cells to the {side}'
                for side, count in zip(
                    ('north', 'west', 'south', 'east'),
                    (*-low, *high - self.cells.shape),
                    strict=True,
                )
                if count > 0
            )
            raise OutputError(
                f'the chips in {crs} reach beyond the array that the output holds '
                f'({beyond}), but {instead}'
            )
        if (places[:, 0] < 0).any():
            new = chips[places[:, 0] < 0][0]
            raise OutputError(
                f'the output has no chips in {crs} of the time '
                f'{_time_text(new["start"])} to {_time_text(new["end"])}, but {instead}'
            )

    def _cells(self, chips: NDArray[np.void]) -> NDArray[np.float64]:
        """Return how many cells south and east of the corner chips begin, exactly."""
        cells = self.cells
        down = (cells.y - chips['y']) / cells.yres
        return np.stack([down, (chips['x'] - cells.x) / cells.xres], axis=1)

    def place(self, chips: NDArray[np.void]) -> Ints:
        """Find the first cell of chips.

        The time is -1 where it is none of the array's.

        Args:
            chips: Rows of a chip table.

        Returns:
            Time, row and column, int64 ``[n, 3]``.
        """
        index = pd.MultiIndex.from_tuples(self.times)
        windows = pd.MultiIndex.from_arrays([chips['start'], chips['end']])
        cells = np.round(self._cells(chips)).astype(np.int64)
        return np.column_stack([index.get_indexer(windows), cells])

    def shards_of(self, places: Ints) -> list[ArrayShard]:
        """Return all shards that chips reach into, in their order.

        Args:
            places: As :meth:`place` gives them, ``[n, 3]``.

        Returns:
            Numbers along time, y and x.
        """
        shard, size = np.array(self.shard), np.array(self.map_size)
        first = places[:, 1:] // shard
        last = (places[:, 1:] + size - 1) // shard
        found = [np.empty((0, 3), np.int64)]
        for step in np.ndindex(*((last - first).max(axis=0, initial=0) + 1)):
            at = first + np.array(step)
            there = (at <= last).all(axis=1)
            found.append(np.column_stack([places[there, 0], at[there]]))
        shards = np.unique(np.concatenate(found), axis=0).tolist()
        return [(time, down, across) for time, down, across in shards]

    def window(self, shard: ArrayShard) -> tuple[int, int, int, int]:
        """Find the cells of a shard.

        Args:
            shard: Its number along time, y and x.

        Returns:
            First row, first column, number of rows and of columns.
        """
        row, column = shard[1] * self.shard[0], shard[2] * self.shard[1]
        return (
            row,
            column,
            min(self.shard[0], self.cells.height - row),
            min(self.shard[1], self.cells.width - column),
        )


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
    step: Ints,
    map_size: Ints,
    extent: Ints,
    chunk: Ints,
    cell_bytes: int,
    square: int | None,
) -> tuple[Ints, Ints]:
    """Return rows and columns of a shard, and of a margin to the north and west.

    Chips of a grid that overlap own cells from half the overlap inwards. The margin,
    which stays empty, lets the borders between shards lie there too, so that a shard
    is of one square of chips and its file has one writer.
    """
    none = np.zeros(2, np.int64)
    found = None
    # Of a tie, the chip to the north or west is the owner.
    half = (np.maximum(map_size - step, 0) + 1) // 2
    divided = (extent - map_size) // step >= (square or 0)
    side = 1
    while side <= (square or 0):
        shard = step * side
        margin = np.where(divided, -half % shard, none)
        fits = math.prod(shard.tolist()) * cell_bytes <= SHARD_BYTES
        fits &= bool((16 * margin <= extent).all())
        if not (shard % chunk).any() and (found is None or fits):
            found = shard, margin
        side *= 2
    if found is None:
        count = max(
            1, math.isqrt(SHARD_BYTES // (math.prod(chunk.tolist()) * cell_bytes))
        )
        found = chunk * count, none
    shard, margin = found
    return np.minimum(shard, -(-(extent + margin) // chunk) * chunk), margin


def _times(chips: NDArray[np.void]) -> tuple[Window, ...]:
    """Return the time windows of chips, each once."""
    windows = pd.DataFrame({name: chips[name] for name in ('start', 'end')})
    return tuple(sorted(windows.drop_duplicates().itertuples(index=False, name=None)))


def _time_text(time: np.int64) -> str:
    return 'without limit' if time == OPEN else pd.Timestamp(int(time)).isoformat()
