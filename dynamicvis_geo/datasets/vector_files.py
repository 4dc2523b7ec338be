"""Files of points, lines and polygons, whatever their format."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import geopandas as gpd
import pandas as pd
import pyarrow as pa

from dynamicvis_geo.errors import SourceError
from dynamicvis_geo.paths import Place, parquet_source


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
        reason, _, _ = ' '.join(str(error).split()).partition('; It might help')
        raise SourceError(
            f'{path}: GeoPandas cannot read it ({reason}); {remedy}'
        ) from error
    if not isinstance(table, gpd.GeoDataFrame):
        raise SourceError(f'{path}: holds no geometries; {remedy}')
    return table


def read_by_gdal(path: Place) -> gpd.GeoDataFrame | pd.DataFrame:
    """Read a vector file that is not Parquet; of a URL, a copy."""
    if isinstance(path, Path):
        return gpd.read_file(path)
    with TemporaryDirectory() as folder:
        copy = Path(folder, path.name)
        copy.write_bytes(path.read_bytes())
        return gpd.read_file(copy)
