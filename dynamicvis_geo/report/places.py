"""A map of places as SVG, which a browser draws, zooms and prints without a network."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from matplotlib.colors import to_hex
from numpy.typing import NDArray
from pyproj import Geod

from dynamicvis_geo.formats.base import spread
from dynamicvis_geo.plotting.cartography import degrees, extent_words, metres_per_degree
from dynamicvis_geo.plotting.colours import Picture
from dynamicvis_geo.plotting.footprints import split_parts, uncut

#: Places and failures that are drawn, at most.
PLACES, FAILURES = 2_000, 300

# Units across the view box; a desktop shows about a pixel a unit.
_WIDTH = 720.0
# Most corners of a footprint; others become their bounding box.
_CORNERS = 64
# Footprints smaller than this, in units, get a thick outline in their own colour.
_SMALLEST = 4.0
# Most characters of what is told of a place.
_TITLE = 200
_WGS84 = Geod(ellps='WGS84')


@dataclass(frozen=True)
class Mark:
    """A place on the map.

    Attributes:
        path: Its outline, as data of an SVG path; of a point one of no length.
        colour: Such as '#1f77b4'.
        title: Told of it.
    """

    path: str
    colour: str
    title: str


@dataclass(frozen=True)
class Cross:
    """A failure on the map: where it is, and what is told of it."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class PlaceMap:
    """A map of places, north up, in the plate carrée of its middle latitude.

    Attributes:
        alt: What it shows, for those who cannot see it.
        width: Of the view box, units.
        height: Of the view box, units.
        marks: Places, those to be drawn last on top.
        crosses: Failures.
        small: Whether footprints are too small to be seen without a thick outline.
        extent: CRS, longitudes and latitudes of all places, in words.
        bar: Length of the scale bar as a share of the width.
        bar_metres: The same on the ground, at the middle latitude.
        bar_at: That latitude in words, where the scale differs much over the map.
        thinned: What part of the places is drawn, in words; '' for all.
        hidden: Whether some places lie exactly under others.
    """

    alt: str
    width: float
    height: float
    marks: list[Mark]
    crosses: list[Cross]
    small: bool
    extent: str
    bar: float
    bar_metres: float
    bar_at: str
    thinned: str
    hidden: bool

    @property
    def bar_length(self) -> str:
        """Length of the scale bar in words."""
        if self.bar_metres >= 1000:
            return f'{self.bar_metres / 1000:g} km'
        return f'{self.bar_metres:g} m'


def place_map(
    what: str,
    shapes: NDArray[np.object_],
    colours: Picture,
    title: Callable[[int], str],
    failed: NDArray[np.object_],
    message: Callable[[int], str],
) -> PlaceMap | None:
    """Draw places, or some at even distances if there are many.

    A map across the antimeridian is not torn apart.

    Args:
        what: What the places are, such as 'chips'.
        shapes: Shapely geometries in EPSG:4326, ``[N]``; None and empty ones are left
            out.
        colours: ``[N, 3]`` in 0..1.
        title: Gives what is told of a place, by its number.
        failed: Geometries of failures, ``[M]``.
        message: Gives what is told of a failure, by its number.

    Returns:
        The map; None if nothing has a place.
    """
    chosen, crossed = spread(len(shapes), PLACES), spread(len(failed), FAILURES)
    parts, owner = split_parts(shapes[chosen])
    broken, whose = split_parts(failed[crossed])
    if not len(parts) + len(broken):
        return None
    together = uncut(np.concatenate([parts, broken]))
    frame = _Frame.around(shapely.bounds(together))
    drawn = frame.project(together)
    parts, broken = drawn[: len(parts)], drawn[len(parts) :]
    outlines = [''] * len(chosen)
    for part, place in zip(parts, owner, strict=True):
        outlines[place] += _path(part)
    marks = [
        Mark(outline, to_hex(colours[row]), title(row)[:_TITLE])
        for outline, row in zip(outlines, chosen, strict=True)
        if outline
    ]
    crosses = [
        Cross(
            round(middle.x, 1), round(middle.y, 1), message(crossed[failure])[:_TITLE]
        )
        for middle, failure in zip(shapely.centroid(broken), whose, strict=True)
    ]
    boxes = shapely.bounds(parts)
    sides = (boxes[:, 2:] - boxes[:, :2]).min(axis=1)
    thinned = [
        f'{len(rows):,} of {total:,} {name}'
        for name, rows, total in (
            (what, chosen, len(shapes)),
            ('failures', crossed, len(failed)),
        )
        if len(rows) < total
    ]
    alt = f'Map in longitude and latitude with the places of {len(shapes):,} {what}'
    if len(failed):
        alt += f' and of {len(failed):,} failures'
    return PlaceMap(
        alt,
        _WIDTH,
        frame.height,
        marks,
        crosses,
        bool(len(sides)) and float(np.median(sides)) < _SMALLEST,
        extent_words('EPSG:4326', (frame.west, frame.south, frame.east, frame.north)),
        frame.bar_metres / (frame.metres * _WIDTH),
        frame.bar_metres,
        degrees(frame.middle, 'NS', 0) if frame.tall else '',
        ' and '.join(thinned),
        len({mark.path for mark in marks}) < len(marks),
    )


