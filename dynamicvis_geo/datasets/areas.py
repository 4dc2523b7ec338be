"""Areas and windows of time, in all the forms that users have them in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import antimeridian
import geopandas as gpd
import numpy as np
import shapely
from numpy.typing import NDArray
from pyproj import CRS
from pyproj.exceptions import CRSError
from shapely.affinity import translate
from shapely.geometry.base import BaseGeometry
from upath import UPath

from dynamicvis_geo.datasets.vector_files import read_vector
from dynamicvis_geo.errors import SourceError, SpecError
from dynamicvis_geo.paths import input_path, is_url
from dynamicvis_geo.projections import lonlat_centre, utm_crs
from dynamicvis_geo.specs import BBox, PointBuffer, TemporalSpec

#: A shapely geometry, a GeoSeries or GeoDataFrame, a spec, a path, or text.
Area: TypeAlias = Any
Window: TypeAlias = TemporalSpec | tuple[str, str]

#: Length of a degree of the equator on the WGS 84 ellipsoid in metres.
METRES_PER_DEGREE = 111319.49079327358

#: Pieces into which a side of an area's extent is cut before it is projected, so that
#: straight sides become the curves that they are in the other CRS.
PIECES = 64
#: Length of such a piece in metres, where an area is drawn in degrees: its chord then
#: keeps within a centimetre of the curve. Of very large areas there are fewer pieces.
PIECE, MOST_PIECES = 250.0, 4096
#: Letters of a text that an error repeats.
SHOWN = 80


def read_area(roi: Area) -> gpd.GeoSeries:
    """Read an area of interest.

    Args:
        roi: A shapely geometry (EPSG:4326), a GeoSeries or GeoDataFrame, a spec, the
            path of a vector file, or text: WKT (EPSG:4326) or
            ``minlon,minlat,maxlon,maxlat``.

    Returns:
        Its geometries, valid and not empty, in the CRS that they came in. Polygons in
        longitude and latitude that cross the antimeridian are cut there.

    Raises:
        SpecError: If there is no area in it.
    """
    if isinstance(roi, BBox | PointBuffer):
        return roi.geometry
    if isinstance(roi, str | os.PathLike | UPath):
        text = str(roi)
        try:
            return read_area(_from_text(text))
        except (SpecError, SourceError) as error:
            short = text if len(text) <= SHOWN else f'{text[:SHOWN]}...'
            reason = str(error).removeprefix('roi ').removeprefix(f'{text}: ')
            raise SpecError(f'roi={short!r}: {reason}') from error
    if isinstance(roi, BaseGeometry):
        series = gpd.GeoSeries([roi], crs='EPSG:4326')
    elif isinstance(roi, gpd.GeoSeries | gpd.GeoDataFrame):
        series = gpd.GeoSeries(roi.geometry.array, crs=roi.crs)
    else:
        raise SpecError(
            f'roi is a {type(roi).__name__}: give a shapely geometry, a GeoDataFrame, '
            'a spec, or the path of a vector file.'
        )
    if series.crs is None:
        raise SpecError(
            'roi has no CRS: name it in the file, or with roi.set_crs(...).'
        )
    series = series[~(series.isna() | series.is_empty)].reset_index(drop=True)
    if series.empty:
        raise SpecError('roi has no geometry in it: give one that has an area.')
    series = series.force_2d()
    if not np.isfinite(shapely.get_coordinates(series.to_numpy())).all():
        raise SpecError('roi has coordinates that are not finite: correct them.')
    if series.crs.is_geographic:
        series = series.apply(_wrap)
    return series.make_valid()


def project_area(area: gpd.GeoSeries, crs: CRS) -> gpd.GeoSeries:
    """Project an area, keeping the course of its sides.

    Raises:
        SpecError: If the area reaches beyond what the CRS can describe.
    """
    if area.crs == crs:
        return area
    if crs == 'EPSG:4326':
        return lonlat_area(area)
    longest = _extent(area) / PIECES
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
        area: As :func:`read_area` gives it.

    Returns:
        Its geometries in EPSG:4326, cut at the antimeridian, and reaching to the poles
        that they surround.

    Raises:
        SpecError: If the area reaches beyond what its CRS can describe.
    """
    if area.crs.is_geographic:
        return area if area.crs == 'EPSG:4326' else read_area(area.to_crs('EPSG:4326'))
    metres = PIECE / area.crs.axis_info[0].unit_conversion_factor
    piece = max(metres, _extent(area) / MOST_PIECES)
    # The side of a ring on which its inside lies is all that tells a polar cap from
    # the rest of the globe.
    oriented = shapely.orient_polygons(area.segmentize(piece).to_numpy())
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


