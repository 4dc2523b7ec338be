"""Feature maps as one GeoTIFF a chip."""

import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from rasterio.io import MemoryFile
from rasterio.transform import from_bounds

from dynamicvis_geo.callbacks.predictions import ChipTable, Predictions
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
    folder_of: ClassVar[str | None] = '.tif'

    def __init__(
        self,
        folder: Path,
        rank: int,
        chips: ChipTable | None,
        provenance: dict[str, Any],
        dimensions: int | None,
    ) -> None:
        """Prepare to write; see :class:`~dynamicvis_geo.callbacks.writer.Sink`."""
        self.folder = folder
        self.chips = chips
        self.provenance = provenance
        self.dimensions = dimensions

    def write(self, predictions: Predictions) -> None:
        """Write the chips of one batch."""
        if self.chips is None:
            raise RuntimeError('predictions without a chip table')
        features = predictions.embedding
        self.dimensions = features.shape[1]
        valid = predictions.valid_fraction
        provenance = self._provenance()
        rows = self.chips.rows(predictions.chip)
        for i, (_, chip) in enumerate(rows.iterrows()):
            write_feature_map(
                self.folder / f'{chip["chip_id"]}.tif',
                features[i],
                chip,
                provenance,
                None if valid is None else float(valid[i]),
            )

    def close(self) -> None:
        """Nothing is open between batches."""

    def abort(self) -> None:
        """Nothing is open between batches."""

    def finish(self) -> Path:
        """Write what all files share, and return the folder."""
        text = to_json(self._provenance(), indent=2)
        temporary = self.folder / f'.{METADATA_FILE}.partial'
        temporary.write_text(text + '\n', encoding='utf-8')
        os.replace(temporary, self.folder / METADATA_FILE)
        return self.folder

    def _provenance(self) -> dict[str, Any]:
        return {**self.provenance, **describe_embeddings('pixel', self.dimensions)}


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
        # Two processes may have the same chip, at points that coincide.
        temporary = path.with_name(f'.{path.name}.{os.getpid()}.partial')
        # Python, unlike GDAL, always says when the disk is full.
        temporary.write_bytes(memory.getbuffer())
    os.replace(temporary, path)


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
