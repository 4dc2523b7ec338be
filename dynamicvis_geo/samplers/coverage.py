"""The pixels, time windows and area that a dataset covers, from its index."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from pyproj import CRS
from shapely.geometry.base import BaseGeometry
from torchgeo.datasets import (
    GeoDataset,
    IntersectionDataset,
    RasterDataset,
    UnionDataset,
    XarrayDataset,
)

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.grid import TOLERANCE, Grid
from dynamicvis_geo.projections import crs_name
from dynamicvis_geo.time_window import STEP, TimeWindow, end_of, utc

#: Most pixels of a side of a chip, or from chip to chip.
LARGEST = 2**20

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


def pixel_grid(dataset: GeoDataset) -> Grid:
    """Find the pixel of a dataset's lattice that begins nearest the origin of the CRS.

    Datasets made of files have the lattice of their first file, so that chips are cut
    from it without resampling. All others have lines through the CRS origin.

    Args:
        dataset: The dataset.

    Returns:
        A grid of one pixel.

    Raises:
        SpecError: If the dataset has no resolution.
    """
    xres, yres = (abs(float(res)) for res in dataset.res)
    if not (xres > 0 and yres > 0 and math.isfinite(xres) and math.isfinite(yres)):
        raise SpecError(
            f'dataset={type(dataset).__name__} has resolution {dataset.res}: set '
            'dataset.res to the pixel size in CRS units'
        )
    source, x, y = dataset, 0.0, 0.0
    while isinstance(source, IntersectionDataset | UnionDataset):
        source = source.datasets[0]
    if isinstance(source, RasterDataset | XarrayDataset) and not source.index.empty:
        west, _, _, north = source.index.geometry.iloc[0].bounds
        x, y = _phase(west, xres), _phase(north, yres)
    return Grid(crs_name(CRS.from_user_input(dataset.crs)), x, y, 1, 1, xres, yres)


def rectangles(
    grid: Grid,
    rows: Ints,
    cols: Ints,
    heights: Ints | int,
    widths: Ints | int,
    shrink: float = 0.0,
) -> NDArray[np.object_]:
    """Return rectangles of pixels as polygons.

    Args:
        grid: The grid that rows and columns are counted from.
        rows: Upper row of each rectangle.
        cols: Left column.
        heights: Pixels southwards.
        widths: Pixels eastwards.
        shrink: Share of a pixel by which each side moves inwards.
    """
    polygons: NDArray[np.object_] = shapely.box(
        grid.x + (cols + shrink) * grid.xres,
        grid.y - (rows + heights - shrink) * grid.yres,
        grid.x + (cols + widths - shrink) * grid.xres,
        grid.y - (rows + shrink) * grid.yres,
    )
    return polygons


def _phase(edge: float, res: float) -> float:
    """Return the offset of an edge from the nearest lattice line at or before it."""
    # The tolerance keeps an edge that misses its line by rounding from counting as
    # almost a whole pixel beyond the line before it.
    offset = edge - math.floor(edge / res + TOLERANCE) * res
    return 0.0 if abs(offset) < 1e-6 * res else offset


def time_windows(
    dataset: GeoDataset, toi: pd.Interval[Any] | tuple[Any, Any] | None = None
) -> tuple[Ints, Ints]:
    """Return the distinct time windows of a dataset.

    Args:
        dataset: The dataset.
        toi: Keep the windows that overlap this time: an interval, or (start, end) with
            the end exclusive. A window is kept whole, so that the chips of a dataset do
            not depend on the request.

    Returns:
        Start and end of the windows in nanoseconds, ``[n, 2]``, sorted; and for each
        row of the index the position of its window, -1 where it was left out.

    Raises:
        SpecError: If *toi* is not a time.
    """
    intervals = pd.IntervalIndex(dataset.index.index)
    if intervals.empty:
        return np.empty((0, 2), np.int64), np.empty(0, np.int64)
    first, last = (
        pd.DatetimeIndex(side).as_unit('ns')
        for side in (intervals.left, intervals.right)
    )
    end = pd.DatetimeIndex(end_of(last.asi8))
    keep = np.ones(len(intervals), dtype=bool)
    if toi is not None:
        wanted = _time_of_interest(toi)
        keep = (first < wanted.end) & (end > wanted.start)
    times = np.stack([first.asi8, end.asi8], axis=1)
    windows, positions = np.unique(times[keep], axis=0, return_inverse=True)
    position = np.full(len(intervals), -1, np.int64)
    position[keep] = positions.reshape(-1)
    return windows, position


def _time_of_interest(toi: pd.Interval[Any] | tuple[Any, Any]) -> TimeWindow:
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
        left, right = utc(start), utc(end)
    except (TypeError, ValueError) as error:
        raise SpecError(remedy) from error
    if pd.isna(left) or pd.isna(right):
        raise SpecError(remedy)
    if left > right or (left == right and closed != 'both'):
        raise SpecError(f'toi={toi!r} ends before it starts: exchange start and end')
    return TimeWindow(
        left + STEP if closed in ('right', 'neither') else left,
        right + STEP if closed in ('right', 'both') else right,
    )


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
    """Drop the points and lines of a geometry, which mark where areas merely touch.

    Args:
        geometry: Of any kind.

    Returns:
        A MultiPolygon, which may be empty.
    """
    parts = shapely.get_parts(geometry)
    # Collections within collections do not come out of one call.
    parts = shapely.get_parts(parts)
    return shapely.multipolygons(parts[shapely.get_dimensions(parts) == 2])
