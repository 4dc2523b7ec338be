"""The table of chips: each a grid, a time window and a source."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol, Self, runtime_checkable

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from pyproj import CRS
from torchgeo.datasets import GeoDataset

from dynamicvis_geo.datasets.chip_ids import chip_ids
from dynamicvis_geo.datasets.chip_order import (
    Stride,
    along_curve,
    hilbert_order,
    slabs,
)
from dynamicvis_geo.datasets.footprints import footprints, to_lonlat
from dynamicvis_geo.datasets.source import GeoSlice
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.formats.tables import chip_keys
from dynamicvis_geo.grid import Grid
from dynamicvis_geo.projections import crs_name
from dynamicvis_geo.provenance import Described
from dynamicvis_geo.time_window import TimeWindow, recorded

Ints = NDArray[np.int64]

#: Columns of a chip: those of its :class:`.Grid`, but the CRS, which is its source's;
#: start and end of its :class:`.TimeWindow` in nanoseconds; the number of its source.
CHIP = np.dtype(
    [
        ('x', np.float64),
        ('y', np.float64),
        ('width', np.int32),
        ('height', np.int32),
        ('xres', np.float64),
        ('yres', np.float64),
        ('start', np.int64),
        ('end', np.int64),
        ('source', np.int32),
    ]
)
_PLACE_AND_TIME = [name for name in CHIP.names or () if name != 'source']

#: Ids that are compared at a time.
COMPARED = 200_000
_WGS84 = CRS.from_epsg(4326)


@runtime_checkable
class ChipSampler(Described, Protocol):
    """A sampler that lays out all its chips at once.

    Its provenance are the arguments that lay out the same chips again. Samplers of
    TorchGeo, which yield slices, serve as well, but make Python objects of each chip,
    and know neither of points nor of strides.
    """

    def __iter__(self) -> Iterator[GeoSlice]:
        """Yield the slices of each chip: :meth:`ChipTable.queries`."""
        ...

    def table(self) -> ChipTable:
        """All chips, of one source."""
        ...


class ChipTable:
    """Chips as columns, 61 bytes each, in memory that DataLoader workers share.

    Attributes:
        crs: CRS of each source.
        strides: Pixels from chip to chip, (down, across), of each source; None if its
            chips do not lie on a grid.
        point_ids: Id of the point that each chip surrounds, null for none; None if no
            chip has a point.
    """

    def __init__(
        self,
        columns: NDArray[np.void],
        crs: Sequence[CRS],
        strides: Sequence[Stride],
        point_ids: pa.StringArray | None = None,
    ) -> None:
        """Make a table of chips.

        Args:
            columns: The chips, :data:`CHIP`; not copied.
            crs: CRS of each source.
            strides: Of each source.
            point_ids: Of each chip.
        """
        # A tensor, because PyTorch moves tensors to shared memory where it pickles a
        # dataset for its workers; NumPy arrays would be copied to each.
        self._bytes = torch.from_numpy(columns.view(np.uint8))
        self.crs = list(crs)
        self.strides = list(strides)
        self.point_ids = point_ids

    def __repr__(self) -> str:
        """Count the chips."""
        names = ', '.join(dict.fromkeys(map(crs_name, self.crs)))
        return f'<ChipTable: {len(self):,} chips, {names}>'

    @classmethod
    def parts_of(
        cls,
        grid: Grid,
        rows: Ints,
        cols: Ints,
        size: tuple[int, int],
        windows: Ints,
        *,
        stride: Stride = None,
        point_ids: pa.StringArray | None = None,
    ) -> Self:
        """Cut chips of one size out of a grid; they may reach beyond its edges.

        Args:
            grid: The pixels.
            rows: Upper row of each chip in *grid*.
            cols: Left column of each chip.
            size: Height and width of the chips in pixels.
            windows: Start and end of each chip's time window in nanoseconds,
                ``[n, 2]``.
            stride: Pixels from chip to chip, if they lie on a grid.
            point_ids: Id of each chip's point.
        """
        columns = np.zeros(len(rows), CHIP)
        columns['x'] = grid.x + cols * grid.xres
        columns['y'] = grid.y - rows * grid.yres
        columns['height'], columns['width'] = size
        columns['xres'], columns['yres'] = grid.res
        columns['start'], columns['end'] = windows.T
        return cls(columns, [CRS.from_user_input(grid.crs)], [stride], point_ids)

    @classmethod
    def of_sampler(cls, dataset: GeoDataset, sampler: Iterable[Any]) -> ChipTable:
        """Lay out the chips of a sampler: of this package, of TorchGeo, or a list.

        Args:
            dataset: The dataset that they are cut from.
            sampler: A :class:`ChipSampler`, or slices ``(x, y)`` or ``(x, y, t)``.

        Raises:
            SpecError: If it yields anything else.
        """
        if isinstance(sampler, ChipSampler):
            return sampler.table()
        slices = iter(sampler)
        columns = np.empty(0, CHIP)
        first = next(slices, None)
        if first is not None:
            whole = dataset.bounds
            name = type(sampler).__name__
            columns = np.fromiter(
                (
                    _record(query, whole, name)
                    for query in itertools.chain([first], slices)
                ),
                CHIP,
            )
        return cls(columns, [CRS.from_user_input(dataset.crs)], [None])

    @classmethod
    def join(cls, tables: Sequence[ChipTable]) -> Self:
        """Put tables below each other, their sources numbered on.

        Args:
            tables: The tables.
        """
        columns = np.concatenate([np.empty(0, CHIP), *(t.columns for t in tables)])
        counts = [len(table.crs) for table in tables]
        lengths = [len(table) for table in tables]
        shifts = np.cumsum([0, *counts[:-1]])[: len(tables)]
        columns['source'] += np.repeat(shifts, lengths).astype(np.int32)
        points = None
        if any(table.point_ids is not None for table in tables):
            points = pa.concat_arrays(
                pa.nulls(len(table), pa.string())
                if table.point_ids is None
                else table.point_ids
                for table in tables
            )
        return cls(
            columns,
            [crs for table in tables for crs in table.crs],
            [stride for table in tables for stride in table.strides],
            points,
        )

    def __len__(self) -> int:
        """Return the number of chips."""
        return len(self._bytes) // CHIP.itemsize

    @property
    def columns(self) -> NDArray[np.void]:
        """The chips, :data:`CHIP`; not to be changed."""
        # A view kept for long would miss the move to shared memory.
        columns: NDArray[np.void] = self._bytes.numpy().view(CHIP)
        return columns

    def select(self, chips: Ints | NDArray[np.bool_]) -> ChipTable:
        """Return a table of some of the chips.

        Args:
            chips: Rows of the chips, or a flag for each.
        """
        points = self.point_ids
        if points is not None:
            rows = np.flatnonzero(chips) if chips.dtype == np.bool_ else chips
            points = points.take(pa.array(rows))
        return ChipTable(self.columns[chips], self.crs, self.strides, points)

    def order_along_curve(self) -> None:
        """Bring the chips into :func:`.hilbert_order`, in place."""
        columns = self.columns
        order = hilbert_order(columns, along_curve(columns, self.strides))
        # A copy of one column exists at a time.
        for name in CHIP.names or ():
            columns[name] = columns[name][order]
        if self.point_ids is not None:
            self.point_ids = self.point_ids.take(pa.array(order))

    def queries(self, rows: Ints | None = None) -> Iterator[GeoSlice]:
        """Yield the slices that index the source dataset of each chip.

        Args:
            rows: Rows of the chips; all of them by default.
        """
        chips = self.columns if rows is None else self.columns[rows]
        times: dict[tuple[int, int], slice] = {}
        edges = bounds_of(chips).tolist()
        sides = (chips[name].tolist() for name in ('xres', 'yres', 'start', 'end'))
        for (west, south, east, north), xres, yres, start, end in zip(
            edges, *sides, strict=True
        ):
            if (start, end) not in times:
                times[start, end] = TimeWindow.of_nanoseconds(start, end).slice
            yield slice(west, east, xres), slice(south, north, yres), times[start, end]

    def ids(self, rows: Ints) -> list[str]:
        """Make the ids of chips: see :func:`.chip_id`.

        Args:
            rows: Rows of the chips.
        """
        chips = self.columns[rows]
        ids = np.empty(len(chips), dtype=object)
        for source in np.unique(chips['source']):
            at = chips['source'] == source
            ids[at] = chip_ids(self.crs[source], chips[at])
        names: list[str] = ids.tolist()
        return names

    def among(
        self, keys: pa.StringArray | pa.ChunkedArray | Iterable[str], name: str = 'keys'
    ) -> NDArray[np.bool_]:
        """Find the chips that have one of some ids or keys.

        Args:
            keys: Ids, or keys (:func:`.chip_keys`); those of other chips do no harm.
            name: Name of this argument, for errors.

        Returns:
            bool ``[chips]``.

        Raises:
            SpecError: If *keys* is one string, or not all are strings.
        """
        names = _strings(name, keys)
        found = np.zeros(len(self), dtype=bool)
        if not len(names):
            return found
        # Both sides are taken in parts: the set that PyArrow makes of many names takes
        # several times their memory.
        for rows in slabs(np.arange(len(self)), COMPARED):
            ids = pa.array(self.ids(rows), pa.string())
            known = [ids]
            if self.point_ids is not None:
                known.append(chip_keys(ids, self.point_ids.take(pa.array(rows))))
            for start, some in itertools.product(range(0, len(names), COMPARED), known):
                among = pc.is_in(some, value_set=names.slice(start, COMPARED))
                found[rows] |= among.to_numpy(zero_copy_only=False)
        return found

    def frame(self, rows: Ints) -> gpd.GeoDataFrame:
        """Return some chips as a GeoDataFrame: see :meth:`.ChipDataset.rows`.

        Args:
            rows: Rows of the chips.
        """
        chips = self.columns[rows]
        bounds = bounds_of(chips)
        shape = np.stack([chips['height'], chips['width']], axis=1).astype(np.int64)
        crs = np.array([crs_name(crs) for crs in self.crs], dtype=object)
        centre = np.full((len(rows), 2), np.nan)
        outlines = np.empty(len(rows), dtype=object)
        for source in np.unique(chips['source']):
            at = chips['source'] == source
            middle = (bounds[at, :2] + bounds[at, 2:]) / 2
            centre[at] = np.stack(to_lonlat(self.crs[source], *middle.T), axis=1)
            outlines[at] = footprints(self.crs[source], bounds[at], shape[at])
        start, end = recorded(chips['start'], chips['end'])
        columns: dict[str, Any] = {
            'chip_id': np.array(self.ids(rows), dtype=object),
            'crs': crs[chips['source']] if len(rows) else crs[:0],
            **dict(zip(('minx', 'miny', 'maxx', 'maxy'), bounds.T, strict=True)),
            **{name: chips[name] for name in ('width', 'height', 'xres', 'yres')},
            'start': pd.DatetimeIndex(start),
            'end': pd.DatetimeIndex(end),
            'centre_lon': centre[:, 0],
            'centre_lat': centre[:, 1],
        }
        if self.point_ids is not None:
            columns['point_id'] = self.point_ids.take(pa.array(rows)).to_pylist()
        columns['geometry'] = gpd.array.from_shapely(outlines, crs=_WGS84)
        return gpd.GeoDataFrame(columns, index=pd.Index(rows, name='chip'))

    def refuse_doubles(self, datasets: Sequence[GeoDataset]) -> None:
        """Refuse chips of different datasets that would have the same id.

        Args:
            datasets: Dataset of each source; one may occur several times.

        Raises:
            SpecError: If there are such chips.
        """
        first = [
            next(i for i, two in enumerate(datasets) if two is one) for one in datasets
        ]
        for one in dict.fromkeys(self.crs):
            sources = [i for i, other in enumerate(self.crs) if other == one]
            # Chips of different CRS never are the same, nor are those of one dataset.
            if len({first[i] for i in sources}) > 1:
                rows = np.flatnonzero(np.isin(self.columns['source'], sources))
                self._refuse(_alike(self.columns, rows), np.array(first), datasets)

    def _refuse(self, rows: Ints, first: Ints, datasets: Sequence[GeoDataset]) -> None:
        places = _places(self.columns, rows)
        places['source'] = first[self.columns['source'][rows]]
        places = places.drop_duplicates()
        double = places[places.duplicated(_PLACE_AND_TIME, keep=False)]
        if len(double):
            one, two = double['source'].iloc[0], double['source'].iloc[-1]
            names = [type(datasets[i]).__name__ for i in (one, two)]
            raise SpecError(
                f'pairs: datasets {one} ({names[0]}) and {two} ({names[1]}) have the '
                'same chip (CRS, place, size and time), which could not be told apart: '
                'join them with & or |, or make a ChipDataset of each'
            )


def bounds_of(chips: NDArray[np.void]) -> NDArray[np.float64]:
    """Compute the edges of chips in their CRS.

    Args:
        chips: Rows of a chip table, :data:`CHIP`.

    Returns:
        West, south, east and north, float64 ``[n, 4]``.
    """
    east = chips['x'] + chips['width'] * chips['xres']
    south = chips['y'] - chips['height'] * chips['yres']
    return np.stack([chips['x'], south, east, chips['y']], axis=1)


def _record(query: Any, whole: GeoSlice, sampler: str) -> tuple[float | int, ...]:
    """One chip as a row of the table; *whole* has what its slices leave out."""
    if not (
        isinstance(query, tuple)
        and len(query) in (2, 3)
        and all(isinstance(part, slice) for part in query)
    ):
        raise SpecError(
            f'pairs: sampler {sampler} yields {query!r:.80}, not slices (x, y) or '
            '(x, y, t); a batch sampler cannot be used: give its sampler of single '
            'chips'
        )
    x, y = (
        slice(part.start, part.stop, part.step or default.step)
        for part, default in zip(query, whole[:2], strict=False)
    )
    t = query[2] if len(query) == 3 else whole[2]
    window = _window(t.start, t.stop)
    try:
        grid = Grid.from_slices('', x, y)
    except ValueError:
        grid = None
    if grid is None or window is None or t.step not in (None, 1):
        raise SpecError(
            f'pairs: sampler {sampler} yields {query!r}: a chip needs a whole pixel, '
            'times without time zone (UTC) and a time step of 1'
        )
    return (grid.x, grid.y, grid.width, grid.height, grid.xres, grid.yres, *window, 0)


@lru_cache(maxsize=4096)
def _window(start: Any, stop: Any) -> tuple[int, int] | None:
    """Start and end of a slice of time in nanoseconds; None with a time zone."""
    if any(pd.Timestamp(time).tz is not None for time in (start, stop)):
        return None
    return TimeWindow.closed(start, stop).nanoseconds


def _strings(name: str, ids: Any) -> pa.StringArray | pa.ChunkedArray:
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


def _alike(columns: NDArray[np.void], rows: Ints) -> Ints:
    """Rows whose place and time have a hash in common: few, seldom wrongly."""
    hashes = np.concatenate(
        [
            pd.util.hash_pandas_object(_places(columns, part), index=False).to_numpy()
            for part in slabs(rows)
        ]
        or [np.empty(0, np.uint64)]
    )
    order = np.argsort(hashes, kind='stable')
    same = np.flatnonzero(np.diff(hashes[order]) == 0)
    double: Ints = rows[np.unique(order[np.concatenate([same, same + 1])])]
    return double


def _places(columns: NDArray[np.void], rows: Ints) -> pd.DataFrame:
    # Adding 0 makes one zero of two.
    return pd.DataFrame({name: columns[name][rows] + 0 for name in _PLACE_AND_TIME})
