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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Literal

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dynamicvis_geo.errors import OutputError, SourceError, one_line
from dynamicvis_geo.formats.base import Format, OpenRun, Predictions, RunChips
from dynamicvis_geo.formats.block_files import Blocks
from dynamicvis_geo.formats.parquet_files import (
    PARQUET_TYPE,
    Extent,
    GeoParquetWriter,
    opened,
)
from dynamicvis_geo.formats.tables import chip_schema, fit, row_keys
from dynamicvis_geo.formats.zarr_cells import (
    Mosaic,
    Sites,
    put_cells,
    read_seam,
    seam_places,
    write_seam,
)
from dynamicvis_geo.formats.zarr_conventions import (
    group_conventions,
    require_zarr_cm,
    root_conventions,
)
from dynamicvis_geo.formats.zarr_group import (
    METADATA,
    Group,
    complete,
    group_name,
    require_zarr,
)
from dynamicvis_geo.formats.zarr_layout import (
    ArrayShard,
    ChipGrid,
    Ints,
    Layout,
    open_times,
)
from dynamicvis_geo.paths import Place, parquet_source
from dynamicvis_geo.projections import crs_name
from dynamicvis_geo.provenance import (
    METADATA_FILE,
    PROVENANCE_KEY,
    describe_embeddings,
    to_json,
)
from dynamicvis_geo.store import Store

#: Table of the chips that the arrays hold, beside them.
CHIPS_FILE = 'chips.parquet'
#: Rows of a row group of it.
_ROW_GROUP = 50_000

_SIZES = ('width', 'height', 'xres', 'yres')
#: Columns of a tile; a shard is named by its numbers along time, y and x.
_TILE = ('crs', 'minx', 'miny', 'maxx', 'maxy', 'height', 'width', 'start', 'end')


