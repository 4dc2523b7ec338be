"""Pooled embeddings as GeoParquet.

Columns, in the names that TorchGeo's embedding datasets, Clay and Major TOM use:

=================== ================================================================
``id``              identifier of the chip
``embedding``       float32 ``[D]``
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

The metadata follow GeoParquet 1.1.0; the key ``dynamicvis_geo`` holds the provenance.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pyproj
import shapely

from dynamicvis_geo.callbacks.predictions import ChipTable, Predictions
from dynamicvis_geo.provenance import PROVENANCE_KEY, describe_embeddings, to_json

#: Memory that the embeddings of one row group take, bytes.
ROW_GROUP_BYTES = 16 * 2**20

_TIME = pa.timestamp('us', tz='UTC')
_BBOX = pa.struct([(name, pa.float64()) for name in ('xmin', 'ymin', 'xmax', 'ymax')])
_UNDATED = pd.Timestamp.min.ceil('s').tz_localize('UTC')


def embedding_schema(dimensions: int | None, points: bool) -> pa.Schema:
    """Schema of a file of pooled embeddings.

    Args:
        dimensions: Length of an embedding; None (an empty file of an unknown model)
            gives lists of any length.
        points: Whether the chips have points.

    Returns:
        The schema, without metadata.
    """
    if dimensions is None:
        embedding = pa.list_(pa.float32())
    else:
        embedding = pa.list_(pa.float32(), dimensions)
    fields = [
        ('id', pa.string()),
        ('embedding', embedding),
        ('datetime', _TIME),
        ('timestamp', _TIME),
        ('start', _TIME),
        ('end', _TIME),
        ('centre_lon', pa.float64()),
        ('centre_lat', pa.float64()),
        ('crs', pa.string()),
        *((name, pa.float64()) for name in ('minx', 'miny', 'maxx', 'maxy')),
        ('width', pa.int32()),
        ('height', pa.int32()),
        ('valid_fraction', pa.float32()),
        *([('point_id', pa.string())] if points else []),
        ('geometry', pa.binary()),
        ('bbox', _BBOX),
    ]
    return pa.schema(fields)


def embedding_table(
    rows: gpd.GeoDataFrame,
    embedding: npt.NDArray[np.float32],
    valid_fraction: npt.NDArray[np.float32] | None = None,
) -> pa.Table:
    """Join rows of the chip table with their embeddings.

    Args:
        rows: Rows of the chip table, EPSG:4326.
        embedding: float32 ``[N, D]``, in the order of `rows`.
        valid_fraction: float32 ``[N]``, or None if not known; NaN is written as null.

    Returns:
        A table with the columns of :func:`embedding_schema`.
    """
    count, dimensions = embedding.shape
    start, end = (_utc(rows[name]) for name in ('start', 'end'))
    nominal = start.fillna(_UNDATED)
    if valid_fraction is None:
        valid_fraction = np.full(count, np.nan, np.float32)
    columns: dict[str, Any] = {
        'id': rows['chip_id'].astype(str),
        'embedding': pa.FixedSizeListArray.from_arrays(
            pa.array(embedding.reshape(-1), pa.float32()), dimensions
        ),
        'datetime': nominal,
        'timestamp': nominal,
        'start': start,
        'end': end,
        'valid_fraction': pa.array(valid_fraction, pa.float32(), from_pandas=True),
        'geometry': shapely.to_wkb(rows.geometry.to_numpy()),
        'bbox': pa.StructArray.from_arrays(
            list(shapely.bounds(rows.geometry.to_numpy()).T), fields=list(_BBOX)
        ),
    }
    schema = embedding_schema(dimensions, 'point_id' in rows)
    arrays = [
        _array(columns.get(field.name, rows.get(field.name)), field.type)
        for field in schema
    ]
    return pa.table(arrays, schema=schema)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.Array):
        return values
    return pa.array(values, kind, from_pandas=True)


def _utc(times: pd.Series) -> pd.Series:
    times = pd.to_datetime(times)
    if times.dt.tz is None:
        return times.dt.tz_localize('UTC')
    return times.dt.tz_convert('UTC')


class GeoParquetWriter:
    """Writes tables of one schema into one GeoParquet file, a row group each.

    Memory does not grow with the number of rows: what the metadata of the file say of
    all geometries is kept as running totals and written last.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        """Create the file."""
        self._types: set[str] = set()
        self._lower = np.full(2, np.inf)
        self._upper = np.full(2, -np.inf)
        self._file = pq.ParquetWriter(
            path,
            schema.remove_metadata(),
            compression='zstd',
            # Floats hardly repeat: a dictionary costs time and saves nothing.
            use_dictionary=['crs'],
        )

    def write(self, table: pa.Table) -> None:
        """Append a row group."""
        if table.num_rows == 0:
            return
        self._file.write_table(table, row_group_size=table.num_rows)
        footprints = gpd.GeoSeries(shapely.from_wkb(table['geometry'].to_numpy()))
        self._types.update(footprints.geom_type)
        bounds = footprints.total_bounds
        self._lower = np.minimum(self._lower, bounds[:2])
        self._upper = np.maximum(self._upper, bounds[2:])

    def close(self, provenance: dict[str, Any]) -> None:
        """Write the metadata and finish the file."""
        bounds = [*self._lower.tolist(), *self._upper.tolist()] if self._types else None
        geo = _geo_metadata(sorted(self._types), bounds)
        self._file.add_key_value_metadata(
            {'geo': json.dumps(geo), PROVENANCE_KEY: to_json(provenance)}
        )
        self._file.close()

    def abort(self) -> None:
        """Let go of the file, which is then of no use."""
        # Closing writes, and writing may be what has failed (a full disk).
        with suppress(OSError):
            self._file.close()


