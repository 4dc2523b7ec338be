"""Footprints of chips, and areas on the Earth, cut at the antimeridian."""

from __future__ import annotations

from functools import lru_cache

import antimeridian
import geopandas as gpd
import numpy as np
import shapely
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from shapely.affinity import translate
from shapely.geometry.base import BaseGeometry

from dynamicvis_geo.errors import SpecError

Floats = NDArray[np.float64]

#: Parts into which a side of an area's extent is cut before it is projected, so that
#: straight sides become the curves that they are in the other CRS.
SEGMENTS = 64
#: Length of such a part in metres, where an area is drawn in degrees: its chord then
#: keeps within a centimetre of the curve. Of very large areas there are fewer parts.
SEGMENT_M, MOST_SEGMENTS = 250.0, 4096

#: Most by which a footprint may depart from the true outline of a chip, in pixels.
MOST_DEPARTURE = 0.1
#: The most parts a side of a chip is cut into.
MOST_PARTS = 256


def to_lonlat(crs: CRS, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Transform coordinates to EPSG:4326, longitudes within -180..180 degrees.

    What lies outside the reach of the CRS becomes NaN.

    Args:
        crs: CRS of the coordinates.
        x: Eastings or longitudes.
        y: Northings or latitudes, of the same shape.

    Returns:
        Longitudes and latitudes, degrees.
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
    """Return the footprints of chips: polygons in EPSG:4326.

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
        fine = _deviation(ring) <= MOST_DEPARTURE * _pixel(ring, shape[pending])
        fine |= ~np.isfinite(ring).all(axis=(1, 2)) | (pieces >= MOST_PARTS)
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


def project_area(area: gpd.GeoSeries, crs: CRS) -> gpd.GeoSeries:
    """Project an area, keeping the course of its sides.

    Args:
        area: Geometries with a CRS.
        crs: CRS to project to.

    Returns:
        The geometries in that CRS.

    Raises:
        SpecError: If the area reaches beyond what the CRS can describe.
    """
    if area.crs == crs:
        return area
    if crs == 'EPSG:4326':
        return lonlat_area(area)
    longest = _extent(area) / SEGMENTS
    projected = (area.segmentize(longest) if longest > 0 else area).to_crs(crs)
    if not np.isfinite(projected.total_bounds).all():
        raise SpecError(
            f'roi cannot be described in {crs.to_string()}: name another crs, or split '
            'the area.'
        )
    # Parts on both sides of the antimeridian join up again.
    return projected.make_valid().apply(shapely.unary_union)


def lonlat_area(area: gpd.GeoSeries) -> gpd.GeoSeries:
    """Draw an area in longitude and latitude, keeping the course of its sides.

    Args:
        area: As :func:`~.requests.read_area` gives it.

    Returns:
        Its geometries in EPSG:4326, cut at the antimeridian, and reaching to the poles
        that they surround.

    Raises:
        SpecError: If the area reaches beyond what its CRS can describe.
    """
    if area.crs.is_geographic:
        return area if area.crs == 'EPSG:4326' else wrap_area(area.to_crs('EPSG:4326'))
    metres = SEGMENT_M / area.crs.axis_info[0].unit_conversion_factor
    length = max(metres, _extent(area) / MOST_SEGMENTS)
    # The side of a ring on which its inside lies is all that tells a polar cap from
    # the rest of the globe.
    oriented = shapely.orient_polygons(area.segmentize(length).to_numpy())
    drawn = gpd.GeoSeries(oriented, crs=area.crs).to_crs('EPSG:4326')
    if not np.isfinite(shapely.get_coordinates(drawn.to_numpy())).all():
        raise SpecError(
            f'roi reaches beyond what its CRS, {area.crs.to_string()}, can describe: '
            'cut it, or give it in EPSG:4326.'
        )
    return drawn.apply(_cut).make_valid()


def _extent(area: gpd.GeoSeries) -> float:
    """Longest side of the extent of any polygon, line or point."""
    west, south, east, north = shapely.bounds(shapely.get_parts(area.to_numpy())).T
    return float(np.maximum(east - west, north - south).max())


def wrap_area(area: gpd.GeoSeries) -> gpd.GeoSeries:
    """Bring geometries in degrees within -180..180, cut at the antimeridian.

    Args:
        area: Geometries in EPSG:4326; longitudes may count on beyond 180 degrees.

    Returns:
        The same area.

    Raises:
        SpecError: If they have coordinates that are no longitude and latitude.
    """
    return area.apply(_wrap).make_valid()


def _wrap(geometry: BaseGeometry) -> BaseGeometry:
    """Bring longitudes within -180..180 degrees, cutting at the antimeridian.

    A side that spans more than half of the globe is taken to go the other way round,
    unless it goes all around.
    """
    west, south, east, north = geometry.bounds
    if south < -90 or north > 90 or west < -360 or east > 360:
        raise SpecError(
            f'roi reaches from {west:g}, {south:g} to {east:g}, {north:g}, which is no '
            'longitude and latitude: the order is longitude first, and other '
            'coordinates need a file that names their CRS.'
        )
    parts = [_unroll(part) for part in _single(geometry)]
    west, _, east, _ = shapely.total_bounds(parts)
    if west >= -180 and east <= 180:
        return geometry
    parts = _single(shapely.GeometryCollection(list(shapely.make_valid(parts))))
    world = shapely.box(-180, -90, 180, 90)
    turned = [
        (translate(part, turn).intersection(world), shapely.get_dimensions(part))
        for part in parts
        for turn in (-360, 0, 360)
    ]
    # What touches the antimeridian from afar is no part of the other side.
    return shapely.unary_union(
        [part for part, kind in turned if shapely.get_dimensions(part) == kind]
    )


def _unroll(part: BaseGeometry) -> BaseGeometry:
    """Let longitudes count on where a side jumps over the antimeridian."""
    lon = shapely.get_coordinates(part)[:, 0]
    if not 180 < np.abs(np.diff(lon, prepend=lon[0])).max() < 360:
        return part
    if isinstance(part, shapely.LineString):
        return shapely.LineString(_counted_on(part))
    # A hole starts on the same turn of the globe as the outline around it.
    outline = _counted_on(part.exterior)
    holes = [_counted_on(ring, outline[:, 0].mean()) for ring in part.interiors]
    return shapely.Polygon(outline, holes)


def _counted_on(
    line: shapely.LineString, near: float | None = None
) -> NDArray[np.float64]:
    """Return a line without jumps, ``[n, 2]``, on the turn of the globe nearest."""
    lon, lat = np.asarray(line.coords)[:, :2].T
    lon = np.unwrap(lon, period=360)
    if near is not None:
        lon += 360 * np.round((near - lon.mean()) / 360)
    return np.stack([lon, lat], axis=1)


def _cut(geometry: BaseGeometry) -> BaseGeometry:
    """Cut at the antimeridian what was drawn finely in another CRS."""
    parts = []
    for part in _single(geometry):
        if isinstance(part, shapely.Polygon):
            lon = np.asarray(part.exterior.coords)[:, 0]
            if np.abs(np.diff(lon)).max() > 180:
                part = antimeridian.fix_polygon(
                    part, fix_winding=False, great_circle=False
                )
            parts.append(part)
        else:
            parts.append(_wrap(part))
    return shapely.unary_union(shapely.make_valid(parts))


def _single(geometry: BaseGeometry) -> list[BaseGeometry]:
    """Return the points, lines and polygons of a geometry, however deep they lie."""
    parts = shapely.get_parts(shapely.get_parts(geometry))
    return [part for part in parts.tolist() if not part.is_empty]
