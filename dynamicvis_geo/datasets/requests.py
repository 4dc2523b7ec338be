"""Areas, points, time windows and CRSs as users give them, read and checked."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from pyproj import CRS
from pyproj.exceptions import CRSError
from shapely.geometry.base import BaseGeometry
from upath import UPath

from dynamicvis_geo.datasets.footprints import lonlat_area, wrap_area
from dynamicvis_geo.datasets.vector_files import (
    EXAMPLES,
    of_rows,
    place_table,
    read_csv,
    read_vector,
)
from dynamicvis_geo.errors import SourceError, SpecError
from dynamicvis_geo.paths import (
    AnyPath,
    Place,
    input_path,
    is_url,
    kind_of,
)
from dynamicvis_geo.projections import lonlat_centre, utm_crs
from dynamicvis_geo.specs import BBox, PointBuffer, TemporalSpec

if TYPE_CHECKING:
    from torchgeo.datasets import GeoDataset

#: A shapely geometry, a GeoSeries or GeoDataFrame, a spec, a path, or text.
Area: TypeAlias = Any
Window: TypeAlias = TemporalSpec | tuple[str, str]

#: Length of a degree of the equator on the WGS 84 ellipsoid in metres.
METRES_PER_DEGREE = 111319.49079327358

#: Letters of a text that an error repeats.
LETTERS = 80

_UTM_CODES = {*range(32601, 32662), *range(32701, 32762)}


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
            short = text if len(text) <= LETTERS else f'{text[:LETTERS]}...'
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
    return wrap_area(series) if series.crs.is_geographic else series.make_valid()


def local_crs(area: gpd.GeoSeries) -> CRS:
    """Find the UTM zone (UPS at the poles) in the middle of an area.

    Args:
        area: Geometries with a CRS.
    """
    if area.crs.to_epsg() in _UTM_CODES and len(area) == 1:
        return read_crs(area.crs)
    return utm_crs(*lonlat_centre(lonlat_area(area).union_all()))


def read_crs(crs: Any) -> CRS:
    """Read a CRS.

    Args:
        crs: EPSG code, WKT, or anything else that pyproj knows.

    Raises:
        SpecError: If pyproj does not know it.
    """
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
    """Read one time window, or a list of them.

    Args:
        time: A (start, end) pair of dates, the end exclusive; a spec; or a list.

    Returns:
        The windows, each once, in the order given.

    Raises:
        SpecError: If it is neither, or has no window in it.
    """
    if isinstance(time, TemporalSpec):
        return [time]
    if isinstance(time, str) or not isinstance(time, Sequence) or not len(time):
        raise _no_window(time)
    if len(time) == 2 and not isinstance(time[0], TemporalSpec | tuple | list):
        return [TemporalSpec(*_pair(time))]
    windows = (
        window if isinstance(window, TemporalSpec) else TemporalSpec(*_pair(window))
        for window in time
    )
    return list(dict.fromkeys(windows))


def _pair(window: Any) -> tuple[Any, Any]:
    if isinstance(window, str) or not isinstance(window, Sequence) or len(window) != 2:
        raise _no_window(window)
    return window[0], window[1]


def _no_window(time: Any) -> SpecError:
    return SpecError(
        f"time={time!r} is no window: give (start, end), such as ('2024-06-01', "
        "'2024-09-01'), a TemporalSpec, or a list of them."
    )


def read_points(path: AnyPath) -> gpd.GeoDataFrame:
    """Read points from a CSV file with longitudes and latitudes, or a vector file.

    Args:
        path: A comma-separated ``.csv`` with columns ``lon`` and ``lat`` (or
            ``longitude`` and ``latitude``, or ``x`` and ``y``; in any case) in degrees
            of EPSG:4326, or any vector file that GeoPandas reads; or the URL of one. A
            column ``id`` names the points.

    Returns:
        The points with all columns of the file; EPSG:4326 for a CSV, else the CRS of
        the file.

    Raises:
        SourceError: If there is no such file, or it holds no usable points.
    """
    path = points_file(path)
    if path.suffix.lower() == '.csv':
        points = place_table(read_csv(path), path)
    else:
        points = read_vector(
            path, 'give a CSV with columns lon and lat, or a vector file of points'
        )
    problem = problem_with(points)
    if problem is not None:
        raise SourceError(f'{path}: {problem}')
    if 'id' in points:
        twice = points['id'][points['id'].duplicated()].unique()
        if len(twice):
            warnings.warn(
                f'{path}: {len(twice)} ids belong to several points, such as '
                f'{twice[0]!r}: their chips cannot be told apart by them; give every '
                'point an id of its own',
                stacklevel=2,
            )
    return points


def points_file(path: AnyPath) -> Place:
    """Return the path of a file of points.

    Raises:
        SourceError: If there is no such file.
    """
    path = input_path(path)
    if kind_of(path) != 'file':
        raise SourceError(
            f'{path}: no such file; give a CSV with columns lon and lat, or a vector '
            'file'
        )
    return path


def problem_with(points: gpd.GeoDataFrame | gpd.GeoSeries) -> str | None:
    """Find what keeps a table from being points with a place each.

    Args:
        points: The table.

    Returns:
        The problem in words; None if there is none.
    """
    if points.empty:
        return 'there are no points in it: give at least one'
    if points.crs is None:
        return "the points have no CRS: name it, as in set_crs('EPSG:4326')"
    geometry = points.geometry
    kinds = geometry.geom_type
    missing = geometry.isna() | geometry.is_empty
    shapes = geometry.values[~missing]
    # Geometries by the million take much memory: none are made where all are points.
    if (kinds[~missing] != 'Point').any():
        shapes = shapely.centroid(shapes)
    coords = shapely.get_coordinates(shapes)
    nowhere = np.flatnonzero(missing)
    if not len(nowhere):
        nowhere = np.flatnonzero(~np.isfinite(coords).all(axis=1))
    if len(nowhere):
        return f'{of_rows(nowhere)} no coordinates: remove them'
    other = np.flatnonzero(kinds != 'Point')
    if len(other):
        return (
            f'{of_rows(other)} {kinds.iloc[other[0]]} geometry, not a point: to cover '
            'areas with chips, give roi= in place of points=; for one chip each, '
            'pass points.centroid'
        )
    if 'id' in getattr(points, 'columns', ()):
        unnamed = np.flatnonzero(points['id'].isna())
        if len(unnamed):
            return (
                f"{of_rows(unnamed)} no value in column 'id': fill or drop the column"
            )
    return None


def point_ids(points: gpd.GeoDataFrame | gpd.GeoSeries) -> NDArray[np.object_]:
    """Name points by their column ``id`` where there is one, else by the index.

    Args:
        points: The points.

    Returns:
        The ids as text, one a point.
    """
    names = points['id'] if 'id' in getattr(points, 'columns', ()) else points.index
    return np.array([str(name) for name in names], dtype=object)


def describe_outside(
    points: gpd.GeoDataFrame | gpd.GeoSeries,
    outside: NDArray[np.bool_],
    areas: gpd.GeoSeries,
) -> str:
    """Name the points that lie outside all data, and the extent of the data.

    Args:
        points: All points.
        outside: bool, True for those that lie outside.
        areas: Extents of the data.
    """
    lonlat = points.geometry[outside].to_crs('EPSG:4326')
    names = point_ids(points)[outside]
    first = ', '.join(
        f'{name} ({point.x:.5f}, {point.y:.5f})'
        for name, point in zip(names[:EXAMPLES], lonlat.iloc[:EXAMPLES], strict=True)
    )
    more = ', ...' if len(names) > EXAMPLES else ''
    west, south, east, north = (
        areas.segmentize(np.ptp(areas.total_bounds[::2]) / 16 or 1.0)
        .to_crs('EPSG:4326')
        .total_bounds
    )
    return (
        f'{len(names)} of {len(points)} points lie outside the data: {first}{more} '
        f'(lon, lat); the data reaches from {west:.5f} to {east:.5f} degrees east and '
        f'from {south:.5f} to {north:.5f} degrees north: remove these points or add '
        'the images that show them'
    )


def assign_points(
    datasets: Sequence[GeoDataset], points: gpd.GeoDataFrame
) -> list[tuple[GeoDataset, gpd.GeoDataFrame]]:
    """Give each point to the datasets that show it.

    Args:
        datasets: Datasets in any CRS, such as those of :func:`open_scenes`.
        points: Points with a CRS.

    Returns:
        Pairs of a dataset and the points within the geometries of its index, in the
        order of *points*; datasets without points are left out. A point shown by
        several datasets goes to each of them.

    Raises:
        SourceError: If points lie in none of the datasets; names them.
    """
    problem = problem_with(points)
    if problem is not None:
        raise SourceError(problem)
    pairs = []
    outside = np.ones(len(points), dtype=bool)
    for dataset in datasets:
        area = dataset.index.geometry.union_all()
        shapely.prepare(area)
        places = np.asarray(points.geometry.to_crs(dataset.crs).values, dtype=object)
        inside = shapely.covers(area, places)
        outside &= ~inside
        if inside.any():
            pairs.append((dataset, points[inside]))
    if outside.any():
        areas = pd.concat(
            [dataset.index.geometry.to_crs('EPSG:4326') for dataset in datasets]
        )
        told = describe_outside(points, outside, gpd.GeoSeries(areas))
        raise SourceError(f'points: {told}')
    return pairs


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
