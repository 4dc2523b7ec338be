"""Pooled embeddings as one GeoParquet file, or a folder of them."""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dynamicvis_geo.callbacks.blocks import Description
from dynamicvis_geo.callbacks.geoparquet import (
    DTYPES,
    Extent,
    GeoParquetWriter,
    embedding_schema,
)
from dynamicvis_geo.callbacks.parquet_blocks import (
    Gathering,
    Merged,
    list_failures,
    opened,
    row_keys,
)
from dynamicvis_geo.callbacks.predictions import ChipTable, Predictions
from dynamicvis_geo.callbacks.store import Store, Target
from dynamicvis_geo.datasets.chip_ids import join_keys
from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.provenance import (
    PARQUET_METADATA_FILE,
    describe_embeddings,
    to_json,
)

#: What names of single files end in; all others are folders, dots in them or not.
FILE_SUFFIXES = ('.parquet', '.geoparquet')
#: Bytes of embeddings in a row group: a sixteenth of the file, within these bounds.
ROW_GROUP_BYTES = (4 * 2**20, 16 * 2**20)

#: Key of the footer: of which run a file of a folder is.
_RUN_KEY = b'dynamicvis_geo:run'


class GeoParquet:
    """Pooled embeddings: see :class:`~.formats.Format`.

    A file is written anew when it is extended, with the rows that it has first; of a
    folder each run adds one file.
    """

    output: ClassVar[str] = 'pooled'
    dtypes: ClassVar[tuple[str, ...]] = DTYPES
    members: ClassVar[tuple[str, ...]] = (
        'part-*.parquet',
        'data-*.parquet',
        PARQUET_METADATA_FILE,
    )

    def __init__(self, url: str, dtype: str) -> None:
        """Say where the output is, and the type of its numbers."""
        self._place = Target.of(url)
        self._is_file = url.lower().endswith(FILE_SUFFIXES)
        self._folder = Store(url)
        self._dtype = dtype

    def held(self) -> pa.StringArray:
        """Keys of the chips that the finished output holds."""
        store, names = self._files()
        return join_keys([_keys(store, name) for name in names])

    def check(self, chips: ChipTable) -> None:
        """Take any chips."""

    def origins(self, chips: ChipTable) -> Sequence[tuple[float, float] | None]:
        """Let tiles of the plan hang from the origin of each CRS."""
        return [None] * len(chips.source_crs)

    def write_maps(self, work: Any, number: int, predictions: Predictions) -> None:
        """Have nothing to write: embeddings are in the files of the blocks."""

    def merge(self, store: Store, run: Description, partial: bool) -> Merged:
        """Join the blocks of a run, in the order of the plan, with what there was.

        The output depends on the rows and the description alone, not on who did which
        block when. It appears whole; to merge again gives it again. Memory holds a row
        group and a block.

        Args:
            store: Where the blocks are; they stay.
            run: The description of the run.
            partial: Whether to join what there is, if blocks are missing.

        Raises:
            OutputError: If blocks are missing or cannot be read, or the output cannot
                be written.
        """
        target, files = self._files()
        name, old = self._place.name, files
        if not self._is_file:
            # The file of this run, if it has been joined before.
            mine = [file for file in files if _run_of(target, file) == _word(run)]
            name, old = mine[0] if mine else f'data-{len(files):05d}.parquet', []
        blocks = Gathering(store, run, partial)
        rows = blocks.rows()
        first = next(rows, None)
        if first is not None or name in files or not files:
            self._write(store, run, blocks, first, rows, target, name, old)
        if not self._is_file:
            provenance = self._provenance(run, blocks.schema)
            text = to_json(provenance, indent=2) + '\n'
            target.put(PARQUET_METADATA_FILE, text.encode())
        failed = list_failures(
            self._place,
            store,
            blocks.failed(),
            blocks.keys,
        )
        return Merged(blocks.count, failed, blocks.missing)

    def _files(self) -> tuple[Store, list[str]]:
        """Return the folder and the names of the files of the output."""
        if self._is_file:
            there = self._place.name in self._place.parent.names()
            return self._place.parent, [self._place.name] if there else []
        names = [n for n in self._folder.names() if n.endswith('.parquet')]
        return self._folder, sorted(
            n for n in names if n.startswith(('data-', 'part-'))
        )

    def _provenance(
        self, run: Description, schema: pa.Schema | None
    ) -> Mapping[str, Any]:
        size = run.provenance.get('emb:dimensions')
        if schema is not None:
            kind = schema.field('embedding').type
            size = kind.list_size if pa.types.is_fixed_size_list(kind) else size
        return {**run.provenance, **describe_embeddings('chip', size, self._dtype)}

    def _write(
        self,
        store: Store,
        run: Description,
        blocks: Gathering,
        first: pa.Table | None,
        others: Iterator[pa.Table],
        target: Store,
        name: str,
        old: Sequence[str],
    ) -> None:
        schemas = [] if first is None else [first.schema]
        keys = blocks.keys() if old else pa.array([], pa.string())
        extent, held = blocks.extent(), run.chips
        for file in old:
            with opened(target, file) as parquet:
                schemas.append(parquet.schema_arrow.remove_metadata())
                extent.add(Extent.read(parquet.metadata.metadata))
            held += sum(len(rows) for rows in _old_rows(target, file, keys, []))
        if not schemas:
            size = run.provenance.get('emb:dimensions')
            schemas = [embedding_schema(size, points=False, dtype=self._dtype)]
        schema = _common(schemas)
        provenance = self._provenance(run, schema)
        tables = itertools.chain(
            *(_old_rows(target, file, keys) for file in old),
            () if first is None else (first,),
            others,
        )
        fitting = (_fit(table, schema) for table in tables)
        groups = _groups(fitting, _group_rows(held, schema))
        with (
            target.whole(name, store) as temporary,
            GeoParquetWriter(
                temporary, schema, extent, provenance, {_RUN_KEY: _word(run)}
            ) as writer,
        ):
            for group in _ahead(groups):
                writer.write(group)


