"""Pooled embeddings as one GeoParquet file, or a folder of them.

Columns, in the names that TorchGeo's embedding datasets, Clay and Major TOM use:

=================== ================================================================
``id``              identifier of the chip
``embedding``       float32 ``[D]``; or float16; or int8, to be multiplied by ``scale``
``scale``           float32, with int8 only: the largest magnitude of the row over 127
``datetime``,       start of the chip's time window, UTC; twice, because readers differ
``timestamp``       in the name. Chips without a window have the earliest time that
                    pandas can hold (1677-09-21), where TorchGeo lets undated images
                    begin: its embedding datasets cannot read a missing time
``start``, ``end``  the time window, UTC; null for chips without one
``centre_lon``,     centre of the chip, degrees
``centre_lat``
``crs``             CRS of the chip, e.g. 'EPSG:32618'
``minx`` ... ``maxy`` bounds of the chip in that CRS
``width``, ``height`` size of the chip, pixels
``valid_fraction``  share of the pixels that were not masked, 0..1; null if not known
``point_id``        identifier of the point that the chip surrounds, if there is one
``geometry``        footprint, WKB, EPSG:4326; in two parts across the antimeridian
``bbox``            bounds of the footprint, to filter by without reading geometries
=================== ================================================================

The metadata follow GeoParquet 1.1.0; the key ``dynamicvis_geo`` holds the provenance,
and ``emb`` the same in the terms of the STAC extension for embeddings (:mod:`.terms`).
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from dynamicvis_geo.errors import SourceError, one_line
from dynamicvis_geo.formats.base import Format
from dynamicvis_geo.formats.block_files import Blocks
from dynamicvis_geo.formats.parquet_files import (
    PARQUET_TYPE,
    Extent,
    GeoParquetWriter,
    one_ahead,
    opened,
    row_group_size,
    row_groups,
)
from dynamicvis_geo.formats.tables import (
    DTYPES,
    common_schema,
    embedding_schema,
    fit,
    join_keys,
    row_keys,
)
from dynamicvis_geo.paths import Place, kind_of, parquet_source
from dynamicvis_geo.provenance import (
    PARQUET_METADATA_FILE,
    describe_embeddings,
    find_provenance,
    to_json,
)
from dynamicvis_geo.store import Store
from dynamicvis_geo.terms import EMB_KEY, emb_json

#: Column of the vectors, and of the factors of those that are stored as integers.
EMBEDDING, SCALE = 'embedding', 'scale'
#: Memory that the vectors decoded at a time take, bytes.
_BATCH_BYTES = 16 * 2**20
#: Key of the footer: of which run a file of a folder is.
_RUN_KEY = b'dynamicvis_geo:run'


class GeoParquet(Format):
    """Pooled embeddings as GeoParquet, one file or a folder of files.

    A file is written anew when it is extended, with the rows that it has first; of a
    folder each run adds one file.
    """

    output: ClassVar[Literal['pooled', 'grid']] = 'pooled'
    dtypes: ClassVar[tuple[str, ...]] = DTYPES
    #: Names of single files; all others are folders, dots in them or not.
    suffixes: ClassVar[tuple[str, ...]] = ('.parquet', '.geoparquet')
    members: ClassVar[tuple[str, ...]] = (
        'part-*.parquet',
        'data-*.parquet',
        PARQUET_METADATA_FILE,
    )

    @property
    def is_folder(self) -> bool:
        """True if the output is a folder of files."""
        return not self._folder.url.lower().endswith(self.suffixes)

    def held(self) -> pa.StringArray:
        """Keys of the chips that the finished output holds."""
        store, names = self._files()
        return join_keys([_keys(store, name) for name in names])

    def merge(self, blocks: Blocks) -> None:
        """Join blocks, in the order of the plan, with what there was.

        The output depends on the rows and the run alone, not on who did which block
        when. It appears whole; to merge again gives it again. Memory holds a row group
        and a block.

        Raises:
            OutputError: If blocks cannot be read, or the output cannot be written.
        """
        folder, files = self._files()
        name, old = self._location.name, files
        if self.is_folder:
            # The file of this run, if it has been joined before.
            mine = [file for file in files if _run_of(folder, file) == blocks.chip_set]
            name, old = mine[0] if mine else f'data-{len(files):05d}.parquet', []
        rows = blocks.rows()
        first = next(rows, None)
        if first is not None or name in files or not files:
            self._write(blocks, first, rows, folder, name, old)
        if self.is_folder:
            provenance = self._provenance(blocks, blocks.schema)
            text = to_json(provenance, indent=2) + '\n'
            folder.put(PARQUET_METADATA_FILE, text.encode())

    def _files(self) -> tuple[Store, list[str]]:
        """Return the folder and the names of the files of the output."""
        if not self.is_folder:
            parent, name = self._location.parent, self._location.name
            return parent, [name] if name in parent.names() else []
        names = [n for n in self._folder.names() if n.endswith('.parquet')]
        return self._folder, sorted(
            n for n in names if n.startswith(('data-', 'part-'))
        )

    def _provenance(
        self, blocks: Blocks, schema: pa.Schema | None
    ) -> Mapping[str, Any]:
        size = blocks.provenance.get('emb:dimensions')
        if schema is not None:
            kind = schema.field('embedding').type
            size = kind.list_size if pa.types.is_fixed_size_list(kind) else size
        described = describe_embeddings('chip', size, self._dtype)
        return {**blocks.provenance, **described}

    def _write(
        self,
        blocks: Blocks,
        first: pa.Table | None,
        others: Iterator[pa.Table],
        folder: Store,
        name: str,
        old: Sequence[str],
    ) -> None:
        schemas = [] if first is None else [first.schema]
        keys = blocks.keys() if old else pa.array([], pa.string())
        extent, held = blocks.extent(), blocks.chips
        for file in old:
            with opened(folder, file) as parquet:
                schemas.append(parquet.schema_arrow.remove_metadata())
                extent.add(Extent.read(parquet.metadata.metadata))
            held += sum(len(rows) for rows in _old_rows(folder, file, keys, []))
        if not schemas:
            size = blocks.provenance.get('emb:dimensions')
            schemas = [embedding_schema(size, points=False, dtype=self._dtype)]
        schema = common_schema(schemas)
        provenance = self._provenance(blocks, schema)
        tables = itertools.chain(
            *(_old_rows(folder, file, keys) for file in old),
            () if first is None else (first,),
            others,
        )
        fitting = (fit(table, schema) for table in tables)
        groups = row_groups(fitting, row_group_size(held, schema))
        metadata: dict[str | bytes, str] = {
            _RUN_KEY: blocks.chip_set,
            EMB_KEY: emb_json(provenance),
        }
        with (
            folder.whole(name, blocks.store) as temporary,
            GeoParquetWriter(temporary, schema, extent, provenance, metadata) as writer,
        ):
            for group in one_ahead(groups):
                writer.write(group)

    @classmethod
    def is_at(cls, path: Place, is_folder: bool) -> bool:
        """Say whether a path is a file, or a folder with Parquet files in it."""
        return not is_folder or bool(_parts_in(path))

    @classmethod
    def read_chips(cls, path: Place, most: int) -> tuple[gpd.GeoDataFrame, int, int]:
        """Read all columns but the embeddings, a row each chip."""
        parts = find_parts(path)
        chips = pd.concat([_read_table(part) for part in parts], ignore_index=True)
        lengths = [_vector_length(part, read_schema(part)[0]) for part in parts]
        return chips, len(chips), max(lengths)

    @classmethod
    def assets(cls, name: str, crs: str) -> dict[str, dict[str, Any]]:
        """Name the file, or the folder of files, which has the chips of all CRSs."""
        return {
            'embeddings': {
                'href': name,
                'type': PARQUET_TYPE,
                'title': 'GeoParquet, a row a chip; column crs tells those of this CRS',
                'roles': ['data'],
            }
        }

    @classmethod
    def read_provenance(cls, path: Place) -> dict[str, Any]:
        """Return what made the files of an output; empty if they do not say."""
        return shared_provenance(find_parts(path))

    @classmethod
    def read_vectors(cls, path: Place) -> Iterator[NDArray[np.float32]]:
        """Yield the embeddings of all files, multiplied by their scale."""
        for part in find_parts(path):
            yield from read_vectors(part)


def _old_rows(
    store: Store,
    name: str,
    keys: pa.StringArray,
    columns: Sequence[str] | None = None,
) -> Iterator[pa.Table]:
    """Yield the rows of a file, but for those with one of some keys."""
    with opened(store, name) as file:
        names = file.schema_arrow.names
        wanted = names if columns is None else [*columns, 'id', 'point_id']
        wanted = [one for one in wanted if one in names]
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, wanted, use_threads=False)
            again = pc.is_in(row_keys(table), value_set=keys)
            yield table.filter(pc.invert(again)).replace_schema_metadata()


def _run_of(store: Store, name: str) -> str:
    with opened(store, name) as file:
        return str((file.metadata.metadata or {}).get(_RUN_KEY, b''), 'utf-8')


def _keys(store: Store, name: str) -> pa.StringArray:
    with opened(store, name) as file:
        names = [n for n in ('id', 'point_id') if n in file.schema_arrow.names]
        return row_keys(file.read(names, use_threads=False))


def _parts_in(folder: Place) -> list[Place]:
    return sorted(
        part
        for part in folder.glob('*.parquet')
        if not part.name.startswith(('.', '_'))
    )


def find_parts(path: Place) -> list[Place]:
    """Return the Parquet files that a path stands for.

    Args:
        path: A file or a folder, also at a URL. The ``*.parquet`` files of a folder are
            parts of one table; names that begin with a dot or an underscore are left
            out.

    Raises:
        SourceError: If there is no such file, or no part in the folder.
    """
    kind = kind_of(path)
    if kind == 'file':
        return [path]
    if kind is None:
        raise SourceError(
            f'{path}: no such file or folder; give a GeoParquet file of pooled '
            'embeddings, or a folder of its parts'
        )
    parts = _parts_in(path)
    if not parts:
        raise SourceError(
            f'{path}: no *.parquet file in this folder; give the GeoParquet file of '
            'pooled embeddings, or a folder of its parts (feature maps are opened by '
            'FeatureMaps)'
        )
    return parts


def read_schema(part: Place) -> tuple[pa.Schema, int]:
    """Return the columns of a file of embeddings, and the number of its rows.

    Args:
        part: The file.

    Raises:
        SourceError: If it is no Parquet file, or has no embeddings.
    """
    try:
        with pq.ParquetFile(parquet_source(part)) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (OSError, pa.ArrowException) as error:
        raise SourceError(
            f'{part}: not a readable Parquet file ({one_line(error)}): the file may be '
            'cut off; make it anew'
        ) from error
    if EMBEDDING not in schema.names:
        raise SourceError(
            f"{part}: no column '{EMBEDDING}'; its columns are "
            f'{", ".join(schema.names)}: give a file of pooled embeddings'
        )
    return schema, rows


def table_columns(schema: pa.Schema) -> tuple[str, ...]:
    """Name the columns that describe the rows.

    Left out are the embeddings, and the bounds of geometries that GeoParquet keeps to
    filter by, as GeoPandas leaves them out.

    Args:
        schema: Of a file.

    Returns:
        Names, in their order.
    """
    geo = json.loads((schema.metadata or {}).get(b'geo', b'{}'))
    covering = [
        path[0]
        for column in geo.get('columns', {}).values()
        for path in column.get('covering', {}).get('bbox', {}).values()
    ]
    hidden = {EMBEDDING, SCALE, *covering}
    return tuple(name for name in schema.names if name not in hidden)


def shared_provenance(parts: Sequence[Place]) -> dict[str, Any]:
    """Read the provenance that the files of one table share.

    Args:
        parts: The files.

    Returns:
        The provenance of the first; empty for files of other programs.

    Raises:
        SourceError: If the parts were not made by the same model.
    """
    found = [find_provenance(part) or {} for part in parts]
    for part, provenance in zip(parts, found, strict=True):
        if provenance.get('model') != found[0].get('model'):
            raise SourceError(
                f'{part}: its embeddings were made by another model, or with other '
                f'settings, than those of {parts[0]}: vectors of two models cannot be '
                'compared; keep them in two folders'
            )
    return found[0]


def _read_table(part: Place) -> gpd.GeoDataFrame:
    """Read all but the embeddings of a file."""
    schema, _ = read_schema(part)
    return _geo_table(part, parquet_source(part), list(table_columns(schema)))


def _geo_table(
    part: Place, source: Any, columns: Sequence[str] | None = None
) -> gpd.GeoDataFrame:
    try:
        chips = gpd.read_parquet(source, columns=columns)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise SourceError(
            f'{part}: it cannot be read as GeoParquet ({one_line(error)}); give a '
            '.parquet file that dynamicvis-geo embed wrote'
        ) from error
    if chips.geometry.name != 'geometry':
        chips = chips.rename_geometry('geometry')
    return chips.to_crs('EPSG:4326')


def read_rows(part: Place, rows: NDArray[np.int64]) -> gpd.GeoDataFrame:
    """Read all but the embeddings of some rows of a file.

    Args:
        part: The file.
        rows: Their numbers, from 0, ascending.

    Returns:
        The rows, EPSG:4326.

    Raises:
        SourceError: If it cannot be read as GeoParquet.
    """
    read_schema(part)
    with pq.ParquetFile(parquet_source(part)) as file:
        columns = list(table_columns(file.schema_arrow))
        metadata = file.metadata
        counts = [metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        ends = np.cumsum(counts, dtype=np.int64)
        groups = np.searchsorted(ends, rows, side='right')
        tables = [
            file.read_row_group(group, columns).take(
                rows[groups == group] - (ends[group] - counts[group])
            )
            for group in np.unique(groups).tolist()
        ]
        empty = file.schema_arrow.empty_table().select(columns)
    # GeoPandas knows geometries of a file.
    content = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables([empty, *tables]), content)
    return _geo_table(part, pa.BufferReader(content.getvalue()))


def read_bounds(part: Place) -> NDArray[np.float64]:
    """Read the bounds of the geometries of a file, or compute them.

    Args:
        part: The file.

    Returns:
        float64 ``[n, 4]``: west, south, east and north, degrees.

    Raises:
        SourceError: If it cannot be read as GeoParquet.
    """
    schema, _ = read_schema(part)
    geo = json.loads((schema.metadata or {}).get(b'geo', b'{}'))
    column = geo.get('primary_column', 'geometry')
    covering = geo.get('columns', {}).get(column, {}).get('covering', {}).get('bbox')
    if not covering:
        shapes = _geo_table(part, parquet_source(part), [column]).geometry
        bounds: NDArray[np.float64] = shapely.bounds(shapes.to_numpy())
        return bounds
    paths = [covering[name] for name in ('xmin', 'ymin', 'xmax', 'ymax')]
    boxes = read_column(part, paths[0][0]).combine_chunks()
    sides = [pc.struct_field(boxes, path[1:]).to_numpy(False) for path in paths]
    return np.stack(sides, axis=1).astype(np.float64)


def read_column(part: Place, name: str) -> pa.ChunkedArray:
    """Read a column of a file; all null if there is none.

    Args:
        part: The file.
        name: Of the column.

    Raises:
        SourceError: If it cannot be read.
    """
    schema, rows = read_schema(part)
    if name not in schema.names:
        return pa.chunked_array([pa.nulls(rows)])
    try:
        return pq.read_table(parquet_source(part), columns=[name])[name]
    except (OSError, pa.ArrowException) as error:
        raise SourceError(
            f'{part}: column {name!r} cannot be read ({one_line(error)}): the file may '
            'be damaged; make it anew'
        ) from error


def read_vectors(part: Place) -> Iterator[NDArray[np.float32]]:
    """Yield the vectors of a file, in the order of its rows.

    Args:
        part: The file.

    Yields:
        float32 ``[n, D]``, some rows each time, multiplied by their scale if they are
        stored as integers; a row is NaN where the file has none.

    Raises:
        SourceError: If they are no vectors of one length, or cannot be read.
    """
    schema, _ = read_schema(part)
    columns = _vector_columns(part, schema)
    length = _vector_length(part, schema)
    rows = max(1, _BATCH_BYTES // (4 * max(1, length)))
    with pq.ParquetFile(parquet_source(part), memory_map=True) as file:
        try:
            for batch in file.iter_batches(rows, columns=columns):
                vectors = _vectors(part, batch.column(EMBEDDING), length)
                if SCALE in columns:
                    scale = batch.column(SCALE).cast(pa.float32())
                    vectors = vectors * scale.to_numpy(zero_copy_only=False)[:, None]
                yield vectors
        except pa.ArrowException as error:
            raise SourceError(
                f'{part}: its embeddings cannot be read ({one_line(error)}): the file '
                'may be damaged; make it anew'
            ) from error


def _vector_columns(part: Place, schema: pa.Schema) -> list[str]:
    """Return the columns that hold the vectors of a file.

    Raises:
        SourceError: If its embeddings are no vectors, or integers without a scale.
    """
    kind = schema.field(EMBEDDING).type
    if not _is_vector(kind):
        raise SourceError(
            f"{part}: column '{EMBEDDING}' holds {kind}, not lists of numbers: give a "
            'file of pooled embeddings'
        )
    if not pa.types.is_integer(kind.value_type):
        return [EMBEDDING]
    if SCALE not in schema.names:
        raise SourceError(
            f'{part}: its embeddings are integers ({kind.value_type}), which a column '
            f"'{SCALE}' must give a factor each; there is none: make the file anew"
        )
    return [EMBEDDING, SCALE]


def _is_vector(kind: pa.DataType) -> bool:
    types = pa.types
    is_list = types.is_fixed_size_list, types.is_list, types.is_large_list
    is_number = types.is_floating, types.is_integer
    return any(test(kind) for test in is_list) and any(
        test(kind.value_type) for test in is_number
    )


def _vector_length(part: Place, schema: pa.Schema) -> int:
    """Return the length of the vectors of a file; 0 if there is none."""
    kind = schema.field(EMBEDDING).type
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    if not _is_vector(kind):
        return 0
    with pq.ParquetFile(parquet_source(part)) as file:
        for batch in file.iter_batches(1024, columns=[EMBEDDING]):
            there = batch.column(EMBEDDING).drop_null()
            if len(there):
                return len(there[0])
    return 0


def _vectors(part: Place, column: pa.Array, length: int) -> NDArray[np.float32]:
    there = column.drop_null()
    lengths = pc.list_value_length(there).to_numpy(zero_copy_only=False)
    if len(there) and (length == 0 or (lengths != length).any()):
        raise SourceError(
            f'{part}: embeddings of {min(length, *lengths)} to '
            f'{max(length, *lengths)} numbers: all must have the same length, and more '
            'than none'
        )
    # A missing number becomes NaN.
    values: NDArray[Any] = there.flatten().to_numpy(zero_copy_only=False)
    vectors = values.astype(np.float32, copy=False).reshape(len(there), length)
    if len(there) == len(column):
        return vectors
    rows = np.full((len(column), length), np.nan, np.float32)
    rows[column.is_valid().to_numpy(zero_copy_only=False)] = vectors
    return rows
