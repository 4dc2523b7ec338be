"""Files of blocks: a GeoParquet row for each chip, whatever the format of the output.

For pooled embeddings they have the columns of the output (:mod:`.geoparquet`), for
feature maps those of the chips alone. Chips that have failed have ``reason``,
``message`` and ``failed`` (when that was) in place of an embedding.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.formats.base import Predictions, RunChips
from dynamicvis_geo.formats.parquet_files import (
    Extent,
    GeoParquetWriter,
    opened,
    unharmed,
)
from dynamicvis_geo.formats.tables import (
    chip_rows,
    embedding_table,
    join_keys,
    row_keys,
    zone_extents,
)
from dynamicvis_geo.store import Location, Store

SUFFIX = '.parquet'
#: Footers of blocks that are read at a time.
READERS = 16
#: Key of the metadata of a block of feature maps: their D, h and w.
_MAP_SHAPE = b'maps'

FAILURE = pa.schema(
    [
        ('reason', pa.string()),
        ('message', pa.string()),
        ('failed', pa.timestamp('us', tz='UTC')),
    ]
)
#: Columns of the list of failures, where the chips have them.
_LISTED = ['id', 'point_id', 'reason', 'message', 'failed', 'start', 'end', 'crs']


def encode_block(
    chips: RunChips,
    block: NDArray[np.int64],
    predictions: Sequence[Predictions],
    now: datetime,
    dtype: str | None = 'float32',
) -> pa.Buffer:
    """Make the file of a block.

    Args:
        chips: Where and when the chips are.
        block: Rows of the block in the chip table, in the order of the plan.
        predictions: What became of each of them, in any order.
        now: Is told of chips that have failed.
        dtype: Type in which embeddings are stored; None for feature maps, which are
            stored elsewhere.

    Returns:
        A Parquet file in memory.

    Raises:
        ValueError: If a row of the block is missing, or there is another.
        OutputError: If `dtype` cannot hold an embedding.
    """
    given = [one for one in predictions if len(one.chip)]
    failures = {one.chip: one for some in predictions for one in some.failures}
    valid = np.full(len(block), np.nan, np.float32)
    done = np.zeros(len(block), dtype=bool)
    places = [_places(block, one.chip) for one in given]
    for one, place in zip(given, places, strict=True):
        done[place] = True
        if one.valid_fraction is not None:
            valid[place] = one.valid_fraction
    failed = np.zeros(len(block), dtype=bool)
    failed[_places(block, np.array(list(failures), np.int64))] = True
    if (done == failed).any():
        raise ValueError(f'chip {block[done == failed][0]} is missing, or there twice')
    rows = chips.rows(block)
    if dtype is None:
        table = chip_rows(rows, valid)
    else:
        # Where all have failed nothing tells the length, and nothing is stored.
        shape = given[0].embedding.shape[1:] if given else (1,)
        features = np.zeros((len(block), *shape), np.float32)
        for one, place in zip(given, places, strict=True):
            features[place] = one.embedding
        table = _without(embedding_table(rows, features, valid, dtype), failed)
    told = [
        (*failures[row][1:], now) if row in failures else None for row in block.tolist()
    ]
    for i, column in enumerate(FAILURE):
        values = [None if one is None else one[i] for one in told]
        table = table.append_column(column, pa.array(values, column.type))
    metadata: dict[str | bytes, str] = {}
    if dtype is None and given:
        metadata[_MAP_SHAPE] = ','.join(map(str, given[0].embedding.shape[1:]))
    sink = pa.BufferOutputStream()
    # Of what the output will hold.
    extent = Extent.of(table.filter(pa.array(~failed)))
    # It lives shortly: to pack it and unpack it takes longer than to read a bit more.
    with GeoParquetWriter(sink, table.schema, extent, {}, metadata, 'none') as writer:
        writer.write(table)
    return sink.getvalue()


def _places(block: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where in a block some rows are."""
    order = np.argsort(block)
    found = np.searchsorted(block, rows, sorter=order)
    places: NDArray[np.int64] = order[np.minimum(found, len(block) - 1)]
    if (block[places] != rows).any():
        raise ValueError(f'chip {rows[block[places] != rows][0]} is of another block')
    return places


def _without(table: pa.Table, failed: NDArray[np.bool_]) -> pa.Table:
    """Return a table without embeddings for some of its rows."""
    if not failed.any():
        return table
    none = pa.array(failed)
    for name in ('embedding', 'scale', 'valid_fraction'):
        if name not in table.column_names:
            continue
        index = table.schema.get_field_index(name)
        column = table[name].combine_chunks()
        if name == 'embedding':
            size = column.type.list_size
            column = pa.FixedSizeListArray.from_arrays(column.values, size, mask=none)
        else:
            column = pc.if_else(none, pa.scalar(None, column.type), column)
        table = table.set_column(index, table.schema.field(name), column)
    return table


def read_block(store: Store, name: str) -> pa.Table:
    """Read the file of a block.

    Args:
        store: Folder of the blocks.
        name: Of the file.

    Raises:
        OutputError: If it cannot be read.
    """
    with store.open(name) as file, unharmed(store, name):
        # Whole: many small reads through Python take longer than the reading.
        content = pa.py_buffer(file.read())
        return pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)


def has_failures(store: Store, name: str) -> bool:
    """Tell if chips of a block have failed.

    Args:
        store: Folder of the blocks.
        name: Of the block's file.

    Raises:
        OutputError: If the file of the block cannot be read.
    """
    with opened(store, name) as block:
        reasons = block.read(['reason'], use_threads=False)['reason']
    return int(reasons.null_count) < len(reasons)


