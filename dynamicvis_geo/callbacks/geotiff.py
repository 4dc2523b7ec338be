"""Feature maps as one GeoTIFF a chip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from rasterio.io import MemoryFile
from rasterio.transform import from_bounds

from dynamicvis_geo.callbacks.blocks import Description
from dynamicvis_geo.callbacks.parquet_blocks import (
    Merged,
    gather,
    list_failures,
    map_shape,
    row_keys,
)
from dynamicvis_geo.callbacks.predictions import ChipTable, Predictions
from dynamicvis_geo.callbacks.store import Store, Target
from dynamicvis_geo.provenance import (
    METADATA_FILE,
    PROVENANCE_KEY,
    describe_embeddings,
    to_json,
)

if TYPE_CHECKING:
    from dynamicvis_geo.callbacks.formats import Work

# A tile's sides are multiples of 16 (TIFF 6.0, section 15); 512 is GDAL's own for COGs.
_TILE_STEP = 16
_TILE_MAX = 512


class GeoTIFFFolder:
    """One GeoTIFF a chip, and ``metadata.json``: see :class:`~.formats.Format`."""

    output: ClassVar[str] = 'grid'
    dtypes: ClassVar[tuple[str, ...]] = ('float32',)
    #: GDAL and QGIS leave statistics of a.tif in a.tif.aux.xml.
    members: ClassVar[tuple[str, ...]] = ('*.tif', '*.tif.aux.xml', METADATA_FILE)

    def __init__(self, url: str, dtype: str) -> None:
        """Say where the output is, and the type of its numbers."""
        self._place = Target.of(url)
        self._folder = Store(url)

    def held(self) -> pa.StringArray:
        """Ids of the chips that have a file."""
        names = [n for n in self._folder.names() if n.endswith('.tif')]
        ids = [n.removesuffix('.tif') for n in names if not n.startswith('.')]
        return pa.array(sorted(ids), pa.string())

    def check(self, chips: ChipTable) -> None:
        """Take any chips."""

    def origins(self, chips: ChipTable) -> Sequence[tuple[float, float] | None]:
        """Let tiles of the plan hang from the origin of each CRS."""
        return [None] * len(chips.source_crs)

    def write_maps(self, work: Work, number: int, predictions: Predictions) -> None:
        """Write the feature maps of a block, each whole."""
        if not len(predictions.chip):
            return
        features = predictions.embedding
        valid = predictions.valid_fraction
        provenance = _provenance(work.run, features.shape[1])
        rows = work.chips.rows(predictions.chip)
        for i, (_, chip) in enumerate(rows.iterrows()):
            content = encode_feature_map(
                features[i],
                chip,
                provenance,
                None if valid is None else float(valid[i]),
            )
            self._folder.put(f'{chip["chip_id"]}.tif', content)

    def merge(self, store: Store, run: Description, partial: bool) -> Merged:
        """Write what all files share, and the list of failures."""
        gathered = gather(store, run, partial, ['id', 'point_id'])
        dimensions = run.provenance.get('emb:dimensions')
        if gathered.schema is not None:
            dimensions = map_shape(gathered)[0]
        text = to_json(_provenance(run, dimensions), indent=2) + '\n'
        self._folder.put(METADATA_FILE, text.encode())
        failed = list_failures(
            self._place,
            store,
            gathered.failed,
            lambda: row_keys(gathered.done),
        )
        return Merged(gathered.done.num_rows, failed, gathered.missing)


def _provenance(run: Description, dimensions: int | None) -> dict[str, Any]:
    return {**run.provenance, **describe_embeddings('pixel', dimensions)}


def encode_feature_map(
    features: npt.NDArray[np.float32],
    chip: pd.Series,
    provenance: dict[str, Any],
    valid_fraction: float | None = None,
) -> bytes:
    """Make a cloud-optimised GeoTIFF of the feature map of one chip.

    Each feature cell covers its part of the chip: the map has the chip's CRS and
    bounds, north up, and the chip's size over the number of cells as its resolution.

    Args:
        features: float32 ``[D, h, w]``, the first row northernmost.
        chip: Row of the chip table: ``chip_id``, ``crs``, ``minx``, ``miny``, ``maxx``,
            ``maxy`` (CRS units), ``start``, ``end``.
        provenance: What made the features.
        valid_fraction: Share of the chip's pixels that were not masked, 0..1.

    Returns:
        The file.
    """
    with MemoryFile() as memory:
        _encode(memory, features, chip, _tags(chip, provenance, valid_fraction))
        return bytes(memory.getbuffer())


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
