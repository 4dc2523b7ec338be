"""Feature maps of grids of chips, mosaicked into one Zarr array a CRS.

``OUT.zarr`` is a store of Zarr format 3 with consolidated metadata. It holds one group
for each CRS, such as ``EPSG_32618``, and beside the groups ``chips.parquet``
(GeoParquet: id, time window, CRS, bounds, valid fraction and footprint of every chip)
and ``metadata.json`` (the provenance, also an attribute of each group). In a group:

=============== ====================================================================
``embeddings``  float32 or float16, ``(time, embedding, y, x)``; NaN where no chip is
``y``, ``x``    centres of the feature cells, in the CRS
``time``        start of the time window, UTC; all chips without a window share one
                time that is missing (NaT)
``time_bounds`` start and end of the window; NaT where it is not limited
``spatial_ref`` CRS and transform, as CF, GDAL and rioxarray read them
=============== ====================================================================

A chip of H x W pixels with a feature map of h x w cells fills h x w cells of the array,
exactly where it lies: nothing is resampled. All chips of one CRS must therefore have
one size and one resolution, and lie whole cells apart.

**Chip centres win**: where chips of one time overlap, a cell has the value of the chip
whose centre is nearest to the centre of the cell; of several at the same distance, of
the northernmost, and of these of the westernmost. All chips that were asked for count,
and those that the store holds: a chip that has failed leaves its own cells as they
were, NaN in a new store, until it is done. The result depends neither on the order of
the chips nor on who wrote them.

Arrays get their extent and their times when they are begun, from all chips that were
asked for; chips beyond are refused. So that no file of an array is written by two at
once, a shard whose cells are all of one block of the plan is written by that block. In
a shard of several blocks, each keeps its cells in a file beside its own, and the merge
writes them all. Such shards are rare: those of a grid lie within the squares of the
plan, which hang from the same corner. Where chips overlap, an array may therefore begin
some empty cells, at most a sixteenth of its extent or one chunk, before the first chip.
"""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dynamicvis_geo.callbacks.blocks import Description
from dynamicvis_geo.callbacks.geoparquet import Extent, GeoParquetWriter, chip_schema
from dynamicvis_geo.callbacks.mosaic import (
    OPEN,
    ChipGrid,
    Ints,
    Layout,
    Shard,
    Sites,
    open_times,
    overlap,
)
from dynamicvis_geo.callbacks.parquet_blocks import (
    SUFFIX,
    Merged,
    gather,
    list_failures,
    opened,
    row_keys,
)
from dynamicvis_geo.callbacks.predictions import ChipTable, Predictions
from dynamicvis_geo.callbacks.store import Store, Target
from dynamicvis_geo.callbacks.zarr_group import (
    Group,
    complete,
    group_name,
    require_zarr,
)
from dynamicvis_geo.datasets.chip_table import CHIP
from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.projections import crs_name
from dynamicvis_geo.provenance import (
    METADATA_FILE,
    PROVENANCE_KEY,
    describe_embeddings,
    to_json,
)

if TYPE_CHECKING:
    from dynamicvis_geo.callbacks.formats import Work

#: Table of the chips that the arrays hold, beside them.
CHIPS_FILE = 'chips.parquet'
#: Rows of a row group of it.
_ROW_GROUP = 50_000

_SIZES = ('width', 'height', 'xres', 'yres')

#: Positions in a shard, ``[n]``, and the values there, ``[D, n]``.
Cells = tuple[Ints, npt.NDArray[Any]]
_PARTS = ('cells.npy', 'values.npy')


