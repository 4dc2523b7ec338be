"""Small outputs of runs, in the formats that the package documents."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
from rasterio.transform import from_bounds

from tests.callbacks.standins import Chips

PROVENANCE: dict[str, Any] = {
    'processing:datetime': '2026-01-02T03:04:05+00:00',
    'processing:software': {'dynamicvis-geo': '0.1.0', 'torch': '2.5'},
    'model': {
        'backbone': {
            'weights': 'pretrained',
            'file': 'weights.pth',
            'sha256': 'c0ffee' * 10,
            'arch': 'b',
        },
        'preprocessing': {'input_range': [0.0, 3000.0], 'resize': [512, 512]},
    },
    'source': {
        'sources': [
            {
                'dataset': 'EarthEngineDataset',
                'bands': [3, 2, 1],
                'sensor': {'collection': 'COPERNICUS/S2', 'cloudy_pct': 30.0},
                'windows': [['2024-06-01', '2024-09-01']],
            }
        ]
    },
    'run': {'command': 'dynamicvis-geo embed scene.tif', 'device': 'cpu'},
}


def write_pooled(
    path: Path,
    count: int = 12,
    dimensions: int = 6,
    provenance: dict[str, Any] = PROVENANCE,
    **changes: Any,
) -> np.ndarray:
    """Write embeddings of chips side by side; *changes* replace columns."""
    rows = Chips(count).rows(range(count)).assign(**changes)
    rows = rows.rename(columns={'chip_id': 'id'})
    for name in ('start', 'end'):
        rows[name] = rows[name].dt.tz_localize('UTC')
    rows['valid_fraction'] = np.linspace(0.25, 1, count, dtype=np.float32)
    embedding = np.random.default_rng(0).normal(size=(count, dimensions))
    embedding = embedding.astype(np.float32)
    rows.to_parquet(path, index=False)
    table = pq.read_table(path)
    vectors = pa.FixedSizeListArray.from_arrays(embedding.ravel(), dimensions)
    table = table.append_column('embedding', vectors)
    # Two row groups, as larger files have; the provenance comes last, as in a run.
    with pq.ParquetWriter(path, table.schema) as file:
        for part in (slice(0, count // 2), slice(count // 2, count)):
            file.write_table(table[part])
        file.add_key_value_metadata({'dynamicvis_geo': json.dumps(provenance)})
    return embedding


def write_grid(
    path: Path,
    count: int = 4,
    dimensions: int = 6,
    cells: int = 4,
    provenance: dict[str, Any] = PROVENANCE,
) -> np.ndarray:
    """Write feature maps of chips side by side."""
    path.mkdir()
    features = np.random.default_rng(0).normal(size=(count, dimensions, cells, cells))
    features = features.astype(np.float32)
    text = json.dumps(provenance)
    for (_, row), values in zip(
        Chips(count).rows(range(count)).iterrows(), features, strict=True
    ):
        with rasterio.open(
            path / f'{row["chip_id"]}.tif',
            'w',
            driver='GTiff',
            count=dimensions,
            height=cells,
            width=cells,
            dtype='float32',
            crs=row['crs'],
            transform=from_bounds(*row[['minx', 'miny', 'maxx', 'maxy']], cells, cells),
        ) as file:
            file.write(values)
            file.update_tags(
                chip_id=row['chip_id'],
                dynamicvis_geo=text,
                valid_fraction='0.75',
                start=row['start'].isoformat(),
                end=row['end'].isoformat(),
            )
    (path / 'metadata.json').write_text(text)
    return features
