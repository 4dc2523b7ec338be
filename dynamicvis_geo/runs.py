"""What a run wrote, read back: the chips, their embeddings, and what made them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyproj import CRS
from rasterio.errors import RasterioError

from dynamicvis_geo.datasets.embedding_files import one_line, scaled, vector_columns
from dynamicvis_geo.datasets.footprints import footprints
from dynamicvis_geo.errors import OutputError, SourceError, SpecError
from dynamicvis_geo.paths import AnyPath, Place, input_path, kind_of, parquet_source
from dynamicvis_geo.projections import crs_name
from dynamicvis_geo.provenance import PROVENANCE_KEY, read_provenance
from dynamicvis_geo.rasters import open_raster

#: Files of a folder of feature maps whose headers are read, at most; each takes 10 ms.
MAX_HEADERS = 5_000

# Columns that other software may leave out, with what stands for them.
_OPTIONAL: dict[str, Any] = {
    'crs': None,
    **dict.fromkeys(('minx', 'miny', 'maxx', 'maxy'), np.nan),
    **dict.fromkeys(('width', 'height', 'valid_fraction'), np.nan),
}


@dataclass(frozen=True)
class Run:
    """An output of this package.

    Attributes:
        path: the GeoParquet file, the folder of feature maps, or one map; a URL is a
            ``UPath``.
        kind: 'pooled' or 'grid'.
        chips: a row each chip, EPSG:4326: ``id``, ``crs``, ``minx`` to ``maxy``,
            ``width``, ``height``, ``start`` and ``end`` (UTC), ``valid_fraction``,
            ``centre_lon``, ``centre_lat`` and ``geometry``, of a folder also ``file``;
            NaN or None where it is not known.
        total: how many chips there are; of a folder with more than 5,000, *chips* are
            5,000 of them, at even distances.
        dimensions: length of an embedding.
        provenance: what made it; empty if the output does not say.
    """

    path: Place
    kind: Literal['pooled', 'grid']
    chips: gpd.GeoDataFrame
    total: int
    dimensions: int
    provenance: dict[str, Any]


def open_run(path: AnyPath) -> Run:
    """Read all but the embeddings of an output.

    Args:
        path: a GeoParquet file of pooled embeddings, a folder of feature maps, or one
            of them; or the URL of one.

    Raises:
        SourceError: if it is neither, or cannot be read.
    """
    path = input_path(path)
    kind = kind_of(path)
    if kind is None:
        raise SourceError(
            f'{path}: no such file or folder; give what dynamicvis-geo embed wrote, a '
            '.parquet file or a folder of feature maps. An interrupted run has no '
            'output under its name yet: repeat it, and it continues'
        )
    if kind == 'folder' or path.suffix.lower() in ('.tif', '.tiff'):
        return _open_folder(path)
    return _open_parquet(path)


def read_embeddings(path: AnyPath) -> NDArray[np.float32]:
    """Read all embeddings of a GeoParquet file, in the order of its rows.

    Args:
        path: a file with a column ``embedding`` of lists of equal length.

    Returns:
        float32 ``[N, D]``, multiplied by their scale if they are stored as integers; a
        row is NaN where the file has none.

    Raises:
        SourceError: if the file cannot be read, or its lists differ in length.
    """
    path = input_path(path)
    try:
        with pq.ParquetFile(parquet_source(path)) as file:
            rows, start = np.empty((0, 0), np.float32), 0
            columns = vector_columns(path, file.schema_arrow)
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns).combine_chunks()
                if not len(table):
                    continue
                part = scaled(_matrix(table['embedding'].combine_chunks()), table)
                if not start:
                    rows = np.empty((file.metadata.num_rows, part.shape[1]), np.float32)
                rows[start : start + len(part)] = part
                start += len(part)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise SourceError(
            f'{path}: its column embedding cannot be read as vectors of one length '
            f'({error}); give a file that dynamicvis-geo embed wrote'
        ) from error
    return rows


def feature_map_files(path: AnyPath) -> list[Place]:
    """Return the feature maps of a folder, or the one file that a path names.

    Raises:
        SourceError: if there are none.
    """
    path = input_path(path)
    kind = kind_of(path)
    if kind == 'file':
        return [path]
    if kind is None:
        raise SourceError(f'{path}: no such file or folder; give feature maps')
    files: list[Place] = sorted(
        file for file in path.glob('*.tif') if not file.name.startswith('.')
    )
    if not files:
        raise SourceError(
            f'{path}: no feature map (*.tif) in it; give a folder that dynamicvis-geo '
            'embed --grid wrote'
        )
    return files


def read_feature_map(path: Place) -> NDArray[np.float32]:
    """Read a feature map, float32 ``[D, h, w]``.

    Raises:
        SourceError: if the file cannot be read.
    """
    try:
        with open_raster(path) as file:
            features: NDArray[np.float32] = file.read(out_dtype='float32')
    except RasterioError as error:
        raise SourceError(
            f'{path}: it cannot be read ({error}); remove it, and repeat the run that '
            'wrote it'
        ) from error
    return features


def find_chip(chips: gpd.GeoDataFrame, chip: str) -> int:
    """Find the row of a chip by its id, the id of its point, or its number from 0.

    Raises:
        SpecError: if there is none, or several have this id.
    """
    for column in ('id', 'point_id'):
        if column in chips:
            rows = np.flatnonzero(chips[column].astype(str) == chip)
            if len(rows) > 1:
                raise SpecError(
                    f'chip {chip!r} is the {column} of {len(rows)} chips; give the '
                    f'number of one, such as {rows[0]}'
                )
            if len(rows):
                return int(rows[0])
    if chip.isdecimal() and int(chip) < len(chips):
        return int(chip)
    some = ', '.join(chips['id'].astype(str).head(2))
    raise SpecError(
        f'chip {chip!r} is none of the {len(chips)} chips, such as {some}; give an id '
        f'or a number from 0 to {len(chips) - 1}'
    )


def recorded_bands(provenance: dict[str, Any]) -> tuple[int, int, int]:
    """Return the bands of the images that were embedded; 1, 2, 3 if it is not said."""
    source = provenance.get('source')
    sources = source.get('sources') if isinstance(source, dict) else None
    for entry in sources if isinstance(sources, list) else []:
        match entry:
            case {'bands': [int(red), int(green), int(blue)]}:
                return red, green, blue
    return 1, 2, 3


def spread(count: int, most: int) -> NDArray[np.int64]:
    """Return at most *most* of the rows 0 to *count* - 1, at even distances."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round()).astype(
        np.int64
    )


