"""Chips of any datasets, frozen into one dataset with integer indices."""

from __future__ import annotations

import itertools
import operator
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from pyproj import CRS
from torch.utils.data import Dataset
from torchgeo.datasets import GeoDataset

from dynamicvis_geo.chip_keys import chip_keys
from dynamicvis_geo.datasets._torchgeo import forget_file_handles
from dynamicvis_geo.datasets.chip_ids import chip_ids, crs_name
from dynamicvis_geo.datasets.chip_order import (
    Strides,
    along_curve,
    hilbert_order,
    reorder,
    slabs,
)
from dynamicvis_geo.datasets.chip_table import (
    CHIP,
    GeoSlice,
    bounds_of,
    freeze,
    join_tables,
    queries,
)
from dynamicvis_geo.datasets.doubles import refuse_double
from dynamicvis_geo.datasets.failures import (
    ChipFailure,
    OnError,
    check_on_error,
)
from dynamicvis_geo.datasets.footprints import footprints, to_lonlat
from dynamicvis_geo.datasets.read_ahead import Begun, begin, chips_ahead
from dynamicvis_geo.datasets.retries import RetryCount
from dynamicvis_geo.datasets.sources import describe
from dynamicvis_geo.earthengine.fetch import Survey
from dynamicvis_geo.errors import SpecError

Sample = dict[str, Any]
#: What there is for a chip.
Found = Sample | ChipFailure
Order = Literal['sampler', 'hilbert']

_WGS84 = CRS.from_epsg(4326)
#: Ids that are compared at a time.
MANY = 200_000


