"""Files of pooled embeddings, written column by column as the documentation says."""

import json
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

#: Half the side of a chip, degrees.
HALF = 0.01


def vectors(count: int, dimensions: int = 6, seed: int = 0) -> NDArray[np.float32]:
    """Vectors of which no two are alike."""
    return np.random.default_rng(seed).normal(size=(count, dimensions)).astype('f4')


def footprint(lon: float, lat: float, half: float = HALF) -> BaseGeometry:
    """A chip around a place, cut at the antimeridian."""
    world = shapely.box(-180, -90, 180, 90)
    box = shapely.box(lon - half, lat - half, lon + half, lat + half)
    turns = [
        shapely.affinity.translate(box, turn).intersection(world)
        for turn in (-360, 0, 360)
    ]
    return shapely.union_all([turn for turn in turns if turn.area > 0])


def write_part(
    path: Path,
    embedding: NDArray[Any] | pa.Array,
    lon: Any = None,
    lat: Any = None,
    ids: Any = None,
    provenance: dict[str, Any] | None = None,
    **columns: Any,
) -> Path:
    """Write a file of embeddings; chips stand side by side unless places are given."""
    count = len(embedding)
    lon = 13 + 2 * HALF * np.arange(count) if lon is None else np.asarray(lon, float)
    lat = np.full(count, 48.0) if lat is None else np.asarray(lat, float)
    if isinstance(embedding, np.ndarray):
        embedding = pa.FixedSizeListArray.from_arrays(
            pa.array(embedding.reshape(-1)), embedding.shape[1]
        )
    frame = gpd.GeoDataFrame(
        {
            'id': [f'chip-{i}' for i in range(count)] if ids is None else ids,
            'datetime': pd.Timestamp('2024-06-01', tz='UTC'),
            'centre_lon': lon,
            'centre_lat': lat,
            'crs': 'EPSG:4326',
            **columns,
        },
        geometry=[footprint(*place) for place in zip(lon, lat, strict=True)],
        crs='EPSG:4326',
    )
    frame.to_parquet(path, write_covering_bbox=True)
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata)
    if provenance is not None:
        metadata[b'dynamicvis_geo'] = json.dumps(provenance).encode()
    table = table.append_column('embedding', embedding)
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path
