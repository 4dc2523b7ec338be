"""Feature maps as one GeoTIFF a chip."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from rasterio.io import MemoryFile
from rasterio.transform import from_bounds

from dynamicvis_geo.callbacks.predictions import Predictions
from dynamicvis_geo.callbacks.run_folder import write_atomically
from dynamicvis_geo.callbacks.sink import Job
from dynamicvis_geo.provenance import (
    METADATA_FILE,
    PROVENANCE_KEY,
    describe_embeddings,
    to_json,
)

# A tile's sides are multiples of 16 (TIFF 6.0, section 15); 512 is GDAL's own for COGs.
_TILE_STEP = 16
_TILE_MAX = 512


class GeoTIFFFolder:
    """Writes one GeoTIFF a chip into a folder, and ``metadata.json`` beside them."""

    output: ClassVar[str] = 'grid'
    dtypes: ClassVar[tuple[str, ...]] = ('float32',)
    metadata: ClassVar[str] = METADATA_FILE
    #: GDAL and QGIS leave statistics of a.tif in a.tif.aux.xml.
    members: ClassVar[tuple[str, ...]] = ('*.tif', '*.tif.aux.xml', METADATA_FILE)

    def __init__(self, job: Job) -> None:
        """Prepare to write; see :class:`~dynamicvis_geo.callbacks.sink.Sink`."""
        self.job = job
        self.dimensions = job.dimensions

    @classmethod
    def recover(cls, target: Path) -> None:
        """Nothing: files appear when they are complete."""

    @classmethod
    def finished(cls, target: Path) -> pa.StringArray:
        """Ids of the chips that have a file."""
        return pa.array([path.stem for path in target.glob('*.tif')], pa.string())

    def write(self, predictions: Predictions) -> None:
        """Write the chips of one batch."""
        if self.job.chips is None or not len(predictions.chip):
            return
        features = predictions.embedding
        self.dimensions = features.shape[1]
        valid = predictions.valid_fraction
        provenance = self._provenance()
        rows = self.job.chips.rows(predictions.chip)
        for i, (_, chip) in enumerate(rows.iterrows()):
            write_feature_map(
                self.job.target / f'{chip["chip_id"]}.tif',
                features[i],
                chip,
                provenance,
                None if valid is None else float(valid[i]),
            )

    def flush(self) -> None:
        """Nothing is held between batches."""

    def assemble(self) -> None:
        """Nothing remains to be done."""

    def complete(self) -> None:
        """Write what all files share."""
        text = to_json(self._provenance(), indent=2) + '\n'
        write_atomically(self.job.target / METADATA_FILE, text.encode())

    def _provenance(self) -> dict[str, Any]:
        return {**self.job.provenance, **describe_embeddings('pixel', self.dimensions)}


def write_feature_map(
    path: Path,
    features: npt.NDArray[np.float32],
    chip: pd.Series,
    provenance: dict[str, Any],
    valid_fraction: float | None = None,
) -> None:
    """Write the feature map of one chip as a cloud-optimised GeoTIFF.

    Each feature cell covers its part of the chip: the map has the chip's CRS and
    bounds, north up, and the chip's size over the number of cells as its resolution.
    The file appears under its name only when it is complete.

    Args:
        path: File to write.
        features: float32 ``[D, h, w]``, the first row northernmost.
        chip: Row of the chip table: ``chip_id``, ``crs``, ``minx``, ``miny``, ``maxx``,
            ``maxy`` (CRS units), ``start``, ``end``.
        provenance: What made the features.
        valid_fraction: Share of the chip's pixels that were not masked, 0..1.
    """
    with MemoryFile() as memory:
        _encode(memory, features, chip, _tags(chip, provenance, valid_fraction))
        # Python, unlike GDAL, always says when the disk is full.
        write_atomically(path, memory.getbuffer())


def _encode(
    memory: MemoryFile,
    features: npt.NDArray[np.float32],
    chip: pd.Series,
    tags: dict[str, str],
) -> None:
    dimensions, height, width = features.shape
    with memory.open(
        driver='COG',
        dtype='float32',
        count=dimensions,
        height=height,
        width=width,
        crs=chip['crs'],
        transform=from_bounds(
            chip['minx'], chip['miny'], chip['maxx'], chip['maxy'], width, height
        ),
        compress='zstd',
        predictor=3,
        # All values of a cell together make the smallest files of small maps.
        interleave='pixel',
        blocksize=_tile_size(max(height, width)),
        overviews='none',
    ) as image:
        image.update_tags(**tags)
        image.descriptions = [f'embedding_{i}' for i in range(dimensions)]
        image.write(features)


def _tile_size(cells: int) -> int:
    return min(_TILE_MAX, -(-cells // _TILE_STEP) * _TILE_STEP)


def _tags(
    chip: pd.Series, provenance: dict[str, Any], valid_fraction: float | None
) -> dict[str, str]:
    tags = {'chip_id': str(chip['chip_id']), PROVENANCE_KEY: to_json(provenance)}
    if valid_fraction is not None:
        tags['valid_fraction'] = f'{valid_fraction:.6g}'
    for name in ('start', 'end'):
        if pd.notna(chip[name]):
            tags[name] = chip[name].isoformat()
    if pd.notna(chip['start']):
        # The form that TIFF 6.0 prescribes for the tag DateTime.
        tags['TIFFTAG_DATETIME'] = f'{chip["start"]:%Y:%m:%d %H:%M:%S}'
    return tags
