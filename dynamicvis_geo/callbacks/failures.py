"""Chips whose image could not be had, listed beside the output."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import geopandas as gpd
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from dynamicvis_geo.callbacks.geoparquet import read_keys
from dynamicvis_geo.callbacks.predictions import ChipTable, Failure
from dynamicvis_geo.callbacks.run_folder import run_folder_of, whole_file
from dynamicvis_geo.chip_keys import chip_keys, join_keys

_COLUMNS = ['id', 'point_id', 'reason', 'message', 'datetime', 'start', 'end', 'crs']


def failures_file_of(target: Path) -> Path:
    """Return the file that lists the failures of an output."""
    name = target.name.removesuffix('.parquet').removesuffix('.zarr')
    return target.with_name(f'{name}.failures.parquet')


class FailureLog:
    """Keeps the failures of one process, a part at each flush.

    Columns of the list: ``id`` of the chip, ``point_id`` if it has one, ``reason`` (the
    name of the error), ``message``, ``datetime`` (when it failed, UTC), ``start`` and
    ``end`` of the time window, ``crs``, and the footprint as ``geometry``.
    """

    def __init__(self, target: Path, run: str, rank: int) -> None:
        """Name the parts."""
        self._folder = run_folder_of(target)
        self._name = f'failures-{run}-{rank:05d}'
        self._held: list[Failure] = []
        self._count = 0

    def add(self, failures: tuple[Failure, ...]) -> None:
        """Take the failures of a batch."""
        self._held += failures

    def flush(self, chips: ChipTable | None) -> None:
        """Put what was taken on disk."""
        if not self._held or chips is None:
            return
        rows = chips.rows([failure[0] for failure in self._held])
        rows = rows.rename(columns={'chip_id': 'id'}).reset_index(drop=True)
        rows['reason'] = [failure[1] for failure in self._held]
        rows['message'] = [failure[2] for failure in self._held]
        rows['datetime'] = pd.Timestamp(datetime.now(UTC))
        columns = [name for name in _COLUMNS if name in rows]
        _write(rows[[*columns, 'geometry']], self._folder / f'{self._next()}.parquet')
        self._held = []

    def _next(self) -> str:
        self._count += 1
        return f'{self._name}-{self._count:06d}'


def failed_keys(target: Path) -> pa.StringArray:
    """Return the keys of all chips that have failed and are listed."""
    return join_keys([read_keys(path) for path in _parts(target)])


def merge_failures(target: Path, finished: Callable[[], pa.StringArray]) -> int:
    """Bring the list of failures up to date.

    Args:
        target: The output.
        finished: Gives the keys of all chips that are finished and have failed no
            more; called if there are failures.

    Returns:
        Number of chips that are listed; without any there is no file.
    """
    file = failures_file_of(target)
    parts = _parts(target)
    if not parts:
        return 0
    done_keys = finished()
    frames = [gpd.read_parquet(part) for part in parts]
    frame = gpd.GeoDataFrame(pd.concat(frames, ignore_index=True), crs='EPSG:4326')
    points = frame.get('point_id')
    keys = chip_keys(frame['id'].tolist(), None if points is None else list(points))
    # Outputs with one file a chip know nothing of points.
    done = pc.or_(
        pc.is_in(keys, done_keys), pc.is_in(pa.array(frame['id']), done_keys)
    ).to_numpy(zero_copy_only=False)
    frame = frame[~done].assign(key=keys.filter(pa.array(~done)).to_pylist())
    # The latest failure of a chip tells why.
    frame = frame.drop_duplicates('key', keep='last').drop(columns='key')
    if frame.empty:
        file.unlink(missing_ok=True)
    else:
        _write(frame.sort_values('id', ignore_index=True), file)
    return len(frame)


def _parts(target: Path) -> list[Path]:
    file = failures_file_of(target)
    parts = sorted(run_folder_of(target).glob('failures-*.parquet'))
    return [*([file] if file.exists() else []), *parts]


def _write(frame: gpd.GeoDataFrame, path: Path) -> None:
    with whole_file(path) as temporary:
        frame.to_parquet(temporary, index=False, write_covering_bbox=True)
