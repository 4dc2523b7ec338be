"""Chips and their embeddings as Arrow tables: their columns and keys."""

from collections.abc import Mapping, Sequence
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import shapely

from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.time_window import FIRST

#: Types in which embeddings can be stored.
DTYPES = ('float32', 'float16', 'int8')

_ARROW_TYPES = {
    'float32': pa.float32(),
    'float16': pa.float16(),
    'int8': pa.int8(),
}
_TIME = pa.timestamp('us', tz='UTC')
_BBOX = pa.struct([(name, pa.float64()) for name in ('xmin', 'ymin', 'xmax', 'ymax')])
#: Columns of the extents of chips, a row each CRS.
_ZONE = pa.schema(
    [
        ('crs', pa.string()),
        *((name, pa.float64()) for name in ('minx', 'miny', 'maxx', 'maxy')),
        ('start', _TIME),
        ('end', _TIME),
    ]
)
#: What stands in columns of dates that must have one, where there is no limit.
_UNDATED = FIRST.ceil('s').tz_localize('UTC')


def embedding_schema(
    dimensions: int | None, points: bool, dtype: str = 'float32'
) -> pa.Schema:
    """Schema of a file of pooled embeddings.

    Args:
        dimensions: Length of an embedding; None (an empty file of an unknown model)
            gives lists of any length.
        points: Whether the chips have points.
        dtype: One of :data:`DTYPES`.

    Returns:
        The schema, without metadata.
    """
    # A list of -1 is one of any length.
    embedding = pa.list_(_ARROW_TYPES[dtype], -1 if dimensions is None else dimensions)
    fields = [
        ('id', pa.string()),
        ('embedding', embedding),
        *([('scale', pa.float32())] if dtype == 'int8' else []),
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


def chip_schema(points: bool) -> pa.Schema:
    """Schema of a table of the chips of feature maps, which has no embeddings.

    Args:
        points: Whether the chips have points.
    """
    fields = [
        ('id', pa.string()),
        *((name, pa.timestamp('ns', tz='UTC')) for name in ('start', 'end')),
        ('centre_lon', pa.float64()),
        ('centre_lat', pa.float64()),
        ('crs', pa.string()),
        *((name, pa.float64()) for name in ('minx', 'miny', 'maxx', 'maxy')),
        ('width', pa.int32()),
        ('height', pa.int32()),
        ('xres', pa.float64()),
        ('yres', pa.float64()),
        ('valid_fraction', pa.float32()),
        *([('point_id', pa.string())] if points else []),
        ('geometry', pa.binary()),
        ('bbox', _BBOX),
    ]
    return pa.schema(fields)


def chip_rows(
    rows: gpd.GeoDataFrame, valid_fraction: npt.NDArray[np.float32]
) -> pa.Table:
    """Return rows of the chip table in the columns of :func:`chip_schema`.

    Args:
        rows: Rows of the chip table, EPSG:4326.
        valid_fraction: float32 ``[N]``; NaN is written as null.
    """
    return _table(rows, chip_schema('point_id' in rows), valid_fraction, {})


def _table(
    rows: gpd.GeoDataFrame,
    schema: pa.Schema,
    valid_fraction: npt.NDArray[np.float32],
    columns: Mapping[str, Any],
) -> pa.Table:
    outlines = rows.geometry.to_numpy()
    known: dict[str, Any] = {
        'id': rows['chip_id'].astype(str),
        **{name: _utc(rows[name]) for name in ('start', 'end')},
        'valid_fraction': pa.array(valid_fraction, pa.float32(), from_pandas=True),
        'geometry': shapely.to_wkb(outlines),
        'bbox': pa.StructArray.from_arrays(
            list(shapely.bounds(outlines).T), fields=list(_BBOX)
        ),
        **columns,
    }
    arrays = [
        _array(known.get(field.name, rows.get(field.name)), field.type)
        for field in schema
    ]
    return pa.table(arrays, schema=schema)


def embedding_table(
    rows: gpd.GeoDataFrame,
    embedding: npt.NDArray[np.float32],
    valid_fraction: npt.NDArray[np.float32] | None = None,
    dtype: str = 'float32',
) -> pa.Table:
    """Join rows of the chip table with their embeddings.

    Args:
        rows: Rows of the chip table, EPSG:4326.
        embedding: float32 ``[N, D]``, in the order of `rows`.
        valid_fraction: float32 ``[N]``, or None if not known; NaN is written as null.
        dtype: One of :data:`DTYPES`.

    Returns:
        A table with the columns of :func:`embedding_schema`.

    Raises:
        OutputError: If `dtype` cannot hold an embedding.
    """
    count, dimensions = embedding.shape
    nominal = _utc(rows['start']).fillna(_UNDATED)
    if valid_fraction is None:
        valid_fraction = np.full(count, np.nan, np.float32)
    stored, scale = _quantize(embedding, dtype)
    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(stored.reshape(-1), _ARROW_TYPES[dtype]), dimensions
    )
    columns = {
        'embedding': vectors,
        'scale': scale,
        'datetime': nominal,
        'timestamp': nominal,
    }
    schema = embedding_schema(dimensions, 'point_id' in rows, dtype)
    return _table(rows, schema, valid_fraction, columns)


