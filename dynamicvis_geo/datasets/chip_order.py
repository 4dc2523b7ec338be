"""An order of chips in which neighbours stay together: along a Hilbert curve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dynamicvis_geo.grid import TOLERANCE

#: Chips whose places are worked with at a time.
SLAB = 50_000
#: Pixels from chip to chip, (down, across); None if chips do not lie on a grid.
Stride = tuple[int, int] | None
Strides = Sequence[Stride]
#: Point in the CRS of each source of a table that is a corner of the squares of its
#: grid; None for the origin of that CRS.
Origins = Sequence[tuple[float, float] | None]

#: Cells of the curve on each side, as a power of two: the Earth in centimetres.
_LEVEL = 32


def hilbert_order(
    table: NDArray[np.void], distance: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Return the rows of a table of chips in an order that keeps neighbours together.

    The order is by source, then by time window, then along the curve. Chips in one cell
    of the curve keep their order.

    Args:
        table: Chips, :data:`.chip_table.CHIP`.
        distance: Of each chip, as :func:`along_curve` gives it.
    """
    order: NDArray[np.int64] = np.lexsort(
        (distance, table['end'], table['start'], table['source'])
    )
    return order


def along_curve(
    table: NDArray[np.void], strides: Strides = (), origins: Origins = ()
) -> NDArray[np.uint64]:
    """Return how far along a Hilbert curve each chip lies.

    The cells of a grid are as large as its stride and hold a chip each, so that chips
    whose distances have the same quotient by ``4**k`` fill an aligned square of
    ``2**k`` chips a side. Elsewhere cells are as large as the smallest chip of the
    source, and the curve is fixed to the origin of the CRS.

    Args:
        table: Chips, :data:`.chip_table.CHIP`.
        strides: Of each source; those that are missing count as None.
        origins: Where the curve of each source with a stride is fixed to: a corner of
            its squares, in the CRS; those that are missing count as None, the origin
            of the CRS.
    """
    distance = np.zeros(len(table), np.uint64)
    for source in np.unique(table['source']):
        rows = np.flatnonzero(table['source'] == source)
        stride = strides[source] if source < len(strides) else None
        cell = None if stride else _smallest_side(table, rows)
        origin = origins[source] if source < len(origins) else None
        for part in slabs(rows):
            chips = table[part]
            if stride is not None:
                x, y = _grid_cells(chips, stride, origin or (0.0, 0.0))
            else:
                x = (chips['x'] + chips['width'] * chips['xres'] / 2) / cell
                y = (chips['y'] - chips['height'] * chips['yres'] / 2) / cell
            distance[part] = _hilbert(_whole(x), _whole(y))
    return distance


def slabs(rows: NDArray[np.int64], length: int = SLAB) -> Iterator[NDArray[np.int64]]:
    """Yield rows in runs short enough to make Python objects of.

    Args:
        rows: Rows of a chip table.
        length: Most rows of a run.
    """
    for start in range(0, len(rows), length):
        yield rows[start : start + length]


def _smallest_side(table: NDArray[np.void], rows: NDArray[np.int64]) -> float:
    return min(
        float((table[name][rows] * table[res][rows]).min())
        for name, res in (('width', 'xres'), ('height', 'yres'))
    )


def _grid_cells(
    chips: NDArray[np.void], stride: tuple[int, int], origin: tuple[float, float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return in which cell of its grid each chip lies: what hangs from its corner."""
    down, across = stride
    x = ((chips['x'] - origin[0]) / chips['xres'] + TOLERANCE) / across
    y = ((chips['y'] - origin[1]) / chips['yres'] + TOLERANCE) / down - 1
    return x, y


def _whole(cells: NDArray[np.float64]) -> NDArray[np.int64]:
    """Count cells from a corner of the curve, with the origin in its middle."""
    whole: NDArray[np.int64] = np.floor(cells + 2 ** (_LEVEL - 1)).astype(np.int64)
    return whole


def _hilbert(x: NDArray[np.int64], y: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the distances of cells along the curve.

    GeoPandas' own curve is too coarse for a zone of small chips (16 bits a side), and
    makes a geometry of each.
    """
    distance = np.zeros(len(x), np.uint64)
    for bit in range(_LEVEL - 1, -1, -1):
        right, up = x >> bit & 1, y >> bit & 1
        distance = distance << np.uint64(2) | (3 * right ^ up).astype(np.uint64)
        # The lower quarters are turned, so that the curve goes on from one to the next.
        lower, turned = up == 0, (up == 0) & (right == 1)
        x, y = np.where(turned, ~x, x), np.where(turned, ~y, y)
        x, y = np.where(lower, y, x), np.where(lower, x, y)
    return distance