class Zarr(Format):
    """Feature maps as a Zarr store, one array a CRS."""

    output: ClassVar[Literal['pooled', 'grid']] = 'grid'
    dtypes: ClassVar[tuple[str, ...]] = ('float32', 'float16')
    suffixes: ClassVar[tuple[str, ...]] = ('.zarr',)
    members: ClassVar[tuple[str, ...]] = ('*',)

    def __init__(self, url: str, dtype: str) -> None:
        """Note where an output is to be, and the type of its numbers.

        Args:
            url: Path or URL of the store.
            dtype: 'float32' or 'float16'.

        Raises:
            OutputError: If the package zarr or zarr-cm is missing.
        """
        require_zarr()
        require_zarr_cm()
        super().__init__(url, dtype)
        self._mosaics: dict[tuple[str, str], Mosaic] = {}

    def held(self) -> pa.StringArray:
        """Keys of the chips that the arrays hold."""
        table = self._held(['id', 'point_id'])
        return pa.array([], pa.string()) if table is None else row_keys(table)

    def check(self, chips: RunChips) -> None:
        """Refuse chips that have no place in an array.

        Args:
            chips: All chips of the run.

        Raises:
            OutputError: If the chips of a CRS share no grid, or do not fit into the
                array that is there.
        """
        self._mosaics.clear()
        planned, held = _by_crs(chips), self._held_chips(chips.table.dtype)
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

    def origins(self, chips: RunChips) -> Sequence[tuple[float, float] | None]:
        """Let squares of blocks begin at the corner of all chips of a CRS.

        Args:
            chips: All chips of the run.

        Returns:
            A point in the CRS of each source.
        """
        origins: list[tuple[float, float] | None] = [None] * len(chips.source_crs)
        held = self._held_chips(chips.table.dtype)
        for crs, rows in _by_crs(chips).items():
            table = chips.table[rows]
            everything = np.concatenate([table, held.get(crs, table[:0])])
            corner = float(everything['x'].min()), float(everything['y'].max())
            for source in np.unique(table['source']).tolist():
                origins[source] = corner
        return origins

    def write_maps(
        self, run: OpenRun, number: int, predictions: Sequence[Predictions]
    ) -> None:
        """Write the shards that are a block's alone, and keep its cells of others.

        Raises:
            OutputError: If the feature maps do not fit into the array, or have values
                that the type cannot hold.
        """
        mosaic = self._mosaic(run, predictions)
        with ExitStack() as stack:
            seams = None
            for shard, alone, cells in mosaic.cells(number, predictions):
                if alone:
                    put_cells(mosaic.group, shard, cells)
                    continue
                if seams is None:
                    name = f'seam-{run.id}-{number:08d}.zip'
                    path = stack.enter_context(run.store.whole(name))
                    seams = stack.enter_context(zipfile.ZipFile(path, 'w'))
                write_seam(seams, (mosaic.name, shard), cells)

    def merge(self, blocks: Blocks) -> None:
        """Write the shards of several blocks, and describe what the store holds."""
        tables = list(blocks.rows())
        done = pa.concat_tables(tables) if tables else chip_schema(False).empty_table()
        self._join_seams(blocks)
        table = _joined(self._held(), done)
        names = {crs: group_name(crs) for crs in pc.unique(table['crs']).to_pylist()}
        layouts = {crs: self._begun(name).layout for crs, name in names.items()}
        sizes = {layout.dimensions for layout in layouts.values()}
        provenance = self._provenance(blocks.provenance, min(sizes, default=None))
        self._write_chips(blocks.store, table, provenance)
        text = to_json(provenance, indent=2)
        self._folder.put(METADATA_FILE, f'{text}\n'.encode())
        told = _attributes(provenance)
        new = set(pc.unique(done['crs']).to_pylist())
        root: dict[str, Any] = {}
        if layouts:
            map_size = min(layout.map_size for layout in layouts.values())
            root = root_conventions(provenance, Extent.of(table).bounds, map_size)
        complete(
            self._folder.url,
            root,
            {
                name: {
                    **(told if crs in new else {}),
                    **group_conventions(provenance, layouts[crs]),
                }
                for crs, name in names.items()
            },
        )

    @classmethod
    def is_at(cls, path: Place, is_folder: bool) -> bool:
        """Say whether a path is a Zarr store with a table of chips."""
        return is_folder and (path / METADATA).is_file() and _chips_at(path).is_file()

    @classmethod
    def read_chips(cls, path: Place, most: int) -> tuple[gpd.GeoDataFrame, int, int]:
        """Read the table of chips; ``height`` and ``width`` are cells of their maps."""
        try:
            chips = gpd.read_parquet(parquet_source(_chips_at(path)))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise SourceError(
                f'{_chips_at(path)}: it cannot be read as GeoParquet '
                f'({one_line(error)}): make the output anew'
            ) from error
        dimensions = 0
        for crs, rows in chips.groupby('crs').indices.items():
            layout = _group_at(path, crs).layout
            chips.loc[chips.index[rows], ['height', 'width']] = layout.map_size
            dimensions = layout.dimensions
        return chips, len(chips), dimensions

    @classmethod
    def assets(cls, name: str, crs: str) -> dict[str, dict[str, Any]]:
        """Name the group of a CRS, and the table of all chips."""
        return {
            'embeddings': {
                'href': f'{name}/{group_name(crs)}',
                'type': 'application/vnd.zarr; version=3',
                'title': 'Zarr group with the array embeddings',
                'roles': ['data'],
            },
            'chips': {
                'href': f'{name}/{CHIPS_FILE}',
                'type': PARQUET_TYPE,
                'title': 'All chips of the store, with their footprints',
                'roles': ['metadata'],
            },
        }

    @classmethod
    def read_maps(
        cls, path: Place, chips: pd.DataFrame
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the cells of the arrays where each chip lies.

        Where chips overlap, those are of the chip whose centre is nearest.
        """
        groups: dict[str, Group] = {}
        places = _records(chips)
        for i, crs in enumerate(chips['crs']):
            if crs not in groups:
                groups[crs] = _group_at(path, crs)
            yield groups[crs].read_map(places[i : i + 1])

    @classmethod
    def tiles(cls, path: Place, chips: pd.DataFrame) -> pd.DataFrame:
        """List the shards of all arrays: chips that overlap share cells."""
        tiles = []
        for crs, rows in chips.groupby('crs').indices.items():
            layout = _group_at(path, str(crs)).layout
            for shard in layout.shards_of(layout.place(_records(chips.iloc[rows]))):
                cells = layout.cells.part(*layout.window(shard))
                window = layout.times[shard[0]]
                times = (pd.Timestamp(time, tz='UTC') for time in window)
                tiles.append((crs, *cells.bounds, *cells.shape, *times, shard))
        return pd.DataFrame(tiles, columns=[*_TILE, 'shard'])

    @classmethod
    def read_tiles(
        cls, path: Place, tiles: pd.DataFrame
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the values of shards."""
        groups: dict[str, Group] = {}
        for crs, shard in zip(tiles['crs'], tiles['shard'], strict=True):
            if crs not in groups:
                groups[crs] = _group_at(path, crs)
            yield groups[crs].read_shard(shard)

    def _provenance(
        self, made: Mapping[str, Any], dimensions: int | None
    ) -> dict[str, Any]:
        return {**made, **describe_embeddings('pixel', dimensions, self._dtype)}

    def _held(self, columns: list[str] | None = None) -> pa.Table | None:
        """Read the table of the chips that the arrays hold; None if there is none."""
        if CHIPS_FILE not in self._folder.names():
            return None
        with opened(self._folder, CHIPS_FILE) as file:
            return file.read(columns, use_threads=False)

    def _held_chips(self, dtype: np.dtype[np.void]) -> dict[str, NDArray[np.void]]:
        """Return the chips that the arrays hold, by the name of their CRS."""
        columns = ['crs', 'start', 'end', 'minx', 'maxy', *_SIZES]
        table = self._held(columns)
        if table is None:
            return {}
        chips = np.zeros(table.num_rows, dtype)
        chips['x'], chips['y'] = table['minx'].to_numpy(), table['maxy'].to_numpy()
        for name in _SIZES:
            chips[name] = table[name].to_numpy()
        for name in ('start', 'end'):
            chips[name] = _nanoseconds(table[name].to_pandas())
        names = table['crs'].to_pandas()
        return {
            str(crs): chips[rows] for crs, rows in names.groupby(names).indices.items()
        }

    def _group(self, crs: str) -> Group | None:
        return Group.open(f'{self._folder.url}/{group_name(crs)}')

    def _begun(self, name: str) -> Group:
        url = f'{self._folder.url}/{name}'
        group = Group.open(url)
        if group is None:
            raise OutputError(
                f"'{url}' is gone, which was begun: begin anew (overwrite=True)"
            )
        return group

    def _mosaic(self, run: OpenRun, predictions: Sequence[Predictions]) -> Mosaic:
        """Return what a block is written into; begin it if nobody has."""
        source = int(run.chips.table['source'][predictions[0].chip[0]])
        crs = crs_name(run.chips.source_crs[source])
        key = run.id, crs
        for some in predictions:
            dimensions, height, width = some.embedding.shape[1:]
            maps = dimensions, height, width
            if key not in self._mosaics:
                self._mosaics[key] = self._begin(run, crs, maps)
            self._mosaics[key].group.layout.check_same(crs, maps, self._dtype)
        return self._mosaics[key]

    def _begin(self, run: OpenRun, crs: str, maps: tuple[int, int, int]) -> Mosaic:
        rows = _by_crs(run.chips)[crs]
        table = open_times(run.chips.table[rows])
        group = self._group(crs)
        if group is None:
            strides = run.chips.strides
            gridded = all(strides[i] is not None for i in np.unique(table['source']))
            square = run.square if gridded else None
            grid = ChipGrid.of(crs, table)
            layout = Layout.plan(grid, table, maps, self._dtype, square)
            provenance = self._provenance(run.provenance, maps[0])
            attributes = {
                **_attributes(provenance),
                **group_conventions(provenance, layout),
            }
            url = f'{self._folder.url}/{group_name(crs)}'
            group = Group.begin(url, layout, crs, attributes)
        group.layout.check_chips(crs, table)
        held = self._held_chips(table.dtype).get(crs, table[:0])
        none = np.full(len(held), -1)
        block = run.block_of[rows]
        sites = Sites.of(
            group.layout,
            group.layout.place(np.concatenate([table, held])),
            np.concatenate([rows, none]),
            np.concatenate([block, none]),
        )
        return Mosaic(group, group_name(crs), sites, self._dtype)

    def _join_seams(self, blocks: Blocks) -> None:
        """Write the shards of which several blocks have kept cells."""
        store = blocks.store
        seams: dict[tuple[str, ArrayShard], list[str]] = {}
        for name in sorted(store.names()):
            if name.startswith(f'seam-{blocks.run_id}-'):
                for place in seam_places(store, name):
                    seams.setdefault(place, []).append(name)
        for name, places in itertools.groupby(sorted(seams), lambda place: place[0]):
            group = self._begun(name)
            for place in places:
                kept = (read_seam(store, seam, place) for seam in seams[place])
                put_cells(group, place[1], kept)

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


def _attributes(provenance: Mapping[str, Any]) -> dict[str, Any]:
    terms = {key: v for key, v in provenance.items() if key.startswith('emb:')}
    # As text, which xarray can write to any format.
    return {**terms, PROVENANCE_KEY: to_json(provenance)}


def _by_crs(chips: RunChips) -> dict[str, Ints]:
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
    rows = pa.concat_tables([fit(table, schema) for table in tables])
    if rows['point_id'].null_count == len(rows):
        rows = rows.drop_columns('point_id')
    return rows


def _chips_at(path: Place) -> Place:
    return path / CHIPS_FILE


def _group_at(path: Place, crs: str) -> Group:
    """Open the array of a CRS to read it.

    Raises:
        SourceError: If it is not there, or damaged.
    """
    url = f'{str(path).rstrip("/")}/{group_name(crs)}'
    try:
        group = Group.open(url)
    except OutputError as error:
        raise SourceError(str(error)) from error
    if group is None:
        raise SourceError(
            f"{path}: there is no group '{group_name(crs)}', in which the chips in "
            f'{crs} should be: make the output anew'
        )
    return group


def _records(chips: pd.DataFrame) -> NDArray[Any]:
    """Return the corners and times of chips as :meth:`.Layout.place` takes them."""
    columns = {
        'x': chips['minx'].to_numpy(),
        'y': chips['maxy'].to_numpy(),
        **{name: _nanoseconds(chips[name]) for name in ('start', 'end')},
    }
    return pd.DataFrame(columns).to_records(index=False)


def _nanoseconds(times: pd.Series) -> Ints:
    """Return times as nanoseconds since 1970, :data:`OPEN` for those that miss."""
    utc = pd.to_datetime(times, utc=True).dt.tz_localize(None)
    # NumPy and pandas keep NaT as the least number, which is OPEN.
    return utc.to_numpy('datetime64[ns]').astype(np.int64)
