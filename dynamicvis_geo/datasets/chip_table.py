"""The table of chips that a ChipDataset keeps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torchgeo.datasets import GeoDataset

from dynamicvis_geo.errors import SpecError

GeoSlice = tuple[slice, slice, slice]

#: One chip: north-west corner, size in pixels, size of a pixel, time in nanoseconds,
#: and position of its source among the pairs.
CHIP = np.dtype(
    [
        ('x', np.float64),
        ('y', np.float64),
        ('width', np.int32),
        ('height', np.int32),
        ('xres', np.float64),
        ('yres', np.float64),
        ('start', np.int64),
        ('end', np.int64),
        ('source', np.int32),
    ]
)


def freeze(
    source: int, dataset: GeoDataset, sampler: Iterable[Any]
) -> NDArray[np.void]:
    """Return the chips of one sampler as a table.

    Samplers with a method ``table`` hand over all chips as one, without a Python object
    for each: an array of :data:`CHIP`.
    """
    make_table = getattr(sampler, 'table', None)
    if make_table is not None:
        table: NDArray[np.void] = make_table()
        table['source'] = source
        return table
    slices = iter(sampler)
    first = next(slices, None)
    if first is None:
        return np.empty(0, CHIP)
    defaults = dataset.bounds
    chips = (
        _record(source, query, defaults, sampler)
        for query in itertools.chain([first], slices)
    )
    return np.fromiter(chips, CHIP)


def _record(
    source: int,
    query: Any,
    defaults: GeoSlice,
    sampler: Iterable[Any],
) -> tuple[float | int, ...]:
    """Return one chip as a row of the table."""
    if not (
        isinstance(query, tuple)
        and len(query) in (2, 3)
        and all(isinstance(part, slice) for part in query)
    ):
        raise SpecError(
            f'pairs: sampler {type(sampler).__name__} yields {query!r:.80}, not slices '
            '(x, y) or (x, y, t); a batch sampler cannot be used: give its sampler of '
            'single chips'
        )
    x, y = query[:2]
    t = query[2] if len(query) == 3 else defaults[2]
    xres = x.step or defaults[0].step
    yres = y.step or defaults[1].step
    width, height = round((x.stop - x.start) / xres), round((y.stop - y.start) / yres)
    start, end = _nanoseconds(t.start), _nanoseconds(t.stop)
    if (
        min(width, height) < 1
        or start is None
        or end is None
        or t.step not in (None, 1)
    ):
        raise SpecError(
            f'pairs: sampler {type(sampler).__name__} yields {query!r}: a chip needs a '
            'whole pixel, times without time zone (UTC) and a time step of 1'
        )
    # The grid of a chip hangs from its north-west corner.
    return (
        x.start,
        y.stop,
        width,
        height,
        xres,
        yres,
        start,
        end,
        source,
    )


@lru_cache(maxsize=4096)
def _nanoseconds(time: Any) -> int | None:
    """Return a time as nanoseconds since 1970 in UTC; None if it has a time zone."""
    stamp = pd.Timestamp(time)
    return None if stamp.tz is not None else stamp.as_unit('ns').value


def join_tables(tables: list[NDArray[np.void]]) -> NDArray[np.void]:
    """Join tables into one, and empty the list: each is let go when it is copied."""
    joined = np.empty(sum(map(len, tables)), CHIP)
    end = len(joined)
    while tables:
        table = tables.pop()
        joined[end - len(table) : end] = table
        end -= len(table)
    return joined


def queries(chips: NDArray[np.void]) -> Iterator[GeoSlice]:
    """Yield the slices that index the source dataset of each chip."""
    for (west, south, east, north), chip in zip(
        bounds_of(chips).tolist(), chips, strict=True
    ):
        start, end = pd.Timestamp(int(chip['start'])), pd.Timestamp(int(chip['end']))
        yield (
            slice(west, east, float(chip['xres'])),
            slice(south, north, float(chip['yres'])),
            slice(start, end, 1),
        )


def bounds_of(chips: NDArray[np.void]) -> NDArray[np.float64]:
    """Return (minx, miny, maxx, maxy) of chips, ``[n, 4]``."""
    east = chips['x'] + chips['width'] * chips['xres']
    south = chips['y'] - chips['height'] * chips['yres']
    return np.stack([chips['x'], south, east, chips['y']], axis=1)
