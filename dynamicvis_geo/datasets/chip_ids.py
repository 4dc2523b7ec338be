"""Ids of chips: readable, stable, and safe as names of files."""

from __future__ import annotations

import hashlib
import math
import re
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS

from dynamicvis_geo.grid import Grid
from dynamicvis_geo.time_window import TimeWindow

_UNITS = {'metre': 'm', 'degree': 'deg', 'foot': 'ft', 'US survey foot': 'usft'}


def chip_id(crs: CRS, grid: Grid, window: TimeWindow) -> str:
    """Id of a chip.

    An id such as ``EPSG32618_x399360_y4300800_512x512px_20m_20220601-20220901`` holds
    the CRS, the north-west corner, width and height in pixels, the size of a pixel, and
    the time window (absent where the data are valid at all times).

    Args:
        crs: CRS of the grid.
        grid: Pixels of the chip.
        window: Its time.
    """
    size = grid.width, grid.height
    corner = *_labels(crs), grid.x, grid.y
    return _id(*corner, *size, *grid.res, *window.nanoseconds)


def chip_ids(crs: CRS, chips: NDArray[np.void]) -> list[str]:
    """Ids of chips of one CRS, as :func:`chip_id` makes them.

    Args:
        crs: CRS of the chips.
        chips: Rows of a chip table, :data:`.chip_table.CHIP`.
    """
    label, unit = _labels(crs)
    columns = (
        chips[name].tolist()
        for name in ('x', 'y', 'width', 'height', 'xres', 'yres', 'start', 'end')
    )
    return [_id(label, unit, *chip) for chip in zip(*columns, strict=True)]


def _id(
    label: str,
    unit: str,
    x: float,
    y: float,
    width: int,
    height: int,
    xres: float,
    yres: float,
    start: int,
    end: int,
) -> str:
    return (
        f'{label}_x{_place(x, xres)}_y{_place(y, yres)}_{width}x{height}px_'
        f'{_resolution(xres, yres)}{unit}{_time(start, end)}'
    )


@lru_cache(maxsize=64)
def _labels(crs: CRS) -> tuple[str, str]:
    """The short name of a CRS, and that of its unit."""
    unit = _UNITS.get(crs.axis_info[0].unit_name, 'u') if crs.axis_info else 'u'
    authority = crs.to_authority(min_confidence=100)
    if authority:
        return re.sub(r'[^A-Za-z0-9]', '', ''.join(authority)), unit
    digest = hashlib.sha256(crs.to_wkt().encode()).hexdigest()
    return f'CRS{digest[:10]}', unit


@lru_cache(maxsize=64)
def _digits(res: float) -> int:
    """The decimals that tell a thousandth of a pixel apart."""
    return max(0, math.ceil(-math.log10(res)) + 3)


def _place(value: float, res: float) -> str:
    text = f'{value:.{_digits(res)}f}'
    if '.' in text:
        text = text.rstrip('0').rstrip('.')
    return '0' if text == '-0' else text


@lru_cache(maxsize=64)
def _resolution(xres: float, yres: float) -> str:
    labels = [
        np.format_float_positional(float(f'{res:.9g}'), trim='-')
        for res in (xres, yres)
    ]
    return labels[0] if xres == yres else 'x'.join(labels)


@lru_cache(maxsize=4096)
def _time(start: int, end: int) -> str:
    text = str(TimeWindow.of_nanoseconds(start, end))
    return f'_{text}' if text else ''
