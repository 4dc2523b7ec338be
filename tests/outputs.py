"""Small outputs of runs, written by the package's own writers."""

from pathlib import Path
from typing import Any

import numpy as np

from dynamicvis_geo.callbacks.geoparquet import (
    GeoParquetWriter,
    embedding_schema,
    embedding_table,
)
from dynamicvis_geo.callbacks.geotiff import GeoTIFFFolder
from dynamicvis_geo.callbacks.predictions import Predictions
from tests.callbacks.standins import Chips

PROVENANCE: dict[str, Any] = {
    'processing:datetime': '2026-01-02T03:04:05+00:00',
    'processing:software': {'dynamicvis-geo': '0.1.0', 'torch': '2.5'},
    'model': {
        'backbone': {'weights': 'pretrained', 'sha256': 'c0ffee' * 10, 'arch': 'b'},
        'preprocessing': {'input_range': [0.0, 3000.0], 'resize': [512, 512]},
    },
    'source': {'sources': [{'dataset': 'Scenes', 'bands': [3, 2, 1]}]},
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
    generator = np.random.default_rng(0)
    embedding = generator.normal(size=(count, dimensions)).astype(np.float32)
    valid = np.linspace(0.25, 1, count, dtype=np.float32)
    writer = GeoParquetWriter(path, embedding_schema(dimensions, False))
    # Two row groups, as larger files have.
    for part in (slice(0, count // 2), slice(count // 2, count)):
        writer.write(embedding_table(rows[part], embedding[part], valid[part]))
    writer.close(provenance)
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
    folder = GeoTIFFFolder(path, 0, Chips(count), provenance, dimensions)
    folder.write(
        Predictions(np.arange(count), features, np.full(count, 0.75, np.float32))
    )
    folder.finish()
    return features