def _open_parquet(path: Place) -> Run:
    try:
        schema = pq.read_schema(parquet_source(path))
        columns = [n for n in schema.names if n not in ('embedding', 'bbox')]
        chips = gpd.read_parquet(parquet_source(path), columns=columns)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise SourceError(
            f'{path}: it cannot be read as GeoParquet ({one_line(error)}); give a '
            '.parquet file '
            'that dynamicvis-geo embed wrote'
        ) from error
    missing = [n for n in ('id', 'embedding') if n not in schema.names]
    if missing:
        raise SourceError(
            f'{path}: it has no column {" and no column ".join(missing)}; give a file '
            'of pooled embeddings that dynamicvis-geo embed wrote'
        )
    if chips.geometry.name != 'geometry':
        chips = chips.rename_geometry('geometry')
    chips = chips.to_crs('EPSG:4326')
    for name, absent in _OPTIONAL.items():
        if name not in chips:
            chips[name] = absent
    for name in ('start', 'end'):
        times = chips[name] if name in chips else pd.Series(pd.NaT, chips.index)
        chips[name] = pd.to_datetime(times, utc=True)
    if 'centre_lon' not in chips or 'centre_lat' not in chips:
        middle = chips.geometry.representative_point()
        chips['centre_lon'], chips['centre_lat'] = middle.x, middle.y
    # The metadata of the schema lack what was written when the file was closed.
    metadata = pq.read_metadata(parquet_source(path)).metadata or {}
    provenance = read_provenance(path) if PROVENANCE_KEY.encode() in metadata else {}
    return Run(path, 'pooled', chips, len(chips), _length(path, schema), provenance)