class ZarrMosaic:
    """One array of feature maps a CRS: see :class:`~.formats.Format`."""

    output: ClassVar[str] = 'grid'
    dtypes: ClassVar[tuple[str, ...]] = ('float32', 'float16')
    members: ClassVar[tuple[str, ...]] = ('*',)

    def __init__(self, url: str, dtype: str) -> None:
        """Say where the output is, and the type of its numbers.

        Raises:
            OutputError: If the package zarr is missing.
        """
        require_zarr()
        self._place = Target.of(url)
        self._folder = Store(url)
        self._dtype = dtype
        self._mosaics: dict[tuple[str, str], _Mosaic] = {}

    def held(self) -> pa.StringArray:
        """Keys of the chips that the arrays hold."""
        table = self._held(['id', 'point_id'])
        return pa.array([], pa.string()) if table is None else row_keys(table)

    def check(self, chips: ChipTable) -> None:
        """Refuse chips that have no place in an array.

        Raises:
            OutputError: If the chips of a CRS share no grid, or do not fit into the
                array that is there.
        """
        self._mosaics.clear()
        planned, held = _by_crs(chips), self._held_chips()
        for crs in sorted({*planned, *held}):
            group = self._group(crs)
            if group is None and crs in held:
                raise OutputError(
                    f"'{self._folder.url}' is damaged: its {CHIPS_FILE} lists chips in "
                    f"{crs}, but there is no group '{group_name(crs)}'; choose another "
                    'output, or have it replaced (overwrite=True)'
                )
            if crs not in planned:
                continue
            table = open_times(chips.table[planned[crs]])
            grid = ChipGrid.of(crs, table)
            if chips.point_ids is not None:
                grid.check_points()
            if group is not None:
                group.layout.check_chips(crs, table)

    def origins(self, chips: ChipTable) -> Sequence[tuple[float, float] | None]:
        """Let tiles of the plan hang from the corner of all chips of a CRS."""
        origins: list[tuple[float, float] | None] = [None] * len(chips.source_crs)
        held = self._held_chips()
        for crs, rows in _by_crs(chips).items():
            table = chips.table[rows]
            everything = np.concatenate([table, held.get(crs, table[:0])])
            corner = float(everything['x'].min()), float(everything['y'].max())
            for source in np.unique(table['source']).tolist():
                origins[source] = corner
        return origins

    def write_maps(self, work: Work, number: int, predictions: Predictions) -> None:
        """Write the shards that are a block's alone, and keep its cells of others.

        Raises:
            OutputError: If the feature maps do not fit into the array, or have values
                that the type cannot hold.
        """
        if not len(predictions.chip):
            return
        mosaic = self._mosaic(work, predictions)
        with ExitStack() as stack:
            seams = None
            for shard, alone, cells in mosaic.cells(number, predictions):
                if alone:
                    _put_cells(mosaic.group, shard, cells)
                    continue
                if seams is None:
                    name = f'seam-{work.run.word}-{number:08d}.zip'
                    path = stack.enter_context(work.store.whole(name))
                    seams = stack.enter_context(zipfile.ZipFile(path, 'w'))
                _write_seam(seams, (mosaic.name, shard), cells)

    def merge(self, store: Store, run: Description, partial: bool) -> Merged:
        """Write the shards of several blocks, and describe what the store holds."""
        gathered = gather(store, run, partial)
        self._join_seams(store, run)
        done = gathered.done
        table = _joined(self._held(), done)
        names = {crs: group_name(crs) for crs in pc.unique(table['crs']).to_pylist()}
        groups = [Group.open(f'{self._folder.url}/{name}') for name in names.values()]
        sizes = {group.layout.dimensions for group in groups if group is not None}
        provenance = self._provenance(run, min(sizes, default=None))
        self._write_chips(store, table, provenance)
        text = to_json(provenance, indent=2)
        self._folder.put(METADATA_FILE, f'{text}\n'.encode())
        failed = list_failures(
            self._place,
            store,
            gathered.failed,
            lambda: row_keys(gathered.done),
        )
        attributes = _attributes(provenance)
        new = set(pc.unique(done['crs']).to_pylist()) if done.num_rows else set()
        complete(
            self._folder.url,
            {name: attributes if crs in new else None for crs, name in names.items()},
        )
        return Merged(done.num_rows, failed, gathered.missing)

    def _provenance(self, run: Description, dimensions: int | None) -> dict[str, Any]:
        described = describe_embeddings('pixel', dimensions, self._dtype)
        return {**run.provenance, **described}

    def _held(self, columns: list[str] | None = None) -> pa.Table | None:
        """Read the table of the chips that the arrays hold; None if there is none."""
        if CHIPS_FILE not in self._folder.names():
            return None
        with opened(self._folder, CHIPS_FILE) as file:
            return file.read(columns, use_threads=False)

    def _held_chips(self) -> dict[str, npt.NDArray[np.void]]:
        """Return the chips that the arrays hold, by the name of their CRS."""
        columns = ['crs', 'start', 'end', 'minx', 'maxy', *_SIZES]
        table = self._held(columns)
        if table is None:
            return {}
        chips = np.zeros(table.num_rows, CHIP)
        chips['x'], chips['y'] = table['minx'].to_numpy(), table['maxy'].to_numpy()
        for name in _SIZES:
            chips[name] = table[name].to_numpy()
        for name in ('start', 'end'):
            times = table[name].cast(pa.timestamp('ns', tz='UTC')).cast(pa.int64())
            chips[name] = pc.fill_null(times, OPEN).to_numpy()
        names = table['crs'].to_pandas()
        return {
            str(crs): chips[rows] for crs, rows in names.groupby(names).indices.items()
        }

    def _group(self, crs: str) -> Group | None:
        return Group.open(f'{self._folder.url}/{group_name(crs)}')

    def _mosaic(self, work: Work, predictions: Predictions) -> _Mosaic:
        """Return what a block is written into; begin it if nobody has."""
        source = int(work.chips.table['source'][predictions.chip[0]])
        crs = crs_name(work.chips.source_crs[source])
        dimensions, height, width = predictions.embedding.shape[1:]
        maps = dimensions, height, width
        key = work.run.word, crs
        if key not in self._mosaics:
            self._mosaics[key] = self._begin(work, crs, maps)
        self._mosaics[key].group.layout.check_same(crs, maps, self._dtype)
        return self._mosaics[key]

    def _begin(self, work: Work, crs: str, maps: tuple[int, int, int]) -> _Mosaic:
        rows = _by_crs(work.chips)[crs]
        table = open_times(work.chips.table[rows])
        group = self._group(crs)
        if group is None:
            strides = work.chips.strides
            gridded = all(strides[i] is not None for i in np.unique(table['source']))
            square = work.plan.square if gridded else None
            grid = ChipGrid.of(crs, table)
            layout = Layout.plan(grid, table, maps, self._dtype, square)
            url = f'{self._folder.url}/{group_name(crs)}'
            attributes = _attributes(self._provenance(work.run, maps[0]))
            group = Group.begin(url, layout, crs, attributes)
        group.layout.check_chips(crs, table)
        held = self._held_chips().get(crs, table[:0])
        none = np.full(len(held), -1)
        block = work.plan.block_of(len(work.chips.table))[rows]
        sites = Sites.of(
            group.layout,
            group.layout.place(np.concatenate([table, held])),
            np.concatenate([rows, none]),
            np.concatenate([block, none]),
        )
        return _Mosaic(group, group_name(crs), sites, self._dtype)

    def _join_seams(self, store: Store, run: Description) -> None:
        """Write the shards of which several blocks have kept cells."""
        parts: dict[tuple[str, Shard], list[str]] = {}
        for name in sorted(store.names()):
            if name.startswith(f'seam-{run.word}-'):
                for place in _places(store, name):
                    parts.setdefault(place, []).append(name)
        for group, shards in itertools.groupby(sorted(parts), lambda place: place[0]):
            url = f'{self._folder.url}/{group}'
            opened_group = Group.open(url)
            if opened_group is None:
                raise OutputError(
                    f"'{url}' is gone, which this run has begun: begin anew "
                    '(overwrite=True)'
                )
            for place in shards:
                kept = (_read_seam(store, name, place) for name in parts[place])
                _put_cells(opened_group, place[1], kept)

    def _write_chips(
        self, store: Store, table: pa.Table, provenance: Mapping[str, Any]
    ) -> None:
        with (
            self._folder.whole(CHIPS_FILE, store) as temporary,
            GeoParquetWriter(
                temporary, table.schema, Extent.of(table), provenance
            ) as writer,
        ):
            for first in range(0, table.num_rows, _ROW_GROUP):
                writer.write(table.slice(first, _ROW_GROUP).combine_chunks())


