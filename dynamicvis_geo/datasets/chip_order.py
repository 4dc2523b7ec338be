"""Which chips follow each other: neighbours stay together."""

from __future__ import annotations

from collections.abc import Iterator

import geopandas as gpd
import numpy as np
from numpy.typing import NDArray

#: Chips whose places are turned into geometries at a time.
SLAB = 50_000
#: The finest Hilbert curve of GeoPandas divides each side into 2**16 - 1 steps.
_LEVEL = 16
_STEPS = 2**_LEVEL - 1


def hilbert_order(table: NDArray[np.void]) -> NDArray[np.int64]:
    """Return the rows of a table of chips in an order that keeps neighbours together.

    The order is by source, then by time window, then along a Hilbert curve whose cells
    are as large as the smallest chip of the source: of chips that lie side by side,
    ``4**k`` in a row fill a square, or nearly so. Chips in one cell keep their order.

    Args:
        table: Chips, as :class:`~dynamicvis_geo.datasets.ChipDataset` keeps them.
    """
    distance = np.zeros(len(table), np.uint32)
    for source in np.unique(table['source']):
        rows = np.flatnonzero(table['source'] == source)
        distance[rows] = _distances(table, rows)
    order: NDArray[np.int64] = np.lexsort(
        (distance, table['end'], table['start'], table['source'])
    )
    return order


def reorder(table: NDArray[np.void], order: NDArray[np.int64]) -> None:
    """Bring a table into an order, in place: a copy of one column exists at a time."""
    for name in table.dtype.names or ():
        table[name] = table[name][order]


def slabs(rows: NDArray[np.int64], length: int = SLAB) -> Iterator[NDArray[np.int64]]:
    """Yield rows in pieces small enough to make Python objects of."""
    for start in range(0, len(rows), length):
        yield rows[start : start + length]


def _distances(table: NDArray[np.void], rows: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return how far along the curve the centres of some chips lie."""
    side = {
        name: table[name][rows] * table[res][rows]
        for name, res in (('width', 'xres'), ('height', 'yres'))
    }
    x = table['x'][rows] + side['width'] / 2
    y = table['y'][rows] - side['height'] / 2
    cell = min(side['width'].min(), side['height'].min())
    west, south = x.min() - cell / 2, y.min() - cell / 2
    extent = max(x.max() - west, y.max() - south, _STEPS * cell)
    bounds = (west, south, west + extent, south + extent)
    distance = np.empty(len(rows), np.uint32)
    for part in slabs(np.arange(len(rows))):
        points = gpd.GeoSeries(gpd.points_from_xy(x[part], y[part]))
        distance[part] = points.hilbert_distance(bounds, level=_LEVEL)
    return distance