def _length(path: Place, schema: pa.Schema) -> int:
    kind = schema.field('embedding').type
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    with pq.ParquetFile(parquet_source(path)) as file:
        for batch in file.iter_batches(1, columns=['embedding']):
            return len(batch['embedding'][0])
    return 0


def _matrix(column: pa.Array) -> NDArray[np.float32]:
    if column.null_count:
        lists = [np.nan if row is None else row for row in column.to_pylist()]
        fixed = pa.types.is_fixed_size_list(column.type)
        length = (
            column.type.list_size
            if fixed
            else max((len(row) for row in lists if isinstance(row, list)), default=0)
        )
        return np.array(
            [row if isinstance(row, list) else [np.nan] * length for row in lists],
            np.float32,
        )
    values: NDArray[np.floating] = column.flatten().to_numpy(zero_copy_only=False)
    return values.astype(np.float32, copy=False).reshape(len(column), -1)


def _open_folder(path: Place) -> Run:
    files = feature_map_files(path)
    chosen = [files[i] for i in spread(len(files), MAX_HEADERS)]
    headers = [_header(file) for file in chosen]
    table = pd.DataFrame([header for header, _ in headers])
    outlines = np.empty(len(table), dtype=object)
    for name, rows in table.groupby('crs').indices.items():
        outlines[rows] = footprints(
            CRS.from_user_input(name),
            table.loc[rows, ['minx', 'miny', 'maxx', 'maxy']].to_numpy(float),
            table.loc[rows, ['height', 'width']].to_numpy(np.int64),
        )
    chips = gpd.GeoDataFrame(table, geometry=outlines, crs='EPSG:4326')
    middle = chips.geometry.representative_point()
    chips['centre_lon'], chips['centre_lat'] = middle.x, middle.y
    provenance = {}
    if PROVENANCE_KEY in headers[0][1]:
        provenance = read_provenance(chosen[0])
    dimensions = int(table['dimensions'].iloc[0])
    return Run(path, 'grid', chips, len(files), dimensions, provenance)


def _header(path: Place) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with open_raster(path) as file:
            tags: dict[str, str] = file.tags()
            if file.crs is None:
                raise SourceError(
                    f'{path}: it has no CRS, so it is no feature map of this package; '
                    'move it elsewhere'
                )
            west, south, east, north = file.bounds
            row = {
                'id': tags.get('chip_id', path.stem),
                'crs': crs_name(CRS.from_user_input(file.crs)),
                'minx': west,
                'miny': south,
                'maxx': east,
                'maxy': north,
                'height': file.height,
                'width': file.width,
                'dimensions': file.count,
                'valid_fraction': float(tags.get('valid_fraction', 'nan')),
                'start': _time(tags.get('start')),
                'end': _time(tags.get('end')),
                'file': path,
            }
    except (RasterioError, ValueError) as error:
        raise SourceError(
            f'{path}: it cannot be read ({error}); remove it, and repeat the run that '
            'wrote it'
        ) from error
    return row, tags


def _time(text: str | None) -> Any:
    return pd.to_datetime(text, utc=True) if text else pd.NaT


def check_picture_path(
    path: Path, suffixes: Sequence[str], overwrite: bool, source: Place | str
) -> None:
    """Refuse to write where it cannot be, or would destroy something.

    Args:
        path: the picture to be written.
        suffixes: those that it may have.
        overwrite: whether it may exist.
        source: what it is made from.

    Raises:
        OutputError: if the path has another suffix, exists, or is the source.
    """
    if path.suffix.lower() not in suffixes:
        raise OutputError(
            f'--output {path}: its name must end in {", ".join(suffixes[:-1])} or '
            f'{suffixes[-1]}'
            if len(suffixes) > 1
            else f'--output {path}: its name must end in {suffixes[0]}'
        )
    if isinstance(source, Path) and path.resolve() == source.resolve():
        raise OutputError(f'--output {path} is the input: choose another name')
    if path.is_dir():
        raise OutputError(f'--output {path} is a folder: add the name of a file')
    if path.exists() and not overwrite:
        raise OutputError(f'{path} exists: give --overwrite to replace it')