@dataclass(eq=False)
class Blocks:
    """The blocks of a run that are done, to be joined into an output.

    Attributes:
        store: Folder of the blocks, and of what a format keeps beside them.
        files: Names of the blocks' files, in the order of the plan.
        run_id: Stands in the names of all files of the run there.
        chip_set: Equal for runs of the same chips, whatever the size of their blocks.
        chips: Number of chips of the whole run.
        provenance: What goes into the output.
        count: Number of rows that were read and are done.
        schema: Of a block with such rows, metadata included; None if there was none.
    """

    store: Store
    files: Sequence[str]
    run_id: str
    chip_set: str
    chips: int
    provenance: Mapping[str, Any]
    count: int = field(default=0, init=False)
    schema: pa.Schema | None = field(default=None, init=False)
    _failed: list[pa.Table] = field(default_factory=list, init=False)
    _zones: list[pa.Table] = field(default_factory=list, init=False)

    def rows(self) -> Iterator[pa.Table]:
        """Yield the rows that are done, block by block, in the order of the plan.

        To be gone through once.

        Raises:
            OutputError: If a block cannot be read.
        """
        for file in self.files:
            table = read_block(self.store, file)
            if table['reason'].null_count < table.num_rows:
                good = pc.is_null(table['reason'])
                bad = table.filter(pc.invert(good)).replace_schema_metadata()
                listed = [n for n in [*_LISTED, 'geometry'] if n in bad.column_names]
                self._failed.append(bad.select(listed))
                table = table.filter(good)
            if not table.num_rows:
                continue
            self.schema = table.schema
            self.count += table.num_rows
            self._zones.append(zone_extents(table))
            yield table.drop_columns(FAILURE.names).replace_schema_metadata()

    def failed(self) -> pa.Table:
        """Return the rows that were read and have failed; no columns without any."""
        return pa.concat_tables(self._failed) if self._failed else pa.table({})

    def zones(self) -> pa.Table:
        """Return the extents of the rows that were read, a row each CRS."""
        return zone_extents(*self._zones)

    def map_shape(self) -> tuple[int, int, int] | None:
        """Return D, h and w of the feature maps; None if no row that was read is done.

        Raises:
            KeyError: If the blocks are of pooled embeddings.
        """
        if self.schema is None:
            return None
        told = self.schema.metadata[_MAP_SHAPE].decode()
        dimensions, height, width = map(int, told.split(','))
        return dimensions, height, width

    def extent(self) -> Extent:
        """Return the extent of the chips that are done, without going through them.

        Raises:
            OutputError: If a block cannot be read.
        """
        extent = Extent()
        # Stores answer slowly, and many at a time.
        with ThreadPoolExecutor(READERS) as pool:
            for one in pool.map(self._extent_of, self.files):
                extent.add(one)
        return extent

    def _extent_of(self, file: str) -> Extent:
        with opened(self.store, file) as block:
            return Extent.read(block.metadata.metadata)

    def keys(self) -> pa.StringArray:
        """Return the keys of the chips that are done, without going through them.

        Raises:
            OutputError: If a block cannot be read.
        """
        return join_keys([self._keys_of(file) for file in self.files])

    def _keys_of(self, file: str) -> pa.StringArray:
        with opened(self.store, file) as block:
            names = [n for n in ('id', 'point_id') if n in block.schema_arrow.names]
            table = block.read([*names, 'reason'], use_threads=False)
        return row_keys(table.filter(pc.is_null(table['reason'])))


def list_failures(location: Location, blocks: Blocks) -> int:
    """Bring the list of failures up to date.

    What was listed before stays, but for the chips of these blocks.

    Args:
        location: The output.
        blocks: The blocks, all rows of which have been gone through.

    Returns:
        Number of chips that are listed; without any there is no file.
    """
    failed = blocks.failed()
    tables = [failed] if failed.num_rows else []
    parent, name = location.parent, location.failures
    content = parent.read(name)
    if content is not None:
        old = pq.read_table(pa.BufferReader(content))
        old = old.rename_columns(
            ['failed' if n == 'datetime' else n for n in old.column_names]
        ).drop_columns([n for n in ('bbox',) if n in old.column_names])
        keys = row_keys(old)
        told = (blocks.keys(), row_keys(failed))
        again = [pc.is_in(keys, value_set=one) for one in told]
        kept = old.filter(pc.invert(pc.or_(*again))).replace_schema_metadata()
        if kept.num_rows:
            tables.insert(0, kept)
    if not tables:
        parent.remove(name)
        return 0
    listed = pa.concat_tables(tables, promote_options='permissive')
    frame = listed.to_pandas().rename(columns={'failed': 'datetime'})
    frame = frame.sort_values('id', ignore_index=True, kind='stable')
    outlines = shapely.from_wkb(frame.pop('geometry').to_numpy())
    frame = gpd.GeoDataFrame(frame, geometry=outlines, crs='EPSG:4326')
    with parent.whole(name, blocks.store) as temporary:
        frame.to_parquet(
            temporary, index=False, write_covering_bbox=True, compression='zstd'
        )
    return len(frame)


def listed_keys(location: Location) -> pa.StringArray:
    """Read the keys of all chips in a list of failures.

    Args:
        location: Of the output that it is of.

    Returns:
        The keys; none if there is no list.

    Raises:
        OutputError: If it cannot be read.
    """
    content = location.parent.read(location.failures)
    if content is None:
        return pa.array([], pa.string())
    try:
        return row_keys(pq.read_table(pa.BufferReader(content)))
    except (pa.ArrowException, KeyError) as error:
        raise OutputError(
            f"'{location.parent.url}/{location.failures}' is no list of failures "
            f'({error}): move it away'
        ) from error
