"""Names of chips: readable, stable, and safe as names of files."""

from __future__ import annotations

import hashlib
import math
import re
from functools import lru_cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pyproj import CRS

_UNITS = {'metre': 'm', 'degree': 'deg', 'foot': 'ft', 'US survey foot': 'usft'}
_DAY = 86_400_000_000_000
#: The last microsecond of a day, where TorchGeo ends the time window of a day.
_LAST = _DAY - 1000
_ALWAYS = (pd.Timestamp.min.value, pd.Timestamp.max.value)


def crs_name(crs: CRS) -> str:
    """Return a CRS as authority and code, such as EPSG:32618, else as WKT."""
    authority = crs.to_authority(min_confidence=100)
    return ':'.join(authority) if authority else crs.to_wkt()


def chip_ids(crs: CRS, table: NDArray[np.void]) -> list[str]:
    """Return the ids of chips of one CRS.

    An id such as ``EPSG32618_x399360_y4300800_512x512px_20m_20220601-20220901`` holds
    the CRS, the north-west corner, width and height in pixels, the size of a pixel, and
    the time window (absent where the data are valid at all times).

    Args:
        crs: CRS of the chips.
        table: Chips as :class:`ChipDataset` keeps them.
    """
    prefix, unit = _crs_label(crs), _unit(crs)
    columns = (
        table[name].tolist()
        for name in ('x', 'y', 'width', 'height', 'xres', 'yres', 'start', 'end')
    )
    return [
        f'{prefix}_x{_place(x, xres)}_y{_place(y, yres)}_{width}x{height}px_'
        f'{_resolution(xres, yres)}{unit}{_window(start, end)}'
        for x, y, width, height, xres, yres, start, end in zip(*columns, strict=True)
    ]


@lru_cache(maxsize=64)
def _crs_label(crs: CRS) -> str:
    authority = crs.to_authority(min_confidence=100)
    if authority:
        return re.sub(r'[^A-Za-z0-9]', '', ''.join(authority))
    digest = hashlib.sha256(crs.to_wkt().encode()).hexdigest()
    return f'CRS{digest[:10]}'


@lru_cache(maxsize=64)
def _unit(crs: CRS) -> str:
    return _UNITS.get(crs.axis_info[0].unit_name, 'u') if crs.axis_info else 'u'


@lru_cache(maxsize=64)
def _digits(res: float) -> int:
    """Return the decimals that tell a thousandth of a pixel apart."""
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
def _window(start: int, end: int) -> str:
    if (start, end) == _ALWAYS:
        return ''
    if start % _DAY == 0 and end - start == _LAST:
        return f'_{_stamp(start)}'
    if (end - _LAST) % _DAY == 0:
        # The last instant before a day: the window ends where that day begins.
        return f'_{_stamp(start)}-{_stamp(end - _LAST + _DAY)}'
    midnight = 'T000000' if end % _DAY == 0 and end not in _ALWAYS else ''
    return f'_{_stamp(start)}-{_stamp(end)}{midnight}'


def _stamp(nanoseconds: int) -> str:
    """Return a date, and the time of day unless it is midnight."""
    if nanoseconds in _ALWAYS:
        return 'open'
    stamp = pd.Timestamp(nanoseconds)
    text = stamp.strftime('%Y%m%d')
    if nanoseconds % _DAY:
        text += stamp.strftime('T%H%M%S')
        fraction = nanoseconds % 1_000_000_000
        if fraction:
            text += f'{fraction:09d}' if fraction % 1000 else f'{fraction // 1000:06d}'
    return text
