"""Feature maps as one GeoTIFF a chip."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from pyproj import CRS
from rasterio.env import GDALVersion
from rasterio.errors import RasterioError
from rasterio.io import MemoryFile
from rasterio.transform import from_bounds

from dynamicvis_geo.errors import SourceError, one_line
from dynamicvis_geo.formats.base import Format, OpenRun, Predictions, spread
from dynamicvis_geo.formats.block_files import Blocks
from dynamicvis_geo.paths import Place, kind_of
from dynamicvis_geo.projections import crs_name
from dynamicvis_geo.provenance import (
    METADATA_FILE,
    PROVENANCE_KEY,
    describe_embeddings,
    find_provenance,
    to_json,
)
from dynamicvis_geo.rasters import open_raster

_SUFFIXES = ('.tif', '.tiff')
# A tile's sides are multiples of 16 (TIFF 6.0, section 15); 512 is GDAL's own for COGs.
_TILE_STEP = 16
_TILE_MAX = 512
# By tile, one band is read without the others, and all bands of a place from one part
# of the file. GDAL has it from 3.11 on.
_INTERLEAVE = 'tile' if GDALVersion.runtime().at_least('3.11') else 'pixel'
# Of a tile a band, GDAL's own level makes the file 0.3 % smaller in twice the time.
_ZSTD_LEVEL = 3


class GeoTIFF(Format):
    """One GeoTIFF a chip, and ``metadata.json``."""

    output: ClassVar[Literal['pooled', 'grid']] = 'grid'
    dtypes: ClassVar[tuple[str, ...]] = ('float32',)
    #: GDAL and QGIS leave statistics of a.tif in a.tif.aux.xml.
    members: ClassVar[tuple[str, ...]] = ('*.tif', '*.tif.aux.xml', METADATA_FILE)
    chip_file: ClassVar[str | None] = '{id}.tif'

    def held(self) -> pa.StringArray:
        """Ids of the chips that have a file."""
        names = [n for n in self._folder.names() if n.endswith('.tif')]
        ids = [n.removesuffix('.tif') for n in names if not n.startswith('.')]
        return pa.array(sorted(ids), pa.string())

    def write_maps(
        self, run: OpenRun, number: int, predictions: Sequence[Predictions]
    ) -> None:
        """Write the feature maps of a block, each whole."""
        for some in predictions:
            valid = some.valid_fraction
            provenance = _provenance(run.provenance, some.embedding.shape[1])
            rows = run.chips.rows(some.chip)
            for i, (_, chip) in enumerate(rows.iterrows()):
                content = encode_feature_map(
                    some.embedding[i],
                    chip,
                    provenance,
                    None if valid is None else float(valid[i]),
                )
                self._folder.put(f'{chip["chip_id"]}.tif', content)

    def merge(self, blocks: Blocks) -> None:
        """Write what all files share."""
        for _ in blocks.rows():
            # The maps are there; the blocks tell of what shape.
            pass
        shape = blocks.map_shape()
        dimensions = blocks.provenance.get('emb:dimensions')
        described = _provenance(blocks.provenance, shape[0] if shape else dimensions)
        text = to_json(described, indent=2) + '\n'
        self._folder.put(METADATA_FILE, text.encode())

    @classmethod
    def is_at(cls, path: Place, is_folder: bool) -> bool:
        """Say whether a path is a GeoTIFF by its name, or a folder with some in it."""
        if is_folder:
            return bool(_files_in(path))
        return path.suffix.lower() in _SUFFIXES

    @classmethod
    def read_chips(cls, path: Place, most: int) -> tuple[pd.DataFrame, int, int]:
        """Read the headers of the files; ``file`` names that of each chip."""
        files = feature_map_files(path)
        headers = [read_header(files[i]) for i in spread(len(files), most)]
        rows = pd.DataFrame([header.row() for header in headers])
        return rows, len(files), headers[0].shape[0]

    @classmethod
    def read_provenance(cls, path: Place) -> dict[str, Any]:
        """Return what made the first file; empty if it does not say."""
        return find_provenance(feature_map_files(path)[0]) or {}

    @classmethod
    def read_maps(
        cls, path: Place, chips: pd.DataFrame
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the map of each chip, all of its file."""
        for file in chips['file']:
            yield read_feature_map(file)


def _provenance(made: Mapping[str, Any], dimensions: int | None) -> dict[str, Any]:
    return {**made, **describe_embeddings('pixel', dimensions)}