def _common(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Return the schema with the most columns: not all chips have points."""
    kinds = {schema.field('embedding').type for schema in schemas}
    fixed = [kind for kind in kinds if pa.types.is_fixed_size_list(kind)]
    if len(fixed) > 1:
        sizes = ' and '.join(sorted(str(kind.list_size) for kind in fixed))
        raise OutputError(
            f'embeddings of {sizes} numbers do not fit into one output: choose another'
        )
    widest = max(schemas, key=len)
    if not fixed:
        return widest
    index = widest.get_field_index('embedding')
    return widest.set(index, widest.field(index).with_type(fixed[0]))


def _fit(table: pa.Table, schema: pa.Schema) -> pa.Table:
    if table.schema.equals(schema):
        return table
    columns = [
        table[field.name]
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, names=schema.names).cast(schema)


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


def _word(run: Description) -> str:
    """Tell runs of one output apart, whatever the size of their blocks."""
    return hashlib.sha256(f'{run.plan} {run.left_out}'.encode()).hexdigest()[:12]


def _run_of(store: Store, name: str) -> str:
    with opened(store, name) as file:
        return str((file.metadata.metadata or {}).get(_RUN_KEY, b''), 'utf-8')


def _keys(store: Store, name: str) -> pa.StringArray:
    with opened(store, name) as file:
        names = [n for n in ('id', 'point_id') if n in file.schema_arrow.names]
        return row_keys(file.read(names, use_threads=False))


def _group_rows(rows: int, schema: pa.Schema) -> int:
    """Return the rows of a row group, which depend on the plan alone."""
    kind = schema.field('embedding').type
    if not pa.types.is_fixed_size_list(kind):
        return 1
    size: int = max(1, kind.list_size * kind.value_type.bit_width // 8)
    least, most = ROW_GROUP_BYTES
    return max(1, int(np.clip(rows * size // 16, least, most)) // size)


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


def _ahead(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Have the next table made by a thread while one is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, tables, None)
        while (table := coming.result()) is not None:
            coming = pool.submit(next, tables, None)
            yield table
