"""Areas and windows of time, in all the forms that users have them in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from pyproj import CRS
from pyproj.exceptions import CRSError
from shapely.affinity import translate
from shapely.geometry.base import BaseGeometry

from dynamicvis_geo.errors import SpecError
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
    if isinstance(roi, BaseGeometry):
        series = gpd.GeoSeries([roi], crs='EPSG:4326')
    elif isinstance(roi, gpd.GeoSeries | gpd.GeoDataFrame):
        series = gpd.GeoSeries(roi.geometry.array, crs=roi.crs)
    elif isinstance(roi, str | os.PathLike):
        series = _from_text(roi)
    else:
        raise SpecError(
            f'roi is a {type(roi).__name__}: give a shapely geometry, a GeoDataFrame, '
            'a spec, or the path of a vector file.'
        )
    if series.crs is None:
        raise SpecError('roi has no CRS: set it with roi.set_crs(...).')
    series = series[~(series.isna() | series.is_empty)].reset_index(drop=True)
    if series.empty:
        raise SpecError('roi has no geometry in it.')
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
    west, south, east, north = area.total_bounds
    longest = max(east - west, north - south) / PIECES
    projected = (area.segmentize(longest) if longest > 0 else area).to_crs(crs)
    if not np.isfinite(projected.total_bounds).all():
        raise SpecError(
            f'roi cannot be described in {crs.to_string()}: name another crs, or split '
            'the area.'
        )
    # Parts on both sides of the antimeridian join up again.
    return projected.make_valid().apply(shapely.unary_union)


def local_crs(area: gpd.GeoSeries) -> CRS:
    """The UTM zone (UPS at the poles) in the middle of an area."""
    if area.crs.to_epsg() in _UTM_CODES and len(area) == 1:
        return read_crs(area.crs)
    lonlat = area.to_crs('EPSG:4326')
    return utm_crs(*lonlat_centre(lonlat.union_all()))


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


@lru_cache(maxsize=4096)
def moments(start: Any, stop: Any) -> tuple[str, str]:
    """First moment, and first moment after, of a closed interval, in ISO form.

    Earth Engine counts milliseconds: the end of an interval, which TorchGeo puts one
    microsecond before that of its window, is rounded up to them.
    """
    start, stop = (
        time.tz_convert('UTC').tz_localize(None) if time.tzinfo else time
        for time in (pd.Timestamp(start), pd.Timestamp(stop))
    )
    first = start.floor('ms')
    after = max(stop.ceil('ms'), first + pd.Timedelta(milliseconds=1))
    return _iso(first), _iso(after)


def _iso(time: pd.Timestamp) -> str:
    if time == time.normalize():
        return str(time.date())
    return time.isoformat(timespec='milliseconds')


def _from_text(roi: str | os.PathLike[str]) -> gpd.GeoSeries:
    text = os.fspath(roi)
    if Path(text).exists():
        try:
            return gpd.GeoSeries(gpd.read_file(text).geometry)
        except (OSError, ValueError, RuntimeError, AttributeError) as error:
            raise SpecError(
                f'roi={text!r} is no vector file that can be read ({error}).'
            ) from error
    numbers = text.split(',')
    if len(numbers) == 4:
        try:
            return BBox(*map(float, numbers)).geometry
        except ValueError as error:
            raise SpecError(f'roi={text!r}: {error}') from error
    try:
        return gpd.GeoSeries([shapely.from_wkt(text)], crs='EPSG:4326')
    except shapely.GEOSException as error:
        raise SpecError(
            f'roi={text!r} is neither a file, nor WKT, nor minlon,minlat,maxlon,maxlat.'
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
            'longitude and latitude: the order is longitude first.'
        )
    polygons = [part for part in shapely.get_parts(geometry) if part.area > 0]
    if not polygons:
        return geometry
    unrolled = shapely.unary_union([_unroll(polygon) for polygon in polygons])
    west, _, east, _ = unrolled.bounds
    if west >= -180 and east <= 180:
        return geometry
    world = shapely.box(-180, -90, 180, 90)
    turns = [translate(unrolled, turn).intersection(world) for turn in (-360, 0, 360)]
    return shapely.unary_union([turn for turn in turns if turn.area > 0])


def _unroll(polygon: shapely.Polygon) -> shapely.Polygon:
    """Let longitudes count on where a side jumps over the antimeridian."""
    outline = np.asarray(polygon.exterior.coords)[:, :2]
    if not 180 < np.abs(np.diff(outline[:, 0])).max() < 360:
        return polygon
    rings: list[NDArray[np.float64]] = []
    for ring in (polygon.exterior, *polygon.interiors):
        lon, lat = np.asarray(ring.coords)[:, :2].T
        lon = np.unwrap(lon, period=360)
        # A hole starts on the same turn of the globe as the outline around it.
        if rings:
            lon += 360 * np.round((rings[0][:, 0].mean() - lon.mean()) / 360)
        rings.append(np.stack([lon, lat], axis=1))
    return shapely.Polygon(rings[0], rings[1:])
