"""Points of interest: reading them, checking them, and finding their images."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable, Sequence

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from torchgeo.datasets import GeoDataset

from dynamicvis_geo.datasets.vector_files import read_vector
from dynamicvis_geo.errors import SourceError
from dynamicvis_geo.paths import AnyPath, Place, input_path, kind_of

LON_NAMES = ('lon', 'longitude', 'x')
LAT_NAMES = ('lat', 'latitude', 'y')

#: How many offenders an error names.
NAMED = 5


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
    path = input_path(path)
    if kind_of(path) != 'file':
        raise SourceError(
            f'{path}: no such file; give a CSV with columns lon and lat, or a vector '
            'file'
        )
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


def problem_with(points: gpd.GeoDataFrame | gpd.GeoSeries) -> str | None:
    """Say what keeps a table from being points with a place each, None if nothing."""
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
        return f'{_rows(nowhere)} no coordinates: remove them'
    other = np.flatnonzero(kinds != 'Point')
    if len(other):
        return (
            f'{_rows(other)} {kinds.iloc[other[0]]} geometry, not a point: to cover '
            'areas with chips, give roi= in place of points=; for one chip each, '
            'pass points.centroid'
        )
    if 'id' in getattr(points, 'columns', ()):
        unnamed = np.flatnonzero(points['id'].isna())
        if len(unnamed):
            return f"{_rows(unnamed)} no value in column 'id': fill or drop the column"
    return None


def point_ids(points: gpd.GeoDataFrame | gpd.GeoSeries) -> NDArray[np.object_]:
    """Return the names of points: column ``id`` where there is one, else the index."""
    names = points['id'] if 'id' in getattr(points, 'columns', ()) else points.index
    return np.array([str(name) for name in names], dtype=object)


def describe_outside(
    points: gpd.GeoDataFrame | gpd.GeoSeries,
    outside: NDArray[np.bool_],
    areas: gpd.GeoSeries,
) -> str:
    """Say which points lie outside all data, and where the data is.

    Args:
        points: All points.
        outside: Which of them lie outside.
        areas: Extents of the data.
    """
    lonlat = points.geometry[outside].to_crs('EPSG:4326')
    names = point_ids(points)[outside]
    first = ', '.join(
        f'{name} ({point.x:.5f}, {point.y:.5f})'
        for name, point in zip(names[:NAMED], lonlat.iloc[:NAMED], strict=True)
    )
    more = ', ...' if len(names) > NAMED else ''
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


def read_csv(path: Place, text: Iterable[str] = ('id',)) -> pd.DataFrame:
    """Read a comma-separated file.

    Args:
        path: The file.
        text: Columns to leave as they are written, such as ids with leading zeros.

    Raises:
        SourceError: If it cannot be read.
    """
    try:
        with path.open('rb') as file:
            table = pd.read_csv(
                file, encoding='utf-8-sig', dtype=dict.fromkeys(text, 'str')
            )
    except pd.errors.EmptyDataError as error:
        raise SourceError(
            f'{path}: the file is empty; a first line must name its columns, such as '
            'lon and lat'
        ) from error
    except (OSError, ValueError) as error:
        raise SourceError(
            f'{path}: not a readable comma-separated file ({_one_line(error)}): save '
            'it as CSV in UTF-8, with as many values in each row as there are columns'
        ) from error
    _warn_of_names(path)
    return table


def _warn_of_names(path: Place) -> None:
    """Say which columns of a CSV have the same name: pandas renames all but one."""
    with path.open(encoding='utf-8-sig', newline='') as file:
        names = [name.strip().lower() for name in next(csv.reader(file), [])]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        warnings.warn(
            f'{path}: several columns are named {", ".join(map(repr, twice))}, of '
            'which the first is used: rename the others',
            stacklevel=3,
        )


def place_table(table: pd.DataFrame, source: Place | str) -> gpd.GeoDataFrame:
    """Make points of a table with longitudes and latitudes.

    Args:
        table: The table, with columns as :func:`read_points` knows them.
        source: Where it comes from, for errors.

    Raises:
        SourceError: If it has no such columns, or there is something else in them.
    """
    lon = _coordinate(source, table, 'longitude', LON_NAMES, 180.0)
    lat = _coordinate(source, table, 'latitude', LAT_NAMES, 90.0)
    return gpd.GeoDataFrame(
        table, geometry=gpd.points_from_xy(lon, lat), crs='EPSG:4326'
    )


def _coordinate(
    path: Place | str,
    table: pd.DataFrame,
    what: str,
    names: tuple[str, ...],
    limit: float,
) -> NDArray[np.float64]:
    # Of several columns of one name the first counts.
    columns = {str(name).strip().lower(): name for name in reversed(table.columns)}
    name = next((columns[name] for name in names if name in columns), None)
    if name is None:
        found = ', '.join(str(column) for column in table.columns)
        raise SourceError(
            f'{path}: no column of {what}s, named {" or ".join(names)}; the '
            f'comma-separated columns found are: {found}; rename or separate them so'
        )
    values = pd.to_numeric(table[name], errors='coerce').to_numpy(np.float64)
    # A comparison with NaN is false: this finds what is no number as well.
    wrong = np.flatnonzero(~(np.abs(values) <= limit))
    if len(wrong):
        value = table[name].iloc[wrong[0]]
        raise SourceError(
            f'{path}: {_rows(wrong)} no {what} of -{limit:g} to {limit:g} degrees in '
            f'column {name!r} (the first is {value}): correct or remove them; '
            'projected coordinates need a vector file that names their CRS'
        )
    return values


def _rows(positions: NDArray[np.int64]) -> str:
    """Return the subject of a sentence: rows counted from one, with its verb."""
    shown = ', '.join(str(position + 1) for position in positions[:NAMED])
    if len(positions) == 1:
        return f'row {shown} has'
    more = f', ... ({len(positions)} in all)' if len(positions) > NAMED else ''
    return f'rows {shown}{more} have'


def _one_line(error: Exception) -> str:
    return ' '.join(str(error).split())