@dataclass(frozen=True)
class _Frame:
    """The box that is drawn, in degrees, and how it is drawn."""

    west: float
    south: float
    east: float
    north: float
    #: Units a degree of longitude and of latitude.
    scale: tuple[float, float]
    #: Left and upper margin, units.
    margin: tuple[float, float]
    height: float
    #: Metres a unit.
    metres: float

    @classmethod
    def around(cls, boxes: NDArray[np.float64]) -> '_Frame':
        west, south = boxes[:, :2].min(axis=0)
        east, north = boxes[:, 2:].max(axis=0)
        middle = (south + north) / 2
        low, high = max(middle - 0.5, -90), min(middle + 0.5, 90)
        _, _, across = _WGS84.inv(0, middle, 1, middle)
        _, _, along = _WGS84.inv(0, low, 0, high)
        along /= high - low
        # At the poles a degree of longitude has no length; the map must have a width.
        across = max(across, 0.05 * along)
        wide, tall = (east - west) * across, (north - south) * along
        # A single point gets a kilometre around it.
        margin = max(0.04 * max(wide, tall), 500.0 if max(wide, tall) < 1.0 else 1.0)
        wide, tall = wide + 2 * margin, tall + 2 * margin
        # Neither a thread nor higher than a screen.
        full_wide, full_tall = max(wide, tall / 1.1), max(tall, 0.3 * wide)
        metres = full_wide / _WIDTH
        return cls(
            west,
            south,
            east,
            north,
            (across / metres, along / metres),
            (
                (margin + (full_wide - wide) / 2) / metres,
                (margin + (full_tall - tall) / 2) / metres,
            ),
            round(full_tall / metres, 1),
            metres,
        )

    @property
    def middle(self) -> float:
        return (self.south + self.north) / 2

    @property
    def tall(self) -> bool:
        return metres_per_degree(self.south, self.north) is None

    @property
    def bar_metres(self) -> float:
        """A round length, about a fifth of the width."""
        about = 0.25 * self.metres * _WIDTH
        power = 10.0 ** math.floor(math.log10(about))
        return max(step * power for step in (1, 2, 5) if step * power <= about)

    def project(self, shapes: NDArray[np.object_]) -> NDArray[np.object_]:
        """Return geometries in units from the upper left corner."""
        corner, signs = (self.west, self.north), (1, -1)
        projected: NDArray[np.object_] = shapely.transform(
            shapes,
            lambda lonlat: (
                (lonlat - corner) * np.multiply(self.scale, signs) + self.margin
            ),
        )
        return projected


def _path(shape: Any) -> str:
    """Write a geometry as data of an SVG path, to a thousandth of a unit."""
    if shape.geom_type == 'Polygon':
        west, south, east, north = shape.bounds
        # The sides of a chip bend, by less than one can see.
        shape = shape.exterior.simplify(0.01 * min(east - west, north - south))
        if len(shape.coords) > _CORNERS:
            shape = shapely.box(west, south, east, north).exterior
    corners = [f'{x:.6g} {y:.6g}' for x, y in np.round(shape.coords, 3)]
    if len(corners) == 1:
        return f'M{corners[0]}h0'
    return f'M{"L".join(corners[:-1])}z'
