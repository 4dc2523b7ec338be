"""Chips of any datasets, frozen into one dataset with integer indices."""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import geopandas as gpd
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pyproj import CRS
from torch.utils.data import Dataset
from torchgeo.datasets import GeoDataset

from dynamicvis_geo.datasets._torchgeo import forget_file_handles
from dynamicvis_geo.datasets.chip_order import Strides
from dynamicvis_geo.datasets.chip_table import ChipTable
from dynamicvis_geo.datasets.read_ahead import chips_ahead
from dynamicvis_geo.datasets.source import (
    ChipFailure,
    Found,
    GeoSlice,
    OnError,
    Pending,
    Source,
    Survey,
    as_source,
    check_on_error,
    describe,
)
from dynamicvis_geo.errors import SpecError

Order = Literal['sampler', 'hilbert']

#: Processes that count their retries apart.
RETRY_SLOTS = 256


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
        pairs = [_checked_pair(pair) for pair in pairs]
        self.datasets = [dataset for dataset, _ in pairs]
        chips = ChipTable.join([ChipTable.of_sampler(*pair) for pair in pairs])
        chips.refuse_doubles(self.datasets)
        self._described = [describe(*pair) for pair in pairs]
        # A dataset may occur several times.
        sources = {id(dataset): as_source(dataset) for dataset in self.datasets}
        self._sources = [sources[id(dataset)] for dataset in self.datasets]
        if order == 'hilbert':
            chips.order_along_curve()
        done = chips.among(skip, 'skip')
        self._chips = chips.select(~done) if done.any() else chips
        self._process = os.getpid()
        self.count_retries_anew()

    def __repr__(self) -> str:
        """Count the chips, and name what they are cut from."""
        kinds = dict.fromkeys(type(dataset).__name__ for dataset in self.datasets)
        return f'<ChipDataset: {len(self):,} chips of {", ".join(kinds)}>'

    def __len__(self) -> int:
        """Return the number of chips."""
        return len(self._chips)

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

        Each source dataset is asked once, so that a
        :class:`~dynamicvis_geo.datasets.source.Source` fetches concurrently.

        Args:
            indices: Rows of the chips.

        Raises:
            IndexError: If there is no such row.
        """
        cancelled = threading.Event()
        try:
            return self.submit(indices, cancelled)()
        finally:
            cancelled.set()

    def submit(
        self, indices: Sequence[int] | NDArray[np.int64], cancelled: threading.Event
    ) -> Pending:
        """Start a batch in the background, where a source can do so.

        The others are read when the batch is waited for.

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
            (positions, source.submit(wanted, self.on_error, cancelled))
            for positions, source, wanted in self._parts(rows)
        ]
        return lambda: self._finish(rows, parts)

    def chips_ahead(self, row: int) -> int:
        """Count the chips to submit besides a batch, to keep requests in flight.

        Args:
            row: A chip of the batch.
        """
        chip = self.table[row]
        concurrency = max(source.concurrency for source in self._sources)
        return chips_ahead(concurrency, int(chip['width']) * int(chip['height']))

    def survey(self, rows: Sequence[int] | NDArray[np.int64]) -> Survey:
        """Count the requests that fetching a batch of chips takes; none is made.

        Args:
            rows: Rows of the chips.

        Raises:
            IndexError: If there is no such row.
        """
        parts = self._parts(self._rows(rows))
        return Survey.total(source.survey(wanted) for _, source, wanted in parts)

    @property
    def retries(self) -> int:
        """Requests repeated so far, by this process and its DataLoader workers.

        A worker reports after each batch.
        """
        return int(self._retries.sum())

    def count_retries_anew(self) -> None:
        """Begin a count of this process and of the workers that it will start.

        Processes that were sent one dataset would share a count.
        """
        # Memory that workers share with their parent, of which each writes one number:
        # the ids of processes that run at a time differ modulo a few hundred.

        with torch.inference_mode(False):
            self._retries = torch.zeros(RETRY_SLOTS, dtype=torch.int64).share_memory_()
        self._retries_reported = self._retries_here()

    def _retries_here(self) -> int:
        sources = {id(source): source for source in self._sources}
        return sum(source.retries for source in sources.values())

    def among(
        self, keys: pa.StringArray | pa.ChunkedArray | Iterable[str]
    ) -> NDArray[np.bool_]:
        """Find the chips that have one of some keys.

        Args:
            keys: Ids of chips, or ids and points
                (:func:`~dynamicvis_geo.formats.tables.chip_keys`) where several
                points have the same chip. Those of other chips do no harm.

        Returns:
            bool ``[chips]``.

        Raises:
            SpecError: If *keys* is one string, or not all are strings.
        """
        return self._chips.among(keys)

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
        return self._chips.frame(self._rows(indices))

    @property
    def table(self) -> NDArray[np.void]:
        """All chips as plain numbers, type :data:`.chip_table.CHIP`; do not change it.

        Unlike :attr:`chips` it costs nothing; ``source`` counts :attr:`source_crs`.
        """
        return self._chips.columns

    @property
    def source_crs(self) -> list[CRS]:
        """CRS of each pair of dataset and sampler."""
        return list(self._chips.crs)

    @property
    def strides(self) -> Strides:
        """Pixels from chip to chip, (down, across), of each pair; None if no grid."""
        return list(self._chips.strides)

    @property
    def point_ids(self) -> pa.StringArray | None:
        """Point of each chip, null for none; None if no sampler has points."""
        return self._chips.point_ids

    @property
    def provenance(self) -> dict[str, Any]:
        """The sources and samplers of the chips, as plain values for JSON."""
        return {'chips': len(self), 'sources': self._described}

    def _finish(
        self,
        rows: NDArray[np.int64],
        parts: Sequence[tuple[list[int], Pending]],
    ) -> list[Found]:
        found: dict[int, Found] = {}
        try:
            for positions, finish in parts:
                for i, one in zip(positions, finish(), strict=True):
                    found[i] = _of_chip(int(rows[i]), one)
        finally:
            here = self._retries_here()
            self._retries[os.getpid() % RETRY_SLOTS] += here - self._retries_reported
            self._retries_reported = here
        return [found[i] for i in range(len(rows))]

    def _parts(
        self, rows: NDArray[np.int64]
    ) -> Iterator[tuple[list[int], Source, list[GeoSlice]]]:
        """Divide a batch by source: positions, source, queries."""
        sources = self.table['source'][rows]
        for source in np.unique(sources):
            positions = np.flatnonzero(sources == source)
            wanted = list(self._chips.queries(rows[positions]))
            yield positions.tolist(), self._sources[source], wanted

    def _rows(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        rows = np.array([operator.index(index) for index in indices], dtype=np.int64)
        length = len(self)
        wrong = (rows < -length) | (rows >= length)
        if wrong.any():
            raise IndexError(f'chip {rows[wrong][0]} of {length} chips')
        return np.where(rows < 0, rows + length, rows)


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


def _of_chip(row: int, found: Found) -> Found:
    if isinstance(found, ChipFailure):
        return found._replace(chip=row)
    return {**found, 'chip': torch.tensor([row])}