def encode_feature_map(
    features: npt.NDArray[np.float32],
    chip: pd.Series,
    provenance: Mapping[str, Any],
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
        level=_ZSTD_LEVEL,
        predictor=3,
        interleave=_INTERLEAVE,
        blocksize=_tile_size(max(height, width)),
        # Maps of more than a tile have some; by default cubic, which overshoots.
        overview_resampling='average',
    ) as image:
        image.update_tags(**tags)
        image.descriptions = [f'embedding_{i}' for i in range(dimensions)]
        image.write(features)


def _tile_size(cells: int) -> int:
    return min(_TILE_MAX, -(-cells // _TILE_STEP) * _TILE_STEP)


def _tags(
    chip: pd.Series, provenance: Mapping[str, Any], valid_fraction: float | None
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


def _files_in(folder: Place) -> list[Place]:
    files: list[Place] = sorted(
        file for file in folder.glob('*.tif') if not file.name.startswith('.')
    )
    return files


def feature_map_files(path: Place) -> list[Place]:
    """Find the feature maps in a folder, or the one file that a path names.

    Args:
        path: File or folder.

    Returns:
        The files, sorted.

    Raises:
        SourceError: If there are none.
    """
    kind = kind_of(path)
    if kind == 'file':
        return [path]
    if kind is None:
        raise SourceError(f'{path}: no such file or folder; give feature maps')
    files = _files_in(path)
    if not files:
        raise SourceError(
            f'{path}: no feature map (*.tif) in it; give a folder that dynamicvis-geo '
            'embed --grid wrote'
        )
    return files


@dataclass(frozen=True)
class Header:
    """A feature map but for its values.

    Attributes:
        path: The file.
        crs: Its CRS.
        bounds: West, south, east and north, CRS units.
        shape: Bands, rows and columns.
        tags: All tags of the file, as text.
    """

    path: Place
    crs: CRS
    bounds: tuple[float, float, float, float]
    shape: tuple[int, int, int]
    tags: Mapping[str, str]

    @property
    def window(self) -> tuple[pd.Timestamp | None, pd.Timestamp | None]:
        """Start and end that the tags tell, UTC; None where they do not.

        Raises:
            SourceError: If they are no times.
        """
        start, end = (self.tags.get(name) for name in ('start', 'end'))
        try:
            return _time(start), _time(end)
        except ValueError as error:
            raise SourceError(
                f'{self.path}: its tags start={start!r} and end={end!r} are no times'
            ) from error

    def row(self) -> dict[str, Any]:
        """Return the row of its chip, as :meth:`.Format.read_chips` describes it."""
        west, south, east, north = self.bounds
        start, end = self.window
        return {
            'id': self.tags.get('chip_id', self.path.stem),
            'crs': crs_name(self.crs),
            'minx': west,
            'miny': south,
            'maxx': east,
            'maxy': north,
            'height': self.shape[1],
            'width': self.shape[2],
            'valid_fraction': float(self.tags.get('valid_fraction', 'nan')),
            'start': pd.NaT if start is None else start,
            'end': pd.NaT if end is None else end,
            'file': self.path,
        }


def read_header(path: Place) -> Header:
    """Read all of a feature map but its values.

    Args:
        path: The file.

    Raises:
        SourceError: If the file cannot be read, or has no CRS.
    """
    try:
        with open_raster(path) as file:
            if file.crs is None:
                raise SourceError(
                    f'{path}: it has no CRS, so it is no feature map of this package; '
                    'move it elsewhere'
                )
            return Header(
                path,
                CRS.from_user_input(file.crs),
                tuple(file.bounds),
                (file.count, file.height, file.width),
                file.tags(),
            )
    except RasterioError as error:
        raise _unreadable(path, error) from error


def read_feature_map(path: Place) -> npt.NDArray[np.float32]:
    """Read a feature map.

    Args:
        path: The file.

    Returns:
        float32 ``[D, h, w]``, the first row northernmost.

    Raises:
        SourceError: If the file cannot be read.
    """
    try:
        with open_raster(path) as file:
            features: npt.NDArray[np.float32] = file.read(out_dtype='float32')
    except RasterioError as error:
        raise _unreadable(path, error) from error
    return features


def _unreadable(path: Place, error: RasterioError) -> SourceError:
    return SourceError(
        f'{path}: rasterio cannot open it ({one_line(error)}); it cannot be read: make '
        'it anew or remove it'
    )


def _time(text: str | None) -> pd.Timestamp | None:
    return pd.to_datetime(text, utc=True) if text else None