class ChipDataset(Dataset[Found]):
    """The chips that samplers choose from datasets, as one map-style dataset.

    Freezing them gives every chip a number, so that several CRSs in one run, resuming,
    :class:`~torch.utils.data.Subset`, shuffling and distributed sharding are what they
    are for any PyTorch dataset. A sample is the sample of the source dataset and
    ``chip``, int64 ``[1]``: the row of the chip in :attr:`chips`.

    The table takes 61 bytes a chip (and the ids of points), in memory that DataLoader
    workers share, however they are started.
    """

    def __init__(
        self,
        pairs: Iterable[tuple[GeoDataset, Iterable[Any]]],
        skip: Iterable[str] = (),
        *,
        order: Order = 'sampler',
        on_error: OnError = 'raise',
    ) -> None:
        """Go through the samplers once and keep what they yield.

        Args:
            pairs: Datasets, each with a sampler that yields slices ``(x, y)`` or
                ``(x, y, t)``: those of this package, of TorchGeo, or a list. Batch
                samplers are refused.
            skip: Ids of chips to leave out for good: they get no row.
            order: How the rows follow each other: ``'sampler'``, pair by pair as the
                samplers yield them; or ``'hilbert'``, which keeps neighbours together:
                pair by pair, time window by time window, along a Hilbert curve. A batch
                of successive rows is then compact, and shares requests and cached
                files.
            on_error: Whether an error that concerns one chip, such as an image that
                cannot be read, is raised (``'raise'``) or becomes a
                :class:`~dynamicvis_geo.datasets.ChipFailure` in place of the sample
                (``'skip'``). Errors that concern the whole run are always raised.

        Raises:
            SpecError: If an argument has a value that cannot be used, or two datasets
                have the same chip.
        """
        if order not in get_args(Order):
            choices = ', '.join(get_args(Order))
            raise SpecError(f'order={order!r} is unknown: choose one of {choices}')
        check_on_error(on_error)
        self.on_error: OnError = on_error
        done = _ids_array('skip', skip)
        pairs = [_checked_pair(pair) for pair in pairs]
        self.datasets = [dataset for dataset, _ in pairs]
        self._crs = [CRS.from_user_input(dataset.crs) for dataset in self.datasets]
        tables = [freeze(i, *pair) for i, pair in enumerate(pairs)]
        self._point_ids = _gather_point_ids(pairs, tables)
        table = join_tables(tables)
        refuse_double(table, self._crs, self.datasets)
        self._sources = [describe(*pair) for pair in pairs]
        if order == 'hilbert':
            rows = hilbert_order(table, along_curve(table, self.strides))
            reorder(table, rows)
            if self._point_ids is not None:
                self._point_ids = self._point_ids.take(pa.array(rows))
        self._process = os.getpid()
        self._retries = RetryCount()
        # A tensor, because PyTorch moves tensors to shared memory where it pickles a
        # dataset for its workers; NumPy arrays would be copied to each.
        self._bytes = torch.from_numpy(table.view(np.uint8))
        if len(done):
            self._keep(~self.among(done))

    def __len__(self) -> int:
        """Return the number of chips."""
        return len(self._table)

    def __getitem__(self, index: int) -> Found:
        """Return one chip.

        Args:
            index: Row of the chip; negative ones count from the end.

        Returns:
            The sample of the source dataset, and ``chip``; a
            :class:`~dynamicvis_geo.datasets.ChipFailure` if it cannot be had and is to
            be skipped, or its dataset gives None.

        Raises:
            IndexError: If there is no such row.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Found]:
        """Return a batch of chips, in the order asked for.

        Each source dataset is asked once, through its own ``begin`` or ``__getitems__``
        where it has one, which lets it fetch concurrently.

        Args:
            indices: Rows of the chips.

        Raises:
            IndexError: If there is no such row.
        """
        cancelled = threading.Event()
        try:
            return self.begin(indices, cancelled)()
        finally:
            cancelled.set()

    def begin(
        self, indices: Sequence[int] | NDArray[np.int64], cancelled: threading.Event
    ) -> Callable[[], list[Found]]:
        """Begin a batch in the background, in datasets that can do so.

        Those are datasets with ``begin``, as Earth Engine's; all else waits for the
        call of the function that is returned.

        Args:
            indices: Rows of the chips.
            cancelled: Gives up when set.

        Returns:
            A function that gives or raises what ``__getitems__`` would.

        Raises:
            IndexError: If there is no such row.
        """
        if os.getpid() != self._process:
            forget_file_handles()
            self._process = os.getpid()
        rows = self._rows(indices)
        parts = [
            (positions, begin(dataset, wanted, self.on_error, cancelled))
            for positions, dataset, wanted in self._parts(rows)
        ]
        return lambda: self._finish(rows, parts)

    def chips_ahead(self, row: int) -> int:
        """How many chips to have begun besides a batch, to keep requests in flight.

        Args:
            row: A chip of the batch.
        """
        chip = self._table[row]
        return chips_ahead(self.datasets, int(chip['width']) * int(chip['height']))

    def survey(self, rows: Sequence[int] | NDArray[np.int64]) -> Survey:
        """Count what fetching a batch of chips from Earth Engine would take.

        Nothing is fetched. Datasets within others (``&``, ``|``) are not asked.

        Args:
            rows: Rows of the chips.

        Raises:
            IndexError: If there is no such row.
        """
        surveys = [
            dataset.survey(wanted)
            for _, dataset, wanted in self._parts(self._rows(rows))
            if hasattr(dataset, 'survey')
        ]
        return Survey.total(surveys)

    @property
    def retries(self) -> int:
        """Requests repeated so far, by this process and its DataLoader workers.

        A worker reports after each batch.
        """
        return self._retries.total(self.datasets)

    def count_retries_anew(self) -> None:
        """Begin a count of this process and of the workers that it will start.

        Processes that were sent one dataset would share a count.
        """
        self._retries = RetryCount()

    def among(
        self, keys: pa.StringArray | pa.ChunkedArray | Iterable[str]
    ) -> NDArray[np.bool_]:
        """Say which chips have one of some keys.

        Args:
            keys: Ids of chips, or ids and points
                (:func:`~dynamicvis_geo.chip_keys.chip_keys`) where several points have
                the same chip. Those of other chips do no harm.

        Returns:
            bool ``[chips]``.

        Raises:
            SpecError: If *keys* is one string, or not all are strings.
        """
        names = _ids_array('keys', keys)
        found = np.zeros(len(self), dtype=bool)
        if not len(names):
            return found
        # Both sides are taken in parts: the set that PyArrow makes of many names takes
        # several times their memory.
        for rows in slabs(np.arange(len(self)), MANY):
            ids = pa.array(self._ids(self._table[rows]), pa.string())
            known = [ids]
            if self._point_ids is not None:
                known.append(chip_keys(ids, self._point_ids.take(pa.array(rows))))
            for start, some in itertools.product(range(0, len(names), MANY), known):
                among = pc.is_in(some, value_set=names.slice(start, MANY))
                found[rows] |= among.to_numpy(zero_copy_only=False)
        return found

    @property
    def chips(self) -> gpd.GeoDataFrame:
        """All chips, one row each: see :meth:`rows`."""
        return self.rows(np.arange(len(self)))

    def rows(self, indices: Sequence[int] | NDArray[np.int64]) -> gpd.GeoDataFrame:
        """Return some chips as a table.

        Args:
            indices: Rows of the chips.

        Returns:
            A GeoDataFrame in EPSG:4326 whose index is the row numbers. Columns:
            ``chip_id``; ``crs`` (authority and code, or WKT); ``minx``, ``miny``,
            ``maxx``, ``maxy`` in that CRS; ``width`` and ``height`` in pixels; ``xres``
            and ``yres`` in CRS units; ``start`` and ``end`` of the time window, NaT
            where the data are valid at all times; ``centre_lon``, ``centre_lat``;
            ``point_id`` if a sampler gave one; and the footprint as ``geometry``.

        Raises:
            IndexError: If there is no such row.
        """
        rows = self._rows(indices)
        chips = self._table[rows]
        bounds = bounds_of(chips)
        shape = np.stack([chips['height'], chips['width']], axis=1).astype(np.int64)
        crs = np.array([crs_name(crs) for crs in self._crs], dtype=object)
        centre = np.full((len(rows), 2), np.nan)
        outlines = np.empty(len(rows), dtype=object)
        for source in np.unique(chips['source']):
            at = chips['source'] == source
            middle = (bounds[at, :2] + bounds[at, 2:]) / 2
            centre[at] = np.stack(to_lonlat(self._crs[source], *middle.T), axis=1)
            outlines[at] = footprints(self._crs[source], bounds[at], shape[at])
        columns: dict[str, Any] = {
            'chip_id': np.array(self._ids(chips), dtype=object),
            'crs': crs[chips['source']] if len(rows) else crs[:0],
            **dict(zip(('minx', 'miny', 'maxx', 'maxy'), bounds.T, strict=True)),
            **{name: chips[name] for name in ('width', 'height', 'xres', 'yres')},
            'start': _timestamps(chips['start'], pd.Timestamp.min),
            'end': _timestamps(chips['end'], pd.Timestamp.max),
            'centre_lon': centre[:, 0],
            'centre_lat': centre[:, 1],
        }
        if self._point_ids is not None:
            columns['point_id'] = self._point_ids.take(pa.array(rows)).to_pylist()
        columns['geometry'] = gpd.array.from_shapely(outlines, crs=_WGS84)
        return gpd.GeoDataFrame(columns, index=pd.Index(rows, name='chip'))

    @property
    def table(self) -> NDArray[np.void]:
        """All chips as plain numbers, type :data:`.chip_table.CHIP`; do not change it.

        Unlike :attr:`chips` it costs nothing; ``source`` counts :attr:`source_crs`.
        """
        return self._table

    @property
    def source_crs(self) -> list[CRS]:
        """CRS of each pair of dataset and sampler."""
        return list(self._crs)

    @property
    def strides(self) -> Strides:
        """Pixels from chip to chip, (down, across), of each pair; None without a grid.

        That is what a sampler says of itself, as :class:`.GridSampler` does.
        """
        strides = [source['sampler'].get('stride') for source in self._sources]
        return [None if stride is None else tuple(stride) for stride in strides]

    @property
    def point_ids(self) -> pa.StringArray | None:
        """Point of each chip, null for none; None if no sampler has points."""
        return self._point_ids

    @property
    def provenance(self) -> dict[str, Any]:
        """What the chips are cut from and how, as plain values for JSON."""
        return {'chips': len(self), 'sources': self._sources}

    @property
    def _table(self) -> NDArray[np.void]:
        # A view kept for long would miss the move to shared memory.
        table: NDArray[np.void] = self._bytes.numpy().view(CHIP)
        return table

    def _finish(
        self,
        rows: NDArray[np.int64],
        parts: Sequence[tuple[list[int], Begun]],
    ) -> list[Found]:
        found: dict[int, Found] = {}
        try:
            for positions, finish in parts:
                for i, one in zip(positions, finish(), strict=True):
                    found[i] = _of_chip(int(rows[i]), one)
        finally:
            self._retries.report(self.datasets)
        return [found[i] for i in range(len(rows))]

    def _parts(
        self, rows: NDArray[np.int64]
    ) -> Iterator[tuple[list[int], GeoDataset, list[GeoSlice]]]:
        """Divide a batch by source: positions, dataset, queries."""
        chips = self._table[rows]
        for source in np.unique(chips['source']):
            positions = np.flatnonzero(chips['source'] == source)
            wanted = list(queries(chips[positions]))
            yield positions.tolist(), self.datasets[source], wanted

    def _keep(self, keep: NDArray[np.bool_]) -> None:
        self._bytes = torch.from_numpy(self._table[keep].view(np.uint8))
        if self._point_ids is not None:
            self._point_ids = self._point_ids.filter(pa.array(keep))

    def _rows(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        rows = np.array([operator.index(index) for index in indices], dtype=np.int64)
        length = len(self)
        wrong = (rows < -length) | (rows >= length)
        if wrong.any():
            raise IndexError(f'chip {rows[wrong][0]} of {length} chips')
        return np.where(rows < 0, rows + length, rows)

    def _ids(self, chips: NDArray[np.void]) -> list[str]:
        ids = np.empty(len(chips), dtype=object)
        for source in np.unique(chips['source']):
            at = chips['source'] == source
            ids[at] = chip_ids(self._crs[source], chips[at])
        names: list[str] = ids.tolist()
        return names


def _ids_array(name: str, ids: Any) -> pa.StringArray | pa.ChunkedArray:
    if isinstance(ids, str):
        raise SpecError(f'{name}={ids!r} must be a set of chip ids, not one string')
    try:
        if isinstance(ids, pa.Array | pa.ChunkedArray):
            return ids.cast(pa.string())
        return pa.array(ids, pa.string())
    except (pa.ArrowException, TypeError) as error:
        raise SpecError(
            f'{name} must be chip ids, which are strings: {error}'
        ) from error


def _checked_pair(pair: Any) -> tuple[GeoDataset, Iterable[Any]]:
    if not (
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and isinstance(pair[0], GeoDataset)
        and isinstance(pair[1], Iterable)
    ):
        raise SpecError(
            f'pairs: {pair!r} must be a pair (dataset, sampler) of a TorchGeo '
            'GeoDataset and a sampler of it'
        )
    return pair[0], pair[1]


def _gather_point_ids(
    pairs: Sequence[tuple[GeoDataset, Iterable[Any]]],
    tables: Sequence[NDArray[np.void]],
) -> pa.StringArray | None:
    """Return the point of every chip; None if no sampler has points."""
    parts: list[pa.StringArray] = []
    for (_, sampler), table in zip(pairs, tables, strict=True):
        ids = getattr(sampler, 'point_ids', None)
        if ids is not None and len(ids) != len(table):
            raise SpecError(
                f'pairs: sampler {type(sampler).__name__} yields {len(table)} chips '
                f'but has {len(ids)} point_ids'
            )
        parts.append(
            pa.nulls(len(table), pa.string())
            if ids is None
            else pa.array(ids, pa.string())
        )
    if not any(hasattr(sampler, 'point_ids') for _, sampler in pairs):
        return None
    return pa.concat_arrays(parts)


def _of_chip(row: int, found: Sample | Exception | None) -> Found:
    if isinstance(found, Exception):
        return ChipFailure.of(row, found)
    if found is None:
        return ChipFailure(
            row, 'NoSampleError', 'its dataset gives None, and no reason'
        )
    return {**found, 'chip': torch.tensor([row])}


def _timestamps(values: NDArray[np.int64], never: pd.Timestamp) -> pd.DatetimeIndex:
    """Return nanoseconds as timestamps, NaT where TorchGeo means no limit."""
    stamps = values.view('datetime64[ns]')
    none = np.datetime64('NaT', 'ns')
    return pd.DatetimeIndex(np.where(values == never.value, none, stamps))
