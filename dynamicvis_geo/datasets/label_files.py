"""Files of labels: reading them, and where their labels lie."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import geopandas as gpd
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from dynamicvis_geo.datasets.areas import read_area
from dynamicvis_geo.datasets.points import place_table, read_csv
from dynamicvis_geo.datasets.vector_files import read_by_gdal
from dynamicvis_geo.errors import SourceError, SpecError, one_line
from dynamicvis_geo.paths import AnyPath, Place, input_path, kind_of, parquet_source

LabelSource: TypeAlias = AnyPath | pd.DataFrame


def name_of(labels: LabelSource) -> str:
    """Return how errors name a source of labels."""
    return 'labels' if isinstance(labels, pd.DataFrame) else str(labels)


def read_labels(labels: LabelSource, text: Iterable[str]) -> pd.DataFrame:
    """Read a table of labels, whose rows are then counted from 0.

    Args:
        labels: A CSV file, a Parquet file, any vector file, or a table.
        text: Columns of a CSV to leave as they are written: the ids.

    Raises:
        SourceError: If it cannot be read, or is empty.
    """
    if isinstance(labels, pd.DataFrame):
        table = labels
    else:
        path = input_path(labels)
        if kind_of(path) is None:
            raise SourceError(
                f'{path}: no such file; give a CSV, a Parquet file or a vector file'
            )
        try:
            table = _read(path, text)
        except (OSError, RuntimeError, ValueError, pa.ArrowException) as error:
            raise SourceError(
                f'{path}: GeoPandas cannot read it ({one_line(error)}); give a CSV, a '
                'Parquet file or a vector file'
            ) from error
    if table.empty:
        raise SourceError(f'{name_of(labels)}: there are no labels')
    return table.reset_index(drop=True)


def _read(path: Place, text: Iterable[str]) -> pd.DataFrame:
    suffix = path.suffix.lower()
    if suffix == '.csv':
        return read_csv(path, text)
    if suffix in ('.parquet', '.geoparquet'):
        geographic = b'geo' in (pq.read_schema(parquet_source(path)).metadata or {})
        table: pd.DataFrame = (gpd if geographic else pd).read_parquet(
            parquet_source(path)
        )
    else:
        table = read_by_gdal(path)
    return table


def has_places(labels: pd.DataFrame) -> bool:
    """Say whether a table has geometries, or columns of longitudes and latitudes."""
    if isinstance(labels, gpd.GeoDataFrame):
        return True
    try:
        place_table(labels.head(0), 'labels')
    except SourceError:
        return False
    return True


def label_geometries(labels: pd.DataFrame, source: str) -> gpd.GeoSeries:
    """Return where labels lie: all points, or all polygons.

    Args:
        labels: The table.
        source: Where it comes from, for errors.

    Returns:
        Points in EPSG:4326; or valid polygons, in EPSG:4326 and cut at the antimeridian
        if they came in degrees, else in their own CRS.

    Raises:
        SourceError: If labels have no place, or different kinds of places.
    """
    if not isinstance(labels, gpd.GeoDataFrame):
        labels = place_table(labels, source)
    places = labels.geometry
    if places.crs is None:
        raise SourceError(f'{source}: has no CRS: name it with set_crs or in the file')
    missing = places.isna() | places.is_empty
    if missing.any():
        raise SourceError(
            f'{source}: {missing.sum()} of {len(places)} labels have no geometry (the '
            f'first is in row {missing.argmax() + 1}): remove them, or join by id'
        )
    kinds = set(places.geom_type)
    if kinds == {'MultiPoint'} and (shapely.get_num_geometries(places) == 1).all():
        # Some formats know no single points.
        places = gpd.GeoSeries(shapely.get_geometry(places, 0), crs=places.crs)
        kinds = {'Point'}
    if kinds == {'Point'}:
        return places.to_crs('EPSG:4326')
    if not kinds <= {'Polygon', 'MultiPolygon'}:
        raise SourceError(
            f'{source}: labels are {" and ".join(sorted(kinds))}: a place is a point '
            'or a polygon, the same in all rows'
        )
    if not places.crs.is_geographic:
        return places.make_valid()
    try:
        return read_area(places.to_crs('EPSG:4326'))
    except SpecError as error:
        raise SourceError(f'{source}: {error}') from error
