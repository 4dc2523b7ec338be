"""GeoParquet files: written row group by row group, and read in parts."""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyproj

from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.provenance import PROVENANCE_KEY, to_json
from dynamicvis_geo.store import Store

#: Media type.
PARQUET_TYPE = 'application/vnd.apache.parquet'
#: Bytes of embeddings in a row group: a sixteenth of the file, within these bounds.
ROW_GROUP_BYTES = (4 * 2**20, 16 * 2**20)
#: Kinds of geometries in WKB, of which footprints are two.
_KINDS = {1: 'Point', 2: 'LineString', 3: 'Polygon', 6: 'MultiPolygon'}
_BOUNDS = ('xmin', 'ymin', 'xmax', 'ymax')


class Extent:
    """Kinds and bounds of all geometries of a file, for its metadata.

    Attributes:
        types: Kinds of geometries, such as 'Polygon'.
        lower: Least longitude and latitude, degrees; infinite without geometries.
        upper: Greatest ones.
    """

    def __init__(self) -> None:
        self.types: set[str] = set()
        self.lower = np.full(2, np.inf)
        self.upper = np.full(2, -np.inf)

    @classmethod
    def of(cls, rows: pa.Table) -> Self:
        """Compute the extent of some rows.

        Args:
            rows: With columns ``geometry``, of WKB, and ``bbox``.
        """
        extent = cls()
        if not rows.num_rows:
            return extent
        outlines = rows.column('geometry')
        # After the order of bytes (little endian): the kind.
        kinds = pc.unique(pc.binary_slice(outlines, 1, 5)).to_pylist()
        extent.types = {_KINDS[int.from_bytes(kind, 'little')] for kind in kinds}
        columns = [pc.struct_field(rows.column('bbox'), [i]) for i in range(4)]
        least = [pc.min(column).as_py() for column in columns[:2]]
        most = [pc.max(column).as_py() for column in columns[2:]]
        extent.lower, extent.upper = np.array(least, float), np.array(most, float)
        return extent

    @classmethod
    def read(cls, metadata: Mapping[bytes, bytes]) -> Self:
        """Read the extent that the metadata of a file tell.

        Args:
            metadata: Of a GeoParquet file.
        """
        extent = cls()
        column = json.loads(metadata[b'geo'])['columns']['geometry']
        extent.types = set(column['geometry_types'])
        if 'bbox' in column:
            extent.lower, extent.upper = np.reshape(column['bbox'], (2, 2))
        return extent

    @property
    def bounds(self) -> list[float]:
        """West, south, east and north, degrees."""
        return [*self.lower.tolist(), *self.upper.tolist()]

    def add(self, other: Self) -> None:
        """Grow to hold another extent.

        Args:
            other: The other one.
        """
        self.types |= other.types
        self.lower = np.fmin(self.lower, other.lower)
        self.upper = np.fmax(self.upper, other.upper)


class GeoParquetWriter:
    """Writes tables of one schema into one GeoParquet file, a row group each."""

    def __init__(
        self,
        path: Path | pa.NativeFile,
        schema: pa.Schema,
        extent: Extent,
        provenance: Mapping[str, Any],
        metadata: Mapping[str | bytes, str] | None = None,
        compression: Literal['zstd', 'none'] = 'zstd',
    ) -> None:
        """Create the file.

        Args:
            path: The file, or what takes its bytes.
            schema: As :func:`embedding_schema` gives it.
            extent: That of all rows that will be written.
            provenance: What made the embeddings.
            metadata: More for the footer of the file.
            compression: Of all columns.
        """
        # Not at the end: of a folder, readers see only what the schema holds.
        self._schema = schema.with_metadata(
            {
                'geo': _geo_metadata(extent),
                PROVENANCE_KEY: to_json(provenance),
                **(metadata or {}),
            }
        )
        names = [name for name in schema.names if name not in ('embedding', 'bbox')]
        # Of a file without embeddings, no name is wrong.
        floats = (
            'embedding' in schema.names
            and schema.field('embedding').type.value_type == pa.float32()
        )
        self._file = pq.ParquetWriter(
            path,
            self._schema,
            compression=compression,
            # Floats hardly repeat: a dictionary costs time and saves nothing. Their
            # first bytes do, which puts a tenth less into the file.
            use_dictionary=['crs'],
            use_byte_stream_split=['embedding.list.element'] if floats else False,
            # Nobody looks for rows by the least and greatest of all features.
            write_statistics=[*names, *(f'bbox.{name}' for name in _BOUNDS)],
        )

    def write(self, table: pa.Table) -> None:
        """Append a row group.

        Args:
            table: With the columns of the schema.
        """
        if table.num_rows:
            rows = table.replace_schema_metadata(self._schema.metadata)
            self._file.write_table(rows, row_group_size=table.num_rows)

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the file, or let go of it if writing has failed."""
        # Closing writes, and writing may be what has failed (a full disk).
        with nullcontext() if kind is None else suppress(OSError):
            self._file.close()


def _geo_metadata(extent: Extent) -> str:
    """Metadata of the GeoParquet specification 1.1.0, key 'geo'."""
    column: dict[str, Any] = {
        'encoding': 'WKB',
        'geometry_types': sorted(extent.types),
        'crs': pyproj.CRS('EPSG:4326').to_json_dict(),
        'edges': 'planar',
        'covering': {'bbox': {name: ['bbox', name] for name in _BOUNDS}},
    }
    if extent.types:
        column['bbox'] = extent.bounds
    return json.dumps(
        {
            'version': '1.1.0',
            'primary_column': 'geometry',
            'columns': {'geometry': column},
        }
    )


def row_group_size(rows: int, schema: pa.Schema) -> int:
    """Compute the rows of a row group; they depend on the plan alone.

    Args:
        rows: Rows of the file.
        schema: Of the file.
    """
    kind = schema.field('embedding').type
    if not pa.types.is_fixed_size_list(kind):
        return 1
    size: int = max(1, kind.list_size * kind.value_type.bit_width // 8)
    least, most = ROW_GROUP_BYTES
    return max(1, int(np.clip(rows * size // 16, least, most)) // size)


def row_groups(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Cut a stream of rows into tables of equal size, but for the last.

    Args:
        tables: The rows, in tables of any size.
        rows: Rows of a table.
    """
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


def one_ahead(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Have the next table made by a thread while one is used.

    Args:
        tables: Made by an iterator that takes its time.
    """
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, tables, None)
        while (table := coming.result()) is not None:
            coming = pool.submit(next, tables, None)
            yield table


@contextmanager
def opened(store: Store, name: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file to read parts of it.

    Args:
        store: Folder of the file.
        name: Of the file.

    Raises:
        OutputError: If it cannot be read.
    """
    with store.open(name) as file, unharmed(store, name), pq.ParquetFile(file) as it:
        yield it


@contextmanager
def unharmed(store: Store, name: str) -> Iterator[None]:
    """Name a file whose content is found to be damaged.

    Args:
        store: Folder of the file.
        name: Of the file.

    Raises:
        OutputError: If it is.
    """
    try:
        yield
    except pa.ArrowInvalid as error:
        raise OutputError(
            f"'{store.url}/{name}' cannot be read ({error}): it was damaged after "
            'it was written; remove it, and its chips are computed again'
        ) from error