@dataclass(frozen=True, eq=False)
class _Mosaic:
    """The array of one CRS, and all chips that have cells in it."""

    group: Group
    name: str
    sites: Sites
    dtype: str

    def cells(
        self, number: int, predictions: Predictions
    ) -> Iterator[tuple[Shard, bool, Iterator[Cells]]]:
        """Yield shards, whether their cells are this block's alone, and its cells."""
        sites = self.sites
        given = {row: i for i, row in enumerate(predictions.chip.tolist())}
        mine = sites.block == number
        for shard in self.group.layout.shards_of(sites.places[mine]):
            owners = sites.owners(shard)
            present = np.unique(owners[owners >= 0])
            alone = bool((mine[present] | (sites.block[present] < 0)).all())
            # Of those that have failed nothing is given.
            own = {
                site: predictions.embedding[given[int(sites.chip[site])]]
                for site in present[mine[present]].tolist()
                if int(sites.chip[site]) in given
            }
            if own:
                yield shard, alone, self._cells(shard, owners, own)

    def _cells(
        self, shard: Shard, owners: Ints, maps: Mapping[int, npt.NDArray[np.float32]]
    ) -> Iterator[Cells]:
        """Yield what chips own of a shard, chip by chip."""
        layout = self.group.layout
        window = layout.window(shard)
        position = np.arange(owners.size).reshape(owners.shape)
        for site, features in maps.items():
            corner = self.sites.places[site, 1:]
            here, inside = overlap(corner, layout.map_size, window)
            own = owners[here] == site
            yield position[here][own], _cast(features[:, *inside][:, own], self.dtype)


