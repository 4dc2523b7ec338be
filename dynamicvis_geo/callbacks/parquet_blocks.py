"""Blocks of pooled embeddings as GeoParquet files, and what they are joined into.

A block's file has the columns of an output (:mod:`.geoparquet`), and of chips that have
failed ``reason``, ``message`` and ``failed`` (when that was) in place of an embedding.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from dynamicvis_geo.callbacks.blocks import Description, Ints, block_name, finished
from dynamicvis_geo.callbacks.geoparquet import (
    Extent,
    GeoParquetWriter,
    embedding_schema,
    embedding_table,
    steady_memory,
)
from dynamicvis_geo.callbacks.predictions import ChipTable, Predictions
from dynamicvis_geo.callbacks.store import Store
from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.provenance import describe_embeddings

SUFFIX = '.parquet'

#: Bytes of embeddings in a row group: a sixteenth of the file, within these bounds.
ROW_GROUP_BYTES = (4 * 2**20, 64 * 2**20)

_FAILURE = pa.schema(
    [
        ('reason', pa.string()),
        ('message', pa.string()),
        ('failed', pa.timestamp('us', tz='UTC')),
    ]
)
#: Columns of the list of failures, where the chips have them.
_LISTED = ['id', 'point_id', 'reason', 'message', 'failed', 'start', 'end', 'crs']


def encode_block(
    chips: ChipTable,
    block: Ints,
    predictions: Sequence[Predictions],
    now: datetime,
    dtype: str = 'float32',
) -> pa.Buffer:
    """Make the file of a block.

    Args:
        chips: Where and when the chips are.
        block: Rows of the block in the chip table, in the order of the plan.
        predictions: What became of each of them, in any order.
        now: Is told of chips that have failed.
        dtype: Type in which embeddings are stored.

    Raises:
        ValueError: If a row of the block is missing, or there is another.
        OutputError: If `dtype` cannot hold an embedding.
    """
    given = [one for one in predictions if len(one.chip)]
    failures = {one[0]: one[1:] for some in predictions for one in some.failures}
    # Where all have failed nothing tells the length, and nothing is stored.
    dimensions = given[0].embedding.shape[1] if given else 1
    features = np.zeros((len(block), dimensions), np.float32)
    valid = np.full(len(block), np.nan, np.float32)
    done = np.zeros(len(block), dtype=bool)
    if given:
        batch = Predictions.concatenate(given)
        place = _places(block, batch.chip)
        features[place], done[place] = batch.embedding, True
        if batch.valid_fraction is not None:
            valid[place] = batch.valid_fraction
    failed = np.zeros(len(block), dtype=bool)
    failed[_places(block, np.array(list(failures), np.int64))] = True
    if (done == failed).any():
        raise ValueError(f'chip {block[done == failed][0]} is missing, or there twice')
    table = _without(embedding_table(chips.rows(block), features, valid, dtype), failed)
    told = [
        (*failures[row], now) if row in failures else None for row in block.tolist()
    ]
    for i, field in enumerate(_FAILURE):
        column = [None if one is None else one[i] for one in told]
        table = table.append_column(field, pa.array(column, field.type))
    extent = Extent()
    extent.add(table)
    sink = pa.BufferOutputStream()
    with GeoParquetWriter(sink, table.schema, extent, {}) as writer:
        writer.write(table)
    return sink.getvalue()


def _places(block: Ints, rows: Ints) -> Ints:
    """Return where in a block some rows are."""
    order = np.argsort(block)
    found = np.searchsorted(block, rows, sorter=order)
    places: Ints = order[np.minimum(found, len(block) - 1)]
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


@dataclass(frozen=True)
class Merged:
    """What blocks have been joined into.

    Attributes:
        rows: Embeddings in the output.
        failed: Chips in the list of failures.
        missing: Blocks that are not done, if that was asked for.
    """

    rows: int
    failed: int
    missing: int


def merge_blocks(
    store: Store,
    run: Description,
    target: Store,
    name: str,
    failures: str,
    partial: bool = False,
) -> Merged:
    """Join the blocks of a run into one file, in the order of the plan.

    The file depends on the rows and the description alone, not on who did which block
    when. It appears whole; to merge again gives it again. Memory holds a row group and
    a block.

    Args:
        store: Where the blocks are; they stay.
        run: The description of the run.
        target: Where the file goes.
        name: Of the file.
        failures: Name of the file that lists what has failed, if anything has.
        partial: Whether to join what there is, if blocks are missing.

    Raises:
        OutputError: If blocks are missing or cannot be read, or the file cannot be
            written.
    """
    done = finished(store, run, SUFFIX)
    missing = int((~done).sum())
    if missing and not partial:
        raise OutputError(
            f"'{store.url}' lacks {missing} of {run.blocks} blocks: go on with the run "
            'to have all of them, or join what there is (partial=True)'
        )
    files = [
        block_name(run, number, SUFFIX) for number in np.flatnonzero(done).tolist()
    ]
    with steady_memory():
        schema, extent, failed = _survey(store, files)
        rows = 0
        with (
            target.whole(name) as temporary,
            GeoParquetWriter(
                temporary, schema, extent, {**run.provenance, **_described(schema)}
            ) as writer,
        ):
            for group in _groups(_embedded(store, files), _group_rows(run, schema)):
                writer.write(group)
                rows += group.num_rows
    _list_failures(target, failures, failed)
    return Merged(rows, failed.num_rows, missing)


def _described(schema: pa.Schema) -> dict[str, Any]:
    kind = schema.field('embedding').type
    fixed = pa.types.is_fixed_size_list(kind)
    dtype = np.dtype(kind.value_type.to_pandas_dtype()).name
    return describe_embeddings('chip', kind.list_size if fixed else None, dtype)


def _survey(store: Store, files: Sequence[str]) -> tuple[pa.Schema, Extent, pa.Table]:
    """Return the schema of the output, its extent, and the rows that have failed."""
    schema, extent = embedding_schema(None, points=False), Extent()
    failed = []
    for file in files:
        with _opened(store, file) as block:
            there = block.schema_arrow
            columns = [name for name in _LISTED if name in there.names]
            table = block.read([*columns, 'geometry'], use_threads=False)
        good = pc.is_null(table['reason'])
        failed.append(table.filter(pc.invert(good)).replace_schema_metadata())
        if pc.any(good).as_py():
            extent.add(table.filter(good))
            schema = _without_failures(there)
    return schema, extent, pa.concat_tables(failed) if failed else pa.table({})


def _without_failures(schema: pa.Schema) -> pa.Schema:
    return pa.schema([one for one in schema if one.name not in _FAILURE.names])


@contextmanager
def _opened(store: Store, name: str) -> Iterator[pq.ParquetFile]:
    with store.open(name) as file:
        try:
            with pq.ParquetFile(file) as block:
                yield block
        except pa.ArrowInvalid as error:
            raise OutputError(
                f"'{store.url}/{name}' cannot be read ({error}): it was damaged after "
                'it was written; remove it, and its chips are computed again'
            ) from error


def _embedded(store: Store, files: Sequence[str]) -> Iterator[pa.Table]:
    """Yield what has not failed, block by block."""
    for file in files:
        with _opened(store, file) as block:
            table = block.read(use_threads=False)
        table = table.filter(pc.is_null(table['reason']))
        if table.num_rows:
            table = table.drop_columns(_FAILURE.names)
            yield table.replace_schema_metadata()


def _group_rows(run: Description, schema: pa.Schema) -> int:
    """Return the rows of a row group, which depend on the plan alone."""
    kind = schema.field('embedding').type
    if not pa.types.is_fixed_size_list(kind):
        return 1
    size: int = kind.list_size * kind.value_type.bit_width // 8
    least, most = ROW_GROUP_BYTES
    return max(1, min(max(run.chips * size // 16, least), most) // size)


def _groups(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Cut a stream of rows anew."""
    held: list[pa.Table] = []
    count = 0
    for table in tables:
        held.append(table)
        count += table.num_rows
        while count >= rows:
            joined = pa.concat_tables(held)
            yield joined.slice(0, rows).combine_chunks()
            held, count = [joined.slice(rows)], count - rows
    if count:
        yield pa.concat_tables(held).combine_chunks()


def _list_failures(target: Store, name: str, failed: pa.Table) -> None:
    if not failed.num_rows:
        target.remove(name)
        return
    frame = failed.to_pandas().rename(columns={'failed': 'datetime'})
    frame = frame.sort_values('id', ignore_index=True)
    frame['geometry'] = shapely.from_wkb(frame['geometry'].to_numpy())
    listed = gpd.GeoDataFrame(frame, geometry='geometry', crs='EPSG:4326')
    with target.whole(name) as temporary:
        listed.to_parquet(temporary, index=False, write_covering_bbox=True)