def _quantize(
    embedding: npt.NDArray[np.float32], dtype: str
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32] | None]:
    """Return embeddings in the type that is stored, and their scale if that has one."""
    if dtype == 'float32':
        return embedding, None
    if dtype == 'float16':
        with np.errstate(over='ignore'):
            half = embedding.astype(np.float16)
        if (np.isinf(half) & np.isfinite(embedding)).any():
            raise OutputError(
                f"dtype='float16' cannot hold features of {np.abs(embedding).max():g}: "
                "use 'float32' or 'int8'"
            )
        return half, None
    if not np.isfinite(embedding).all():
        raise OutputError(
            "dtype='int8' cannot hold features that are not finite: use 'float32'"
        )
    scale = np.abs(embedding).max(axis=1) / np.float32(127)
    # A row of zeros has scale 0, and is 0 whatever it is divided by.
    divisor = np.where(scale > 0, scale, 1)[:, None]
    return np.round(embedding / divisor).astype(np.int8), scale.astype(np.float32)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.Array):
        return values
    return pa.array(values, kind, from_pandas=True)


def _utc(times: pd.Series) -> pd.Series:
    times = pd.to_datetime(times)
    if times.dt.tz is None:
        return times.dt.tz_localize('UTC')
    return times.dt.tz_convert('UTC')


def common_schema(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Pick the schema with the most columns: not all chips have points.

    Args:
        schemas: Of the tables that are joined, at least one.

    Raises:
        OutputError: If they have embeddings of different lengths.
    """
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


def fit(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Give a table the columns of a schema, null where it lacks one.

    Args:
        table: The table.
        schema: With all columns of the table.
    """
    if table.schema.equals(schema):
        return table
    columns = [
        table[field.name]
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, names=schema.names).cast(schema)


def chip_keys(
    ids: Sequence[str] | pa.StringArray, points: Sequence[str | None] | pa.Array | None
) -> pa.StringArray:
    """Keys of chips, by which finished ones are told from those that are missing.

    Args:
        ids: Ids of chips.
        points: Ids of the points that they surround, null for none; None if no chip has
            a point. Two points may lie in the middle of the same chip.

    Returns:
        The id of the chip, and behind an ``@`` that of its point where it has one.
    """
    ids = pa.array(ids, pa.string())
    if points is None:
        return ids
    points = pa.array(points, pa.string())
    joined = pc.binary_join_element_wise(ids, points, '@')
    return pc.coalesce(joined, ids)


def join_keys(arrays: Sequence[pa.StringArray]) -> pa.StringArray:
    """Join keys, each once.

    Args:
        arrays: Some keys each.
    """
    return pa.chunked_array(arrays, pa.string()).unique()


def zone_extents(*tables: pa.Table) -> pa.Table:
    """Bound the chips of each CRS in space and time.

    Args:
        *tables: With columns ``crs``, ``minx`` to ``maxy``, ``start`` and ``end``, such
            as those that this returns.

    Returns:
        These columns, a row each CRS, in the order of their names; times are null where
        no chip has one.
    """
    extents = [
        one.select(_ZONE.names).replace_schema_metadata().cast(_ZONE) for one in tables
    ]
    joined = pa.concat_tables([_ZONE.empty_table(), *extents])
    edges = [('minx', 'min'), ('miny', 'min'), ('maxx', 'max'), ('maxy', 'max')]
    edges += [('start', 'min'), ('end', 'max')]
    grouped = joined.group_by('crs', use_threads=False).aggregate(edges)
    columns = [grouped['crs'], *(grouped[f'{name}_{how}'] for name, how in edges)]
    return pa.table(columns, schema=_ZONE).sort_by('crs')


def row_keys(table: pa.Table) -> pa.StringArray:
    """Return the key of each row of a table with ``id`` and perhaps ``point_id``.

    Args:
        table: The table.
    """
    if not table.num_columns:
        return pa.array([], pa.string())
    points = None
    if 'point_id' in table.column_names:
        points = table['point_id'].combine_chunks()
    return chip_keys(table['id'].combine_chunks(), points)