def local_crs(area: gpd.GeoSeries) -> CRS:
    """The UTM zone (UPS at the poles) in the middle of an area."""
    if area.crs.to_epsg() in _UTM_CODES and len(area) == 1:
        return read_crs(area.crs)
    return utm_crs(*lonlat_centre(lonlat_area(area).union_all()))


_UTM_CODES = {*range(32601, 32662), *range(32701, 32762)}


def read_crs(crs: Any) -> CRS:
    """Read a CRS given as an EPSG code, WKT, or anything else that pyproj knows."""
    try:
        return CRS.from_user_input(crs)
    except CRSError as error:
        raise SpecError(
            f"crs={crs!r} is no CRS: give an EPSG code, such as 'EPSG:32632', or WKT."
        ) from error


def read_resolution(
    res: float | tuple[float, float] | None, scale_m: float, crs: CRS
) -> tuple[float, float]:
    """Return the width and height of a pixel in units of a CRS.

    Args:
        res: One number for both, a pair, or None.
        scale_m: The size in metres if *res* is None.
        crs: The CRS.

    Raises:
        SpecError: If *res* is not positive.
    """
    if res is None:
        unit = crs.axis_info[0].unit_conversion_factor
        # The factor of angular units leads to radians.
        metres = METRES_PER_DEGREE * np.degrees(unit) if crs.is_geographic else unit
        return (float(scale_m / metres),) * 2
    pair = tuple(res) if isinstance(res, Sequence) else (res, res)
    if len(pair) != 2 or not all(
        isinstance(side, int | float) and np.isfinite(side) and side > 0
        for side in pair
    ):
        raise SpecError(f'res={res!r} is not a positive number, or a pair of them.')
    return float(pair[0]), float(pair[1])


def read_windows(time: Window | Sequence[Window]) -> list[TemporalSpec]:
    """Read one window of time, or a list of them.

    Args:
        time: A (start, end) pair of dates, the end exclusive; a spec; or a list.

    Raises:
        SpecError: If it is neither, or has no window in it.
    """
    if isinstance(time, TemporalSpec):
        return [time]
    if isinstance(time, str) or not isinstance(time, Sequence) or not len(time):
        raise _no_window(time)
    if len(time) == 2 and not isinstance(time[0], TemporalSpec | tuple | list):
        return [TemporalSpec(*_pair(time))]
    return [
        window if isinstance(window, TemporalSpec) else TemporalSpec(*_pair(window))
        for window in time
    ]


def _pair(window: Any) -> tuple[Any, Any]:
    if isinstance(window, str) or not isinstance(window, Sequence) or len(window) != 2:
        raise _no_window(window)
    return window[0], window[1]


def _no_window(time: Any) -> SpecError:
    return SpecError(
        f"time={time!r} is no window: give (start, end), such as ('2024-06-01', "
        "'2024-09-01'), a TemporalSpec, or a list of them."
    )


def _from_text(text: str) -> gpd.GeoSeries:
    # WKT may be longer than a name can be.
    if is_url(text) or os.path.exists(text):
        table = read_vector(
            input_path(text), 'give a vector file with polygons, such as a GeoPackage'
        )
        return table.geometry
    try:
        edges = [float(number) for number in text.split(',')]
    except ValueError:
        edges = []
    if len(edges) == 4:
        return BBox(*edges).geometry
    try:
        return gpd.GeoSeries([shapely.from_wkt(text)], crs='EPSG:4326')
    except shapely.GEOSException as error:
        raise SpecError(
            'it is neither a file that exists, nor WKT, nor '
            'minlon,minlat,maxlon,maxlat: give one of these'
        ) from error


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
