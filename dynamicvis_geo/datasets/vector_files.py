"""Tables of points, lines and polygons in files, whatever their format."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from dynamicvis_geo.errors import SourceError, one_line
from dynamicvis_geo.paths import Place, parquet_source

LON_NAMES = ('lon', 'longitude', 'x')
LAT_NAMES = ('lat', 'latitude', 'y')

#: Offenders that an error names.
EXAMPLES = 5


def read_vector(path: Place, remedy: str) -> gpd.GeoDataFrame:
    """Read a GeoParquet file, or any that GDAL takes for a vector file.

    Args:
        path: The file.
        remedy: What to give instead, the end of an error.

    Raises:
        SourceError: If it cannot be read, or holds no geometries.
    """
    try:
        if path.suffix.lower() in ('.parquet', '.geoparquet'):
            table = gpd.read_parquet(parquet_source(path))
        else:
            table = read_by_gdal(path)
    except (OSError, RuntimeError, ValueError, pa.ArrowException) as error:
        # After the reason, GDAL's reader tells which of its own arguments may help.
        reason, _, _ = one_line(error).partition('; It might help')
        raise SourceError(
            f'{path}: GeoPandas cannot read it ({reason}); {remedy}'
        ) from error
    if not isinstance(table, gpd.GeoDataFrame):
        raise SourceError(f'{path}: holds no geometries; {remedy}')
    return table


def read_by_gdal(path: Place) -> gpd.GeoDataFrame | pd.DataFrame:
    """Read a vector file that is not Parquet; of a URL, a copy.

    Args:
        path: The file.
    """
    if isinstance(path, Path):
        return gpd.read_file(path)
    with TemporaryDirectory() as folder:
        copy = Path(folder, path.name)
        copy.write_bytes(path.read_bytes())
        return gpd.read_file(copy)


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
            f'{path}: not a readable comma-separated file ({one_line(error)}): save '
            'it as CSV in UTF-8, with as many values in each row as there are columns'
        ) from error
    _warn_of_names(path)
    return table


def _warn_of_names(path: Place) -> None:
    """Warn of columns of a CSV that have one name: pandas renames all but one."""
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
            f'{path}: {of_rows(wrong)} no {what} of -{limit:g} to {limit:g} degrees in '
            f'column {name!r} (the first is {value}): correct or remove them; '
            'projected coordinates need a vector file that names their CRS'
        )
    return values


def of_rows(positions: NDArray[np.int64]) -> str:
    """Write the subject of a sentence about rows, with its verb.

    Args:
        positions: Of the rows, from 0; they are named from 1.

    Returns:
        Such as 'rows 1, 4 have'.
    """
    shown = ', '.join(str(position + 1) for position in positions[:EXAMPLES])
    if len(positions) == 1:
        return f'row {shown} has'
    more = f', ... ({len(positions)} in all)' if len(positions) > EXAMPLES else ''
    return f'rows {shown}{more} have'
