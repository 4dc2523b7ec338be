"""Feature maps that are on disk: staged ones, and those that an array holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely

from dynamicvis_geo.callbacks.mosaic import OPEN, Ints
from dynamicvis_geo.datasets.chip_table import CHIP
from dynamicvis_geo.errors import OutputError

#: Table of the chips that the arrays hold, beside them.
CHIPS_FILE = 'chips.parquet'
#: Folder, beside the arrays, of what is not in them yet.
STAGING = '.staging'

_SUFFIX = '.arrow'
_TIME = pa.timestamp('ns', tz='UTC')
_BBOX = pa.struct([(name, pa.float64()) for name in ('xmin', 'ymin', 'xmax', 'ymax')])

#: What is known of a chip beside its feature map.
CHIP_SCHEMA = pa.schema(
    [
        ('id', pa.string()),
        ('start', _TIME),
        ('end', _TIME),
        ('centre_lon', pa.float64()),
        ('centre_lat', pa.float64()),
        ('crs', pa.string()),
        *((name, pa.float64()) for name in ('minx', 'miny', 'maxx', 'maxy')),
        ('width', pa.int32()),
        ('height', pa.int32()),
        ('xres', pa.float64()),
        ('yres', pa.float64()),
        ('valid_fraction', pa.float32()),
        ('point_id', pa.string()),
        ('geometry', pa.binary()),
        ('bbox', _BBOX),
    ]
)


def staged_batch(
    rows: gpd.GeoDataFrame,
    maps: npt.NDArray[Any],
    valid_fraction: npt.NDArray[np.float32] | None,
) -> pa.RecordBatch:
    """Join rows of the chip table with their feature maps.

    Args:
        rows: Rows of the chip table, EPSG:4326.
        maps: float32 or float16 ``[B, D, h, w]``, in the order of *rows*.
        valid_fraction: float32 ``[B]``, or None if not known.
    """
    if valid_fraction is None:
        valid_fraction = np.full(len(rows), np.nan, np.float32)
    columns: dict[str, Any] = {
        'id': rows['chip_id'].astype(str),
        'valid_fraction': valid_fraction,
        'point_id': rows.get('point_id', [None] * len(rows)),
        'geometry': shapely.to_wkb(rows.geometry.to_numpy()),
        'bbox': pa.StructArray.from_arrays(
            list(shapely.bounds(rows.geometry.to_numpy()).T), fields=list(_BBOX)
        ),
        **{name: rows[name].dt.tz_localize('UTC') for name in ('start', 'end')},
    }
    arrays = [
        _array(columns.get(field.name, rows.get(field.name)), field)
        for field in CHIP_SCHEMA
    ]
    values = pa.array(np.ascontiguousarray(maps).reshape(-1))
    arrays.append(pa.FixedSizeListArray.from_arrays(values, maps[0].size))
    field = pa.field('map', arrays[-1].type)
    schema = CHIP_SCHEMA.append(field).with_metadata(
        {'shape': ','.join(str(length) for length in maps.shape[1:])}
    )
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _array(values: Any, field: pa.Field) -> pa.Array:
    if isinstance(values, pa.Array):
        return values
    return pa.array(values, field.type, from_pandas=True)


def write_staged(path: Path, batches: Sequence[pa.RecordBatch]) -> None:
    """Write batches of one schema as a file that appears whole and on disk.

    Args:
        path: File to write; its name ends in ``.arrow``.
        batches: Of :func:`staged_batch`, at least one.
    """
    temporary = path.with_suffix('.partial')
    try:
        with temporary.open('wb') as file:
            with pa.ipc.new_file(file, batches[0].schema) as out:
                for batch in batches:
                    out.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def staged_name(run: str, rank: int, number: int) -> str:
    """Return the name of a staged file."""
    return f'{run}-{rank:05d}-{number:06d}{_SUFFIX}'


def finished_ids(target: Path) -> pa.StringArray:
    """Return the ids of all chips on disk, each once."""
    parts = []
    if (target / CHIPS_FILE).exists():
        parts.append(_read_stored(target, ['id'])['id'])
    parts.extend(_read_staged(file, ['id'])['id'] for file in _staged_files(target))
    chunks = [chunk for part in parts for chunk in part.chunks]
    return pa.chunked_array(chunks, pa.string()).unique()


@dataclass(frozen=True)
class FinishedMaps:
    """Every chip that is on disk, once, and where its feature map is.

    Attributes:
        table: The chips, with the columns of :data:`CHIP_SCHEMA`.
        chips: The same as :data:`.chip_table.CHIP`; ``source`` is a row of *crs*.
        crs: Names of the CRSs of the chips, sorted.
        file: Row of *files* for each chip; -1 if an array holds it.
        row: Row in that file.
        files: The staged files.
        shapes: ``(D, h, w)`` of the feature maps in each file.
    """

    table: pa.Table
    chips: npt.NDArray[np.void]
    crs: list[str]
    file: Ints
    row: Ints
    files: list[Path]
    shapes: list[tuple[int, int, int]]

    @classmethod
    def of(cls, target: Path) -> FinishedMaps:
        """Look what is there.

        Raises:
            OutputError: If a file cannot be read.
        """
        parts = [CHIP_SCHEMA.empty_table()]
        if (target / CHIPS_FILE).exists():
            parts[0] = _read_stored(target)
        files = _staged_files(target)
        parts.extend(_read_staged(file, CHIP_SCHEMA.names) for file in files)
        table = pa.concat_tables(parts)
        counts = [part.num_rows for part in parts]
        file = np.repeat(np.arange(-1, len(files)), counts)
        row = np.arange(len(file)) - np.repeat(np.cumsum(counts) - counts, counts)
        # What an array holds comes first, so that nothing is done twice.
        once = ~pd.Series(table['id'].to_pandas()).duplicated().to_numpy()
        table = table.filter(pa.array(once))
        names = sorted(pc.unique(table['crs']).to_pylist())
        return cls(
            table=table,
            chips=_as_chips(table, names),
            crs=names,
            file=file[once],
            row=row[once],
            files=files,
            shapes=[_shape(path) for path in files],
        )

    def of_crs(self, crs: str) -> npt.NDArray[np.void]:
        """Return the chips of one CRS."""
        source = self.crs.index(crs) if crs in self.crs else -1
        chips: npt.NDArray[np.void] = self.chips[self.chips['source'] == source]
        return chips


class StagedMaps:
    """Feature maps of staged files, mapped into memory while they are needed."""

    def __init__(self, finished: FinishedMaps) -> None:
        """Open nothing yet."""
        self._finished = finished
        self._open: dict[int, list[npt.NDArray[Any]]] = {}

    def get(self, chip: int) -> npt.NDArray[Any]:
        """Return the feature map of a chip, ``[D, h, w]``.

        Args:
            chip: Row in the table of finished chips; must be staged.
        """
        file, row = int(self._finished.file[chip]), int(self._finished.row[chip])
        if file not in self._open:
            self._open[file] = self._map(file)
        for maps in self._open[file]:
            if row < len(maps):
                found: npt.NDArray[Any] = maps[row]
                return found
            row -= len(maps)
        raise IndexError(f'row {row} beyond the end of {self._finished.files[file]}')

    def close(self) -> None:
        """Let go of all files."""
        self._open.clear()

    def _map(self, file: int) -> list[npt.NDArray[Any]]:
        source = pa.memory_map(str(self._finished.files[file]))
        reader = pa.ipc.open_file(source)
        return [
            batch['map'].flatten().to_numpy().reshape(-1, *self._finished.shapes[file])
            for batch in map(reader.get_batch, range(reader.num_record_batches))
        ]


def _staged_files(target: Path) -> list[Path]:
    return sorted((target / STAGING).glob(f'*{_SUFFIX}'))


def _read_stored(target: Path, columns: list[str] | None = None) -> pa.Table:
    path = target / CHIPS_FILE
    try:
        table = pq.read_table(path, columns=columns)
        if columns is not None:
            return table
        if 'point_id' not in table.column_names:
            table = table.append_column('point_id', pa.nulls(len(table), pa.string()))
        return table.select(CHIP_SCHEMA.names).cast(CHIP_SCHEMA)
    except (KeyError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _read_staged(path: Path, columns: list[str]) -> pa.Table:
    try:
        schema = pa.ipc.open_file(path).schema
        wanted = [schema.get_field_index(name) for name in columns]
        options = pa.ipc.IpcReadOptions(included_fields=wanted)
        table = pa.ipc.open_file(path, options=options).read_all()
    except pa.ArrowException as error:
        raise _unreadable(path, error) from error
    # Arrow keeps room for the whole batch, feature maps included, as long as any of its
    # columns is in use: copy them.
    copied = table.take(pa.array(np.arange(table.num_rows)))
    return copied.replace_schema_metadata(None)


def _shape(path: Path) -> tuple[int, int, int]:
    text = pa.ipc.open_file(path).schema.metadata[b'shape'].decode()
    dimensions, height, width = (int(length) for length in text.split(','))
    return dimensions, height, width


def _unreadable(path: Path, error: Exception) -> OutputError:
    return OutputError(
        f"cannot read '{path}': {error}; it was not written by dynamicvis_geo, or is "
        'damaged: choose another output, or remove it to compute its chips again'
    )


def _as_chips(table: pa.Table, crs: list[str]) -> npt.NDArray[np.void]:
    chips = np.empty(table.num_rows, CHIP)
    chips['x'], chips['y'] = table['minx'].to_numpy(), table['maxy'].to_numpy()
    for name in ('width', 'height', 'xres', 'yres'):
        chips[name] = table[name].to_numpy()
    for name in ('start', 'end'):
        chips[name] = pc.fill_null(table[name].cast(pa.int64()), OPEN).to_numpy()
    codes = pc.index_in(table['crs'], pa.array(crs, pa.string()))
    chips['source'] = codes.to_numpy()
    return chips
