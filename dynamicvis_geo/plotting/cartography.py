"""The scale bar, north, CRS and extent of a map."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.offsetbox import (
    AnchoredOffsetbox,
    AuxTransformBox,
    DrawingArea,
    HPacker,
    TextArea,
)
from matplotlib.patches import Polygon, Rectangle
from matplotlib.transforms import blended_transform_factory
from pyproj import CRS, Geod

from dynamicvis_geo.errors import SpecError

#: A scale bar may be this wrong somewhere on the map, as a share of its length.
SCALE_TOLERANCE = 0.1

_WGS84 = Geod(ellps='WGS84')
# Of the bar, inches.
_HEIGHT = 0.04
_SMALL = 7


def metres_per_degree(south: float, north: float) -> float | None:
    """Measure a degree of longitude on the ground, in the middle of a map.

    Args:
        south: The least latitude of the map, degrees.
        north: The greatest one.

    Returns:
        Metres; None where the map is so high or so near a pole that a degree at its
        lower or upper edge is more than a tenth longer or shorter.
    """
    latitudes = np.clip([south, (south + north) / 2, north], -90, 90)
    lower, middle, upper = (
        _WGS84.inv(0, latitude, 0.01, latitude)[2] * 100 for latitude in latitudes
    )
    if max(abs(lower - middle), abs(upper - middle)) > SCALE_TOLERANCE * middle:
        return None
    return float(middle)


def draw_scale_bar(axes: Axes, metres_per_unit: float) -> str:
    """Draw a bar of a round length above the left end of a map, which it leaves free.

    It is drawn in units of the axes, so it stays true when the figure is resized; set
    the limits before.

    Args:
        axes: Those of the map, with their limits.
        metres_per_unit: Metres on the ground of a unit of the x axis.

    Returns:
        Its length in words, such as '5 km'.

    Raises:
        SpecError: If the length of a unit is not positive.
    """
    if not metres_per_unit > 0:
        raise SpecError(f'metres_per_unit={metres_per_unit} must be positive')
    left, right = axes.get_xlim()
    most = abs(right - left) * metres_per_unit / 4
    power = 10.0 ** np.floor(np.log10(most))
    metres = float(max(step * power for step in (1, 2, 5) if step * power <= most))
    words = f'{metres / 1000:g} km' if metres >= 1000 else f'{metres:g} m'
    inches = axes.figure.dpi_scale_trans
    bar = AuxTransformBox(blended_transform_factory(axes.transData, inches))
    half = metres / metres_per_unit / 2
    for start, colour in ((0.0, 'black'), (half, 'white')):
        part = Rectangle((start, 0), half, _HEIGHT, facecolor=colour, linewidth=0.6)
        part.set_edgecolor('black')
        bar.add_artist(part)
    text = TextArea(words, textprops={'size': _SMALL})
    together = HPacker(children=[bar, text], align='center', pad=0, sep=4)
    _place_above(axes, together, 0.0)
    return words


def draw_north(axes: Axes) -> None:
    """Draw an arrow to the north above the right end of a map that is north up.

    Args:
        axes: Those of the map.
    """
    arrow = DrawingArea(7, 11)
    arrow.add_artist(
        Polygon([(3.5, 11), (7, 0), (3.5, 3), (0, 0)], facecolor='black', linewidth=0)
    )
    letter = TextArea('N', textprops={'size': _SMALL, 'weight': 'bold'})
    together = HPacker(children=[letter, arrow], align='center', pad=0, sep=2)
    _place_above(axes, together, 1.0)


def extent_words(crs: Any, bounds: tuple[float, float, float, float]) -> str:
    """Say the CRS and the extent of a map.

    Args:
        crs: Of the axes, in any way that pyproj knows.
        bounds: Least x, least y, greatest x and greatest y in its units; longitudes may
            go on beyond 180.

    Returns:
        Words such as 'EPSG:32632, WGS 84 / UTM zone 32N; 500000 to 510000 m E, 5200000
        to 5210000 m N'.
    """
    system = CRS.from_user_input(crs)
    authority = system.to_authority()
    name = f'{":".join(authority)}, {system.name}' if authority else system.name
    west, south, east, north = bounds
    if system.is_geographic:
        places = decimals(max(east - west, north - south)) + 1
        x = f'{degrees(west, "EW", places)} to {degrees(east, "EW", places)}'
        if east - west >= 360:
            x = 'all longitudes'
        y = f'{degrees(south, "NS", places)} to {degrees(north, "NS", places)}'
        return f'{name}; {x}, {y}'
    unit = system.axis_info[0].unit_name
    unit = 'm' if unit == 'metre' else unit
    x, y = f'{west:.0f} to {east:.0f}', f'{south:.0f} to {north:.0f}'
    return f'{name}; {x} {unit} E, {y} {unit} N'


def degrees(value: float, names: str, places: int) -> str:
    """Write degrees with their direction, such as '7.25°E'.

    Args:
        value: Degrees; longitudes may go on beyond 180.
        names: 'EW' for longitudes, 'NS' for latitudes.
        places: Decimals.

    Returns:
        The text; without a direction where there is none.
    """
    value = (value + 180) % 360 - 180 if names == 'EW' else value
    text = f'{abs(value):.{places}f}°'
    if (float(text[:-1]) in (0.0, 180.0) and names == 'EW') or float(text[:-1]) == 0:
        return text
    return text + names[0 if value > 0 else 1]


def decimals(span: float) -> int:
    """Return the decimals that tell ticks over a span of degrees apart."""
    return int(np.clip(np.ceil(1 - np.log10(max(span, 1e-9))), 0, 5))


def _place_above(axes: Axes, box: HPacker, x: float) -> None:
    """Place a box above the left (0) or the right (1) end of axes."""
    axes.add_artist(
        AnchoredOffsetbox(
            'lower right' if x else 'lower left',
            child=box,
            pad=0.2,
            borderpad=0,
            frameon=False,
            bbox_to_anchor=(x, 1),
            bbox_transform=axes.transAxes,
        )
    )
