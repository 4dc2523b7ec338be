"""Chips that the queries of a dataset ask for: grids and time windows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from torchgeo.datasets import GeoDataset

from dynamicvis_geo.datasets.chip_ids import chip_id
from dynamicvis_geo.datasets.source import GeoSlice
from dynamicvis_geo.earthengine.fetch import Chip
from dynamicvis_geo.grid import Grid, crs_text
from dynamicvis_geo.time_window import TimeWindow


def read_queries(
    dataset: GeoDataset, wanted: Sequence[GeoSlice], source: str = ''
) -> tuple[list[GeoSlice], list[Chip]]:
    """Return the chips that queries ask for.

    Args:
        dataset: What is queried.
        wanted: Slices of x, y and time; any may be missing, or its parts.
        source: Name of the source of the chips.

    Returns:
        The queries, complete, and their chips.

    Raises:
        IndexError: If a query touches no window, or not the area, or has no pixel.
    """
    queries = [dataset._disambiguate_slice(query) for query in wanted]
    crs = crs_text(dataset.crs)
    chips = []
    times = _windows(dataset, queries).tolist()
    for (x, y, _), (first, last) in zip(queries, times, strict=True):
        try:
            grid = Grid.from_slices(crs, x, y).rounded()
        except ValueError as error:
            raise IndexError(f'query: {error}') from error
        window = _window(first, last)
        name = chip_id(dataset.crs, grid, window)
        chips.append(Chip(grid, window.milliseconds, name, source))
    return queries, chips


def _windows(dataset: GeoDataset, queries: Sequence[GeoSlice]) -> NDArray[np.int64]:
    """Return the first and last moment of each query's window, in nanoseconds.

    A query has the window that it names, else all of those that it overlaps, else
    one that it touches.

    Raises:
        IndexError: If one touches no window, or not the area.
    """
    edges = np.array([(x.start, y.start, x.stop, y.stop) for x, y, _ in queries])
    times = np.array(
        [(_nanoseconds(t.start), _nanoseconds(t.stop)) for _, _, t in queries]
    ).reshape(-1, 2)
    boxes = shapely.box(*edges.reshape(-1, 4).T)
    which, rows = dataset.index.sindex.query(boxes, predicate='intersects')
    windows = dataset.index.index
    left = windows.left.as_unit('ns').asi8[rows]
    right = windows.right.as_unit('ns').asi8[rows]
    start, stop = times[which].T
    touches = (start <= right) & (stop >= left)
    overlaps = (start < right) & (stop > left)
    same = (start == left) & (stop == right)
    fit = touches.astype(np.int64) + overlaps + same
    best = np.zeros(len(queries), np.int64)
    np.maximum.at(best, which, fit)
    if not best.all():
        query = queries[int(best.argmin())]
        raise IndexError(
            f'query: {query} not found in index with bounds: {dataset.bounds}'
        )
    chosen = fit == best[which]
    limits = np.iinfo(np.int64)
    found = np.tile([limits.max, limits.min], (len(queries), 1))
    np.minimum.at(found[:, 0], which[chosen], left[chosen])
    np.maximum.at(found[:, 1], which[chosen], right[chosen])
    return found


@lru_cache(maxsize=4096)
def _window(first: int, last: int) -> TimeWindow:
    return TimeWindow.closed(first, last)


@lru_cache(maxsize=4096)
def _nanoseconds(time: Any) -> int:
    return pd.Timestamp(time).as_unit('ns').value
