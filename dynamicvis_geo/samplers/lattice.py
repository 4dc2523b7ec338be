"""What the index of a dataset says: pixel lattice, time windows and area."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry
from torchgeo.datasets import (
    GeoDataset,
    IntersectionDataset,
    RasterDataset,
    UnionDataset,
    XarrayDataset,
)

from dynamicvis_geo.datasets.chip_table import CHIP
from dynamicvis_geo.errors import SpecError

#: Most pixels of a side of a chip, or from chip to chip.
LARGEST = 2**20

#: Deviations below this share of a pixel are rounding, not geometry.
TOLERANCE = 1e-3

GeoSlice = tuple[slice, slice, slice]
Ints = NDArray[np.int64]


def as_pair(
    name: str, value: int | tuple[int, int] | Sequence[int], unit: str = 'pixels'
) -> tuple[int, int]:
    """Return a size or stride as (height, width).

    Args:
        name: Name of the argument, for the error.
        value: One positive integer or a pair of them.
        unit: What is counted, for the error.

    Raises:
        SpecError: If *value* is neither.
    """
    pair = tuple(value) if isinstance(value, Sequence | np.ndarray) else (value, value)
    try:
        height, width = (operator.index(v) for v in pair)
    except (TypeError, ValueError):
        height = width = 0
    if not 1 <= min(height, width) <= max(height, width) <= LARGEST or any(
        isinstance(v, bool) for v in pair
    ):
        raise SpecError(
            f'{name}={value!r} must be a whole number of {unit} from 1 to {LARGEST}, '
            'or a pair (height, width) of them'
        )
    return height, width


@dataclass(frozen=True)
class Lattice:
    """The pixel lattice of a dataset.

    Pixel edges lie at ``x + i * xres`` and ``y + j * yres`` for whole i and j; i counts
    eastwards and j northwards.

    Attributes:
        x: Easting of line 0: at the CRS origin, or less than a pixel from it.
        y: Northing of line 0.
        xres: Width of a pixel in CRS units.
        yres: Height of a pixel in CRS units.
    """

    x: float
    y: float
    xres: float
    yres: float

    @classmethod
    def of(cls, dataset: GeoDataset) -> Lattice:
        """Return the lattice on which the pixels of a dataset lie.

        Datasets made of files have the lattice of their first file, so that chips are
        cut from it without resampling. All others have lines through the CRS origin.

        Raises:
            SpecError: If the dataset has no resolution.
        """
        xres, yres = (abs(float(res)) for res in dataset.res)
        if not (xres > 0 and yres > 0 and math.isfinite(xres) and math.isfinite(yres)):
            raise SpecError(
                f'dataset={type(dataset).__name__} has resolution {dataset.res}: set '
                'dataset.res to the pixel size in CRS units'
            )
        source = dataset
        while isinstance(source, IntersectionDataset | UnionDataset):
            source = source.datasets[0]
        if not isinstance(source, RasterDataset | XarrayDataset) or source.index.empty:
            return cls(0.0, 0.0, xres, yres)
        west, _, _, north = source.index.geometry.iloc[0].bounds
        return cls(_phase(west, xres), _phase(north, yres), xres, yres)

    def boxes(
        self,
        cols: Ints,
        tops: Ints,
        widths: Ints | int,
        heights: Ints | int,
        shrink: float = 0.0,
    ) -> NDArray[np.object_]:
        """Return rectangles of pixels as polygons.

        Args:
            cols: Line i of each west edge.
            tops: Line j of each north edge.
            widths: Pixels eastwards.
            heights: Pixels southwards.
            shrink: Share of a pixel by which each side moves inwards.
        """
        polygons: NDArray[np.object_] = shapely.box(
            self.x + (cols + shrink) * self.xres,
            self.y + (tops - heights + shrink) * self.yres,
            self.x + (cols + widths - shrink) * self.xres,
            self.y + (tops - shrink) * self.yres,
        )
        return polygons

    def slices(
        self,
        cols: Ints,
        tops: Ints,
        size: tuple[int, int],
        windows: Ints,
        times: list[slice],
    ) -> Iterator[GeoSlice]:
        """Yield chips of one size as the slices that index a dataset.

        Args:
            cols: Line i of each west edge.
            tops: Line j of each north edge.
            size: (height, width) in pixels.
            windows: Position of each chip's time window in *times*.
            times: Slices of time.
        """
        height, width = size
        west = (self.x + cols * self.xres).tolist()
        east = (self.x + (cols + width) * self.xres).tolist()
        south = (self.y + (tops - height) * self.yres).tolist()
        north = (self.y + tops * self.yres).tolist()
        for x0, x1, y0, y1, window in zip(
            west, east, south, north, windows.tolist(), strict=True
        ):
            yield slice(x0, x1, self.xres), slice(y0, y1, self.yres), times[window]

    def table(
        self,
        cols: Ints,
        tops: Ints,
        size: tuple[int, int],
        windows: Ints,
        times: list[slice],
    ) -> NDArray[np.void]:
        """Return what :meth:`slices` yields as a table of chips."""
        chips = np.zeros(len(cols), CHIP)
        chips['x'] = self.x + cols * self.xres
        chips['y'] = self.y + tops * self.yres
        chips['height'], chips['width'] = size
        chips['xres'], chips['yres'] = self.xres, self.yres
        for name, side in (('start', 'start'), ('end', 'stop')):
            moments = [getattr(time, side).as_unit('ns').value for time in times]
            chips[name] = np.array(moments, np.int64)[windows]
        return chips


def _phase(edge: float, res: float) -> float:
    """Return the offset of an edge from the nearest lattice line at or before it."""
    # The tolerance keeps an edge that misses its line by rounding from counting as
    # almost a whole pixel beyond the line before it.
    offset = edge - math.floor(edge / res + TOLERANCE) * res
    return 0.0 if abs(offset) < 1e-6 * res else offset


def time_windows(
    dataset: GeoDataset, toi: pd.Interval[Any] | tuple[Any, Any] | None
) -> tuple[Ints, Ints]:
    """Return the distinct time windows of a dataset.

    Args:
        dataset: The dataset.
        toi: Keep the windows that overlap this time: an interval, or (start, end) with
            the end exclusive. A window is kept whole, so that the chips of a dataset do
            not depend on the request.

    Returns:
        The windows, ``[n, 2]`` in nanoseconds, sorted; and for each row of the index
        the position of its window, -1 where it was left out.

    Raises:
        SpecError: If *toi* is not a time.
    """
    intervals = pd.IntervalIndex(dataset.index.index)
    if intervals.empty:
        return np.empty((0, 2), np.int64), np.empty(0, np.int64)
    nanoseconds = np.stack(
        [
            pd.DatetimeIndex(side).as_unit('ns').asi8
            for side in (intervals.left, intervals.right)
        ],
        axis=1,
    )
    if toi is None:
        keep = np.ones(len(intervals), dtype=bool)
    else:
        keep = _overlaps(intervals, _interval(toi))
    windows, positions = np.unique(nanoseconds[keep], axis=0, return_inverse=True)
    position = np.full(len(intervals), -1, np.int64)
    position[keep] = positions.reshape(-1)
    return windows, position


def time_slices(windows: Ints) -> list[slice]:
    """Return time windows, ``[n, 2]`` in nanoseconds, as slices of Timestamps."""
    return [slice(pd.Timestamp(a), pd.Timestamp(b), 1) for a, b in windows.tolist()]


def _overlaps(
    intervals: pd.IntervalIndex[Any], toi: pd.Interval[Any]
) -> NDArray[np.bool_]:
    return np.array([interval.overlaps(toi) for interval in intervals], dtype=bool)


def _interval(toi: pd.Interval[Any] | tuple[Any, Any]) -> pd.Interval[Any]:
    remedy = (
        f'toi={toi!r} must be a pandas.Interval of timestamps or a pair (start, end) '
        "of dates, such as ('2022-06-01', '2022-09-01'), in UTC"
    )
    closed: Literal['left', 'right', 'both', 'neither'] = 'left'
    try:
        if isinstance(toi, pd.Interval):
            start, end, closed = toi.left, toi.right, toi.closed
        else:
            start, end = toi
        stamps = [pd.Timestamp(start), pd.Timestamp(end)]
    except (TypeError, ValueError) as error:
        raise SpecError(remedy) from error
    if any(pd.isna(stamp) for stamp in stamps):
        raise SpecError(remedy)
    left, right = (
        stamp.tz_convert(None) if stamp.tz is not None else stamp for stamp in stamps
    )
    if left > right or (left == right and closed != 'both'):
        raise SpecError(f'toi={toi!r} ends before it starts: exchange start and end')
    return pd.Interval(left, right, closed=closed)


def areal(geometries: NDArray[np.object_], pixel: float) -> BaseGeometry:
    """Unite geometries into one area; points and lines count as thin areas.

    Args:
        geometries: Shapely geometries.
        pixel: Width of a pixel: points and lines are widened to a small share of it.
    """
    parts = shapely.get_parts(shapely.make_valid(geometries))
    parts = parts[~shapely.is_empty(parts)]
    thin = shapely.get_dimensions(parts) < 2
    # Wider than the tolerance, so that the chips around a point are found even where it
    # lies on the line between them.
    parts[thin] = shapely.buffer(
        parts[thin], 10 * TOLERANCE * pixel, cap_style='square'
    )
    return polygons_only(shapely.disjoint_subset_union_all(parts))


def polygons_only(geometry: BaseGeometry) -> BaseGeometry:
    """Drop the points and lines of a geometry, which mark where areas merely touch."""
    parts = shapely.get_parts(geometry)
    # Collections within collections do not come out of one call.
    parts = shapely.get_parts(parts)
    return shapely.multipolygons(parts[shapely.get_dimensions(parts) == 2])
