"""Where chips lie on the Earth, in longitude and latitude."""

from __future__ import annotations

from functools import lru_cache

import antimeridian
import numpy as np
import shapely
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from shapely.geometry.base import BaseGeometry

Floats = NDArray[np.float64]

#: How far a footprint may depart from the true outline of a chip, in pixels.
TOLERANCE = 0.1
#: The most pieces a side is cut into.
MAX_PIECES = 256


def to_lonlat(crs: CRS, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Transform coordinates to EPSG:4326, longitudes within -180..180 degrees.

    What lies outside the reach of the CRS becomes NaN.
    """
    lon, lat = _transformer(crs).transform(x, y)
    lon, lat = np.asarray(lon, dtype=np.float64), np.asarray(lat, dtype=np.float64)
    beyond = ~(np.isfinite(lon) & np.isfinite(lat))
    lon, lat = np.where(beyond, np.nan, lon), np.where(beyond, np.nan, lat)
    wrapped = np.where(np.abs(lon) > 180, (lon + 180) % 360 - 180, lon)
    return wrapped, np.clip(lat, -90, 90)


def footprints(
    crs: CRS, bounds: Floats, shape: NDArray[np.int64]
) -> NDArray[np.object_]:
    """Return the outlines of chips as polygons in EPSG:4326.

    Sides that bend in longitude and latitude are cut into as many pieces as keep the
    polygon within a tenth of a pixel of the true outline. A chip across the
    antimeridian becomes a MultiPolygon cut there; a chip over a pole reaches the pole.

    Args:
        crs: CRS of the chips.
        bounds: (minx, miny, maxx, maxy) of each chip, ``[n, 4]``.
        shape: (height, width) of each chip in pixels, ``[n, 2]``.
    """
    result = np.empty(len(bounds), dtype=object)
    if crs.is_geographic:
        # Sides stay straight, and longitudes past 180 degrees go on counting.
        result[:] = [_wrap_box(*_degrees(crs, box)) for box in bounds]
        return result
    pending = np.arange(len(bounds))
    pieces = 1
    while len(pending):
        ring = _ring(crs, bounds[pending], 2 * pieces)
        fine = _deviation(ring) <= TOLERANCE * _pixel(ring, shape[pending])
        fine |= ~np.isfinite(ring).all(axis=(1, 2)) | (pieces >= MAX_PIECES)
        result[pending[fine]] = _polygons(ring[fine, ::2])
        pending = pending[~fine]
        pieces *= 2
    return result


@lru_cache(maxsize=64)
def _transformer(crs: CRS) -> Transformer:
    return Transformer.from_crs(crs, 'EPSG:4326', always_xy=True)


def _degrees(crs: CRS, box: Floats) -> tuple[float, float, float, float]:
    lon, lat = _transformer(crs).transform(box[[0, 2]], box[[1, 3]])
    return lon[0], max(lat[0], -90.0), lon[1], min(lat[1], 90.0)


def _wrap_box(west: float, south: float, east: float, north: float) -> BaseGeometry:
    """Return a box whose longitudes may pass 180 degrees as polygons within them."""
    if east - west >= 360:
        return shapely.box(-180, south, 180, north)
    turns = [
        shapely.box(max(west + turn, -180), south, min(east + turn, 180), north)
        for turn in (-360, 0, 360)
        if min(east + turn, 180) > max(west + turn, -180)
    ]
    return turns[0] if len(turns) == 1 else shapely.MultiPolygon(turns)


def _ring(crs: CRS, bounds: Floats, pieces: int) -> Floats:
    """Return outlines from the south-west, eastwards: ``[n, 4 * pieces, 2]``."""
    west, south, east, north = bounds.T
    corners = np.stack(
        [
            np.stack([west, east, east, west], axis=1),
            np.stack([south, south, north, north], axis=1),
        ],
        axis=2,
    )
    share = (np.arange(pieces) / pieces)[None, None, :, None]
    following = np.roll(corners, -1, axis=1)
    points = corners[:, :, None] + (following - corners)[:, :, None] * share
    points = points.reshape(len(bounds), -1, 2)
    return np.stack(to_lonlat(crs, points[..., 0], points[..., 1]), axis=2)


def _ground(step: Floats, lat: Floats) -> Floats:
    """Return the length of steps in longitude and latitude, in degrees of arc."""
    lon = (step[..., 0] + 180) % 360 - 180
    length: Floats = np.hypot(lon * np.cos(np.radians(lat)), step[..., 1])
    return length


def _deviation(ring: Floats) -> Floats:
    """Return how far the odd points lie from the middle of the chord across them."""
    first, middle = ring[:, ::2], ring[:, 1::2]
    last = np.roll(first, -1, axis=1)
    lat = middle[..., 1]
    chord = last - first
    chord[..., 0] = (chord[..., 0] + 180) % 360 - 180
    deviation: Floats = _ground(middle - (first + chord / 2), lat).max(axis=1)
    return deviation


def _pixel(ring: Floats, shape: NDArray[np.int64]) -> Floats:
    """Return the smaller side of a pixel on the ground, in degrees of arc."""
    step = np.roll(ring, -1, axis=1) - ring
    sides = _ground(step, ring[..., 1]).reshape(len(ring), 4, -1).sum(axis=2)
    pixel: Floats = np.minimum(
        sides[:, [0, 2]].min(axis=1) / shape[:, 1],
        sides[:, [1, 3]].min(axis=1) / shape[:, 0],
    )
    return pixel


def _polygons(rings: Floats) -> NDArray[np.object_]:
    """Return outlines as polygons, cut at the antimeridian: ``[n, points, 2]``."""
    steps = np.abs(np.diff(rings[..., 0], axis=1, append=rings[:, :1, 0]))
    plain = np.isfinite(rings).all(axis=(1, 2)) & (steps <= 180).all(axis=1)
    polygons = np.empty(len(rings), dtype=object)
    polygons[plain] = shapely.polygons(rings[plain])
    polygons[~plain] = [_polygon(ring) for ring in rings[~plain]]
    return polygons


def _polygon(ring: Floats) -> BaseGeometry:
    """Return one outline as a polygon, cut at the antimeridian."""
    ring = ring[np.isfinite(ring).all(axis=1)]
    if len(ring) < 3:
        return shapely.Polygon()
    polygon = shapely.Polygon(ring)
    steps = np.abs(np.diff(ring[:, 0], append=ring[0, 0]))
    if (steps > 180).any():
        # Chips keep the counter-clockwise order of their CRS, so it needs no fixing.
        polygon = antimeridian.fix_polygon(
            polygon, fix_winding=False, great_circle=False
        )
    return polygon
