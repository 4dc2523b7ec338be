"""Files of points, lines and polygons, whatever their format."""

from __future__ import annotations

from pathlib import Path

import geopandas as gpd
import pyarrow as pa

from dynamicvis_geo.errors import SourceError


def read_vector(path: Path, remedy: str) -> gpd.GeoDataFrame:
    """Read a GeoParquet file, or any that GDAL takes for a vector file.

    Args:
        path: The file.
        remedy: What to give instead, the end of an error.

    Raises:
        SourceError: If it cannot be read, or holds no geometries.
    """
    try:
        if path.suffix.lower() in ('.parquet', '.geoparquet'):
            table = gpd.read_parquet(path)
        else:
            table = gpd.read_file(path)
    except (OSError, RuntimeError, ValueError, pa.ArrowException) as error:
        # After the reason, GDAL's reader tells which of its own arguments may help.
        reason, _, _ = ' '.join(str(error).split()).partition('; It might help')
        raise SourceError(
            f'{path}: GeoPandas cannot read it ({reason}); {remedy}'
        ) from error
    if not isinstance(table, gpd.GeoDataFrame):
        raise SourceError(f'{path}: holds no geometries; {remedy}')
    return table