def _put_cells(group: Group, shard: Shard, cells: Iterable[Cells]) -> None:
    """Put cells into a shard, all others of which stay as they are."""
    block = group.read(shard)
    flat = block.reshape(len(block), -1)
    for places, values in cells:
        flat[:, places] = values
    group.put(shard, block)


def _write_seam(
    archive: zipfile.ZipFile, place: tuple[str, Shard], cells: Iterable[Cells]
) -> None:
    places, values = zip(*cells, strict=True)
    arrays = np.concatenate(places), np.concatenate(values, axis=1)
    for what, array in zip(_PARTS, arrays, strict=True):
        with archive.open(_entry(place, what), 'w', force_zip64=True) as file:
            np.lib.format.write_array(file, array)


def _read_seam(store: Store, name: str, place: tuple[str, Shard]) -> Cells:
    with _archive(store, name) as archive:
        parts = []
        for what in _PARTS:
            with archive.open(_entry(place, what)) as file:
                parts.append(np.lib.format.read_array(file))
    return parts[0], parts[1]


def _places(store: Store, name: str) -> Iterator[tuple[str, Shard]]:
    """Return group and shard of all cells in a file of a block."""
    with _archive(store, name) as archive:
        names = archive.namelist()
    for entry in names:
        group, shard, what = entry.split('/')
        time, down, across = map(int, shard.split('.'))
        if what == _PARTS[0]:
            yield group, (time, down, across)


def _entry(place: tuple[str, Shard], what: str) -> str:
    return f'{place[0]}/{".".join(map(str, place[1]))}/{what}'


@contextmanager
def _archive(store: Store, name: str) -> Iterator[zipfile.ZipFile]:
    with store.open(name) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except (zipfile.BadZipFile, ValueError) as error:
            block = name.replace('seam-', 'block-', 1).replace('.zip', SUFFIX)
            raise OutputError(
                f"'{store.url}/{name}' cannot be read ({error}): it was damaged after "
                f"it was written; remove it and '{block}', and their chips are "
                'computed again'
            ) from error


def _attributes(provenance: Mapping[str, Any]) -> dict[str, Any]:
    terms = {key: v for key, v in provenance.items() if key.startswith('emb:')}
    # As text, which xarray can write to any format.
    return {**terms, PROVENANCE_KEY: to_json(provenance)}


def _by_crs(chips: ChipTable) -> dict[str, Ints]:
    """Return the rows of a chip table by the name of their CRS."""
    names = np.array([crs_name(crs) for crs in chips.source_crs], dtype=object)
    source = chips.table['source']
    return {
        str(name): np.flatnonzero(np.isin(source, np.flatnonzero(names == name)))
        for name in sorted(set(names[np.unique(source)]))
    }


def _joined(held: pa.Table | None, done: pa.Table) -> pa.Table:
    """Join what the arrays held before with what blocks have done."""
    schema = chip_schema(points=True)
    tables = [schema.empty_table()]
    if held is not None:
        again = pc.is_in(row_keys(held), value_set=row_keys(done))
        tables.append(held.filter(pc.invert(again)))
    if done.num_rows:
        tables.append(done)
    rows = pa.concat_tables([_fit(table, schema) for table in tables])
    if rows['point_id'].null_count == len(rows):
        rows = rows.drop_columns('point_id')
    return rows


def _fit(table: pa.Table, schema: pa.Schema) -> pa.Table:
    if 'point_id' not in table.column_names:
        table = table.append_column('point_id', pa.nulls(len(table), pa.string()))
    return table.select(schema.names).cast(schema)


def _cast(features: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    with np.errstate(over='ignore'):
        cast = features.astype(dtype)
    if dtype == 'float16' and (np.isinf(cast) & np.isfinite(features)).any():
        raise OutputError(
            f"dtype='float16' cannot hold features of {np.nanmax(np.abs(features)):g}: "
            "use dtype='float32'"
        )
    return cast