def _geo_metadata(types: list[str], bounds: list[float] | None) -> dict[str, Any]:
    """Metadata of the GeoParquet specification 1.1.0, key 'geo'."""
    column: dict[str, Any] = {
        'encoding': 'WKB',
        'geometry_types': types,
        'crs': pyproj.CRS('EPSG:4326').to_json_dict(),
        'edges': 'planar',
        'covering': {
            'bbox': {name: ['bbox', name] for name in ('xmin', 'ymin', 'xmax', 'ymax')}
        },
    }
    if bounds is not None:
        column['bbox'] = bounds
    return {
        'version': '1.1.0',
        'primary_column': 'geometry',
        'columns': {'geometry': column},
    }


def merge_parts(parts: Sequence[Path], path: Path, provenance: dict[str, Any]) -> None:
    """Join files of one schema into one, a row group at a time.

    Args:
        parts: Files of :class:`GeoParquetWriter`, at least one.
        path: File to write.
        provenance: What made the embeddings.
    """
    writer = GeoParquetWriter(path, pq.read_schema(parts[0]))
    for part in parts:
        with pq.ParquetFile(part) as file:
            for group in range(file.num_row_groups):
                writer.write(file.read_row_group(group))
    writer.close(provenance)


class GeoParquetFile:
    """Collects batches into row groups of one GeoParquet file, a part each process."""

    output: ClassVar[str] = 'pooled'
    folder_of: ClassVar[str | None] = None

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
        self.part = folder / f'part-{rank:05d}.parquet'
        self.chips = chips
        self.provenance = provenance
        self.dimensions = dimensions
        self._buffer: list[Predictions] = []
        self._buffered = 0
        self._writer: GeoParquetWriter | None = None

    def write(self, predictions: Predictions) -> None:
        """Keep a batch until there is enough for a row group."""
        self.dimensions = predictions.embedding.shape[1]
        self._buffer.append(predictions)
        self._buffered += predictions.embedding.nbytes
        if self._buffered >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self.chips is None or not self._buffer:
            return
        batch = Predictions.concatenate(self._buffer)
        rows = self.chips.rows(batch.chip)
        table = embedding_table(rows, batch.embedding, batch.valid_fraction)
        if self._writer is None:
            self._writer = GeoParquetWriter(self.part, table.schema)
        self._writer.write(table)
        self._buffer = []
        self._buffered = 0

    def close(self) -> None:
        """Finish this process' part; one that got no chips has none."""
        self._flush()
        if self._writer is not None:
            self._writer.close(self._provenance())
            self._writer = None

    def abort(self) -> None:
        """Let go of the part and of what was not written yet."""
        if self._writer is not None:
            self._writer.abort()

    def finish(self) -> Path:
        """Join the parts of all processes, and return the file."""
        parts = sorted(self.folder.glob('part-*.parquet'))
        if len(parts) == 1:
            return parts[0]
        path = self.folder / 'merged.parquet'
        if parts:
            merge_parts(parts, path, self._provenance())
        else:
            self._write_empty(path)
        return path

    def _write_empty(self, path: Path) -> None:
        none = np.empty(0, np.int64)
        points = self.chips is not None and 'point_id' in self.chips.rows(none)
        schema = embedding_schema(self.dimensions, points)
        GeoParquetWriter(path, schema).close(self._provenance())

    def _provenance(self) -> dict[str, Any]:
        return {**self.provenance, **describe_embeddings('chip', self.dimensions)}
