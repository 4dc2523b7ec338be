"""Many files of pooled embeddings into one, sorted along a Hilbert curve."""

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dynamicvis_geo.callbacks.geoparquet import (
    Extent,
    GeoParquetWriter,
    steady_memory,
)

#: Bytes of embeddings in a row group: a sixteenth of the file, within these bounds. One
#: row group at a time is in memory.
ROW_GROUP_BYTES = (4 * 2**20, 128 * 2**20)

# Rows that are read, or whose place on the curve is computed, at a time.
_READ_ROWS = 2048
_CURVE_ROWS = 50_000


def merge_parts(
    parts: Sequence[Path],
    target: Path,
    scratch: Path,
    provenance: dict[str, Any],
    dimensions: int,
) -> None:
    """Write the rows of all parts into one file, in an order of their own.

    Neighbours on the ground become neighbours in the file, so that readers who filter
    by ``bbox`` skip most row groups. The order depends on the rows alone, not on who
    wrote them when: ties are broken by id. A chip that is there twice, as after a run
    whose parent was killed, is kept once.

    Memory holds ids and places of all rows, and one row group; the rows themselves
    pass through a file that is mapped into memory.

    Args:
        parts: Files of :class:`~.geoparquet.GeoParquetWriter` with one schema, at least
            one of them with rows.
        target: File to write; must not be open anywhere.
        scratch: File for the rows on their way, removed at the end.
        provenance: What made the embeddings.
        dimensions: Length of an embedding.
    """
    try:
        with steady_memory():
            _merge(parts, target, scratch, provenance, dimensions)
    finally:
        scratch.unlink(missing_ok=True)


def _merge(
    parts: Sequence[Path],
    target: Path,
    scratch: Path,
    provenance: dict[str, Any],
    dimensions: int,
) -> None:
    schema, extent = _copy(parts, scratch)
    with scratch.open('rb') as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    rows = _Rows(pa.ipc.open_file(pa.py_buffer(mapped)))
    order = _order(rows)
    width = schema.field('embedding').type.value_type.bit_width // 8
    size = dimensions * width
    least, most = ROW_GROUP_BYTES
    group = int(np.clip(len(order) * size // 16, least, most)) // size
    with GeoParquetWriter(target, schema, extent, provenance) as writer:
        for part in _pieces(order, max(1, group)):
            writer.write(rows.take(part))
            _let_go(mapped)


def _let_go(mapped: mmap.mmap) -> None:
    """Let the system take back the memory that mapped rows were read into."""
    if hasattr(mmap, 'MADV_DONTNEED'):
        mapped.madvise(mmap.MADV_DONTNEED)


def _copy(parts: Sequence[Path], scratch: Path) -> tuple[pa.Schema, Extent]:
    """Copy all rows into one file that can be read in any order."""
    extent = Extent()
    schema = pq.read_schema(parts[0]).remove_metadata()
    with pa.OSFile(str(scratch), 'wb') as file, pa.ipc.new_file(file, schema) as out:
        for part in parts:
            with pq.ParquetFile(part) as source:
                # Each thread of PyArrow would keep memory of its own.
                for batch in source.iter_batches(_READ_ROWS, use_threads=False):
                    out.write_batch(batch.cast(schema))
                    extent.add(batch)
    return schema, extent


class _Rows:
    """The rows of a file that is mapped into memory."""

    def __init__(self, file: pa.ipc.RecordBatchFileReader) -> None:
        self._batches = [file.get_batch(i) for i in range(file.num_record_batches)]
        counts = [batch.num_rows for batch in self._batches]
        self._ends = np.cumsum(counts)

    def column(self, name: str) -> pa.ChunkedArray:
        """Return one column of all rows."""
        return pa.chunked_array([batch.column(name) for batch in self._batches])

    def take(self, rows: npt.NDArray[np.int64]) -> pa.Table:
        """Return some rows, in the order asked for."""
        batch = np.searchsorted(self._ends, rows, side='right')
        by_batch = np.argsort(batch, kind='stable')
        found = []
        for i in np.unique(batch):
            first = 0 if i == 0 else self._ends[i - 1]
            inside = rows[by_batch[batch[by_batch] == i]] - first
            found.append(self._batches[i].take(pa.array(inside)))
        table = pa.Table.from_batches(found).combine_chunks()
        back = np.empty(len(rows), np.int64)
        back[by_batch] = np.arange(len(rows))
        return table.take(pa.array(back))


def _order(rows: _Rows) -> npt.NDArray[np.int64]:
    """Return the rows along the curve, each chip once."""
    ids = rows.column('id')
    keys = {'curve': pa.array(_curve(rows)), 'id': ids}
    if 'point_id' in rows._batches[0].schema.names:
        keys['point_id'] = rows.column('point_id')
    sorting = pa.table(keys)
    order = pc.sort_indices(
        sorting, sort_keys=[(name, 'ascending') for name in sorting.column_names]
    ).to_numpy()
    repeated = np.zeros(len(order), bool)
    if len(order) > 1:
        same = np.ones(len(order) - 1, bool)
        for name in keys.keys() - {'curve'}:
            values = keys[name].take(pa.array(order)).combine_chunks()
            equal = pc.equal(values.slice(1), values.slice(0, len(values) - 1))
            both_null = pc.and_(
                values.slice(1).is_null(), values.slice(0, len(values) - 1).is_null()
            )
            same &= pc.fill_null(equal, False).to_numpy(
                zero_copy_only=False
            ) | both_null.to_numpy(zero_copy_only=False)
        repeated[1:] = same
    kept: npt.NDArray[np.int64] = order[~repeated].astype(np.int64)
    return kept


def _curve(rows: _Rows) -> npt.NDArray[np.uint32]:
    """Return how far along a Hilbert curve over their extent the chips lie."""
    lon, lat = (
        np.nan_to_num(rows.column(name).to_numpy(), nan=0.0)
        for name in ('centre_lon', 'centre_lat')
    )
    bounds = (lon.min(), lat.min(), lon.max(), lat.max())
    # A curve needs an area.
    bounds = (*bounds[:2], *np.maximum(bounds[2:], np.add(bounds[:2], 1e-9)))
    curve = np.empty(len(lon), np.uint32)
    for first in range(0, len(lon), _CURVE_ROWS):
        part = slice(first, first + _CURVE_ROWS)
        points = gpd.GeoSeries.from_xy(lon[part], lat[part])
        curve[part] = points.hilbert_distance(total_bounds=bounds)
    return curve


def _pieces(order: npt.NDArray[np.int64], size: int) -> Iterator[npt.NDArray[np.int64]]:
    for first in range(0, len(order), size):
        yield order[first : first + size]
