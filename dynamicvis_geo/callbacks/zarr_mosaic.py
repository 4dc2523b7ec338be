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
the northernmost, and of these of the westernmost. Only chips that are finished count:
what a missing chip would have covered is filled by its neighbours as far as they
reach. The result depends neither on the order of the chips nor on who wrote them.

While a run goes on, finished chips are staged in the hidden folder ``.staging`` inside
the store, one file for each flush of a process. At the end the shards of all arrays
are divided among the processes, so that no two write the same file. An array that is
there already is filled further; if chips reach beyond it, it is laid out anew and what
it held is copied.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyproj import CRS

from dynamicvis_geo.callbacks.finished_maps import (
    CHIPS_FILE,
    STAGING,
    FinishedMaps,
    StagedMaps,
    finished_ids,
    staged_batch,
    staged_name,
    write_staged,
)
from dynamicvis_geo.callbacks.geoparquet import write_geoparquet
from dynamicvis_geo.callbacks.mosaic import ChipGrid, Layout, open_times
from dynamicvis_geo.callbacks.predictions import ChipTable, Predictions
from dynamicvis_geo.callbacks.run_folder import write_atomically
from dynamicvis_geo.callbacks.sink import Job
from dynamicvis_geo.callbacks.zarr_assembly import (
    Mosaic,
    find_group,
    plan_mosaics,
    replaced_folder,
)
from dynamicvis_geo.callbacks.zarr_group import (
    consolidate,
    create_array,
    create_group,
    move_shards,
    read_layout,
    require_zarr,
    update_attributes,
    write_shard,
)
from dynamicvis_geo.datasets.chip_ids import crs_name
from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.provenance import (
    METADATA_FILE,
    PROVENANCE_KEY,
    describe_embeddings,
    to_json,
)

#: Rows of a row group of the table of chips.
_ROW_GROUP = 50_000


@runtime_checkable
class PlacedChips(ChipTable, Protocol):
    """The part of :class:`~dynamicvis_geo.datasets.ChipDataset` that placing uses."""

    @property
    def table(self) -> npt.NDArray[np.void]:
        """All chips as plain numbers, type :data:`~.chip_table.CHIP`."""

    @property
    def source_crs(self) -> list[CRS]:
        """CRS of each source."""


class ZarrMosaic:
    """Writes feature maps into one Zarr array a CRS; see :class:`~.sink.Sink`."""

    output: ClassVar[str] = 'grid'
    dtypes: ClassVar[tuple[str, ...]] = ('float32', 'float16')
    metadata: ClassVar[str] = METADATA_FILE
    members: ClassVar[tuple[str, ...]] = ('*',)

    def __init__(self, job: Job) -> None:
        """Prepare to write.

        Raises:
            OutputError: If the package zarr is missing, or the chips, together with
                those that the output holds, fit no common grid.
        """
        require_zarr()
        self._job = job
        self._planned = _planned(job.chips)
        self._grids, self._old = self._prepare()
        known = (layout.dimensions for layout in self._old.values())
        self._dimensions = next(known, job.dimensions)
        self._maps: dict[str, tuple[int, int, int]] = {}
        self._batches: list[pa.RecordBatch] = []
        self._flushed = 0
        count = 0 if job.chips is None else len(_placed(job.chips).table)
        self._taken = np.zeros(count, bool)

    @classmethod
    def recover(cls, target: Path) -> None:
        """Nothing: :meth:`complete` does again what was left half done."""

    @classmethod
    def finished(cls, target: Path) -> pa.StringArray:
        """Ids of the chips that are on disk already, without repetition."""
        return finished_ids(target)

    def write(self, predictions: Predictions) -> None:
        """Take one batch.

        Raises:
            OutputError: If the feature maps fit no common grid, differ from those
                before, or have values that the type cannot hold.
        """
        chips = self._job.chips
        if chips is None:
            raise RuntimeError('predictions without a chip table')
        new = ~self._taken[predictions.chip]
        if not new.any():
            return
        rows = chips.rows(predictions.chip[new])
        maps = _cast(predictions.embedding[new], self._job.dtype)
        for crs in rows['crs'].unique():
            self._check_maps(crs, maps.shape[1:])
        valid = predictions.valid_fraction
        valid = None if valid is None else valid[new]
        self._batches.append(staged_batch(rows, maps, valid))
        self._taken[predictions.chip[new]] = True

    def flush(self) -> None:
        """Have on disk, in the staging folder, all that was taken."""
        staging = self._job.target / STAGING
        while self._batches:
            # Models may give feature maps of another shape for another CRS.
            schema = self._batches[0].schema
            alike = [b for b in self._batches if b.schema.equals(schema, True)]
            staging.mkdir(parents=True, exist_ok=True)
            name = staged_name(self._job.run, self._job.rank, self._flushed)
            write_staged(staging / name, alike)
            self._flushed += 1
            written = {id(batch) for batch in alike}
            self._batches = [b for b in self._batches if id(b) not in written]

    def assemble(self) -> None:
        """Write this process' share of the shards, into a folder of its own."""
        job = self._job
        if job.rank == 0:
            self._remove_old_assemblies()
        folder = self._assembly / str(job.rank)
        if folder.exists():
            shutil.rmtree(folder)
        finished = FinishedMaps.of(job.target)
        staged = StagedMaps(finished)
        mosaics = self._mosaics(finished)
        work = [(mosaic, shard) for mosaic in mosaics for shard in mosaic.shards]
        share = np.array_split(np.arange(len(work)), job.world_size)[job.rank]
        arrays: dict[str, Any] = {}
        for i in share.tolist():
            mosaic, shard = work[i]
            group = folder / mosaic.name
            if mosaic.name not in arrays:
                arrays[mosaic.name] = create_array(group, mosaic.layout)
            block = mosaic.block(shard, finished, staged)
            write_shard(arrays[mosaic.name], group, shard, block)
            staged.close()

    def complete(self) -> None:
        """Put the shards of all processes in place, and describe them."""
        target = self._job.target
        target.mkdir(parents=True, exist_ok=True)
        for pattern in ('*.partial', '*/*.partial'):
            for file in target.glob(pattern):  # What a killed run has left.
                file.unlink()
        finished = FinishedMaps.of(target)
        if finished.shapes:
            self._dimensions = finished.shapes[0][0]
        for mosaic in self._mosaics(finished):
            if mosaic.base is not None and mosaic.layout == mosaic.old:
                self._fill(mosaic, mosaic.base)
            else:
                self._replace(mosaic)
        self._write_chips(finished)
        text = to_json(self._provenance(), indent=2)
        write_atomically(target / METADATA_FILE, f'{text}\n'.encode())
        zarr = require_zarr()
        zarr.open_group(str(target), mode='a', zarr_format=3, use_consolidated=False)
        consolidate(target)
        if (target / STAGING).exists():
            shutil.rmtree(target / STAGING)

    @property
    def _assembly(self) -> Path:
        return self._job.target / STAGING / f'assembled-{self._job.run}'

    def _remove_old_assemblies(self) -> None:
        for folder in (self._job.target / STAGING).glob('assembled-*'):
            if folder != self._assembly:
                shutil.rmtree(folder)

    def _prepare(self) -> tuple[dict[str, ChipGrid], dict[str, Layout]]:
        """Refuse as early as possible chips that cannot be mosaicked."""
        finished = FinishedMaps.of(self._job.target)
        grids, old = {}, {}
        for crs in sorted({*self._planned, *finished.crs}):
            base = find_group(self._job.target, crs)
            chips = [self._planned.get(crs), finished.of_crs(crs)]
            if base is not None:
                old[crs] = read_layout(base)
                chips.append(old[crs].corner)
            grid = ChipGrid.of(crs, np.concatenate([c for c in chips if c is not None]))
            if self._job.chips is not None and 'point_id' in self._job.chips.rows(
                np.empty(0, np.int64)
            ):
                grid.check_points()
            if crs in old:
                grid.check_cells(old[crs].map_size)
            grids[crs] = grid
        return grids, old

    def _check_maps(self, crs: str, shape: tuple[int, ...]) -> None:
        dimensions, height, width = shape
        maps = (dimensions, height, width)
        known = self._maps.get(crs)
        if known == maps:
            return
        if known is not None:
            raise OutputError(
                f'feature maps of the chips in {crs} have different shapes, {known} '
                f'and {maps} (D, h, w): one Zarr array needs one shape'
            )
        self._grids[crs].check_cells((height, width))
        if crs in self._old:
            self._old[crs].check_same(crs, maps, self._job.dtype)
        self._maps[crs] = maps
        self._dimensions = dimensions

    def _mosaics(self, finished: FinishedMaps) -> list[Mosaic]:
        job = self._job
        return plan_mosaics(job.target, finished, self._planned, job.dtype)

    def _fill(self, mosaic: Mosaic, group: Path) -> None:
        """Put shards into a group that stays."""
        self._gather(mosaic, group)
        update_attributes(group, self._attributes())
        consolidate(group)

    def _replace(self, mosaic: Mosaic) -> None:
        """Put a new group in its place, complete at once."""
        new = self._assembly / 'new' / mosaic.name
        create_group(new, mosaic.layout, mosaic.crs, self._attributes())
        self._gather(mosaic, new)
        consolidate(new)
        group = self._job.target / mosaic.name
        old = replaced_folder(self._job.target) / mosaic.name
        if group.exists():
            old.parent.mkdir(parents=True, exist_ok=True)
            if old.exists():
                shutil.rmtree(old)
            os.rename(group, old)
        os.rename(new, group)

    def _gather(self, mosaic: Mosaic, group: Path) -> None:
        for rank in range(self._job.world_size):
            move_shards(self._assembly / str(rank) / mosaic.name, group)

    def _write_chips(self, finished: FinishedMaps) -> None:
        keys = [('crs', 'ascending'), ('start', 'ascending'), ('maxy', 'descending')]
        table = finished.table.sort_by([*keys, ('minx', 'ascending')])
        if table['point_id'].null_count == len(table):
            table = table.drop_columns('point_id')
        write_geoparquet(
            self._job.target / CHIPS_FILE, table, self._provenance(), _ROW_GROUP
        )

    def _provenance(self) -> dict[str, Any]:
        described = describe_embeddings('pixel', self._dimensions)
        return {**self._job.provenance, **described, 'data_type': self._job.dtype}

    def _attributes(self) -> Mapping[str, Any]:
        provenance = self._provenance()
        terms = {key: v for key, v in provenance.items() if key.startswith('emb:')}
        # As text, which xarray can write to any format.
        return {**terms, PROVENANCE_KEY: to_json(provenance)}


def _placed(chips: ChipTable) -> PlacedChips:
    if not isinstance(chips, PlacedChips):
        raise OutputError(
            f'cannot place the chips of {type(chips).__name__} in a Zarr array: give '
            'the predict dataloader a ChipDataset'
        )
    return chips


def _planned(chips: ChipTable | None) -> dict[str, npt.NDArray[np.void]]:
    """Return the chips of a run by the name of their CRS."""
    if chips is None:
        return {}
    placed = _placed(chips)
    table = open_times(placed.table)
    names = np.array([crs_name(crs) for crs in placed.source_crs], dtype=object)
    sources = np.unique(table['source'])
    return {
        name: table[np.isin(table['source'], np.flatnonzero(names == name))]
        for name in sorted(set(names[sources]))
    }


def _cast(maps: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    with np.errstate(over='ignore'):
        cast = maps.astype(dtype)
    if dtype == 'float16' and (np.isinf(cast) & np.isfinite(maps)).any():
        raise OutputError(
            f"dtype='float16' cannot hold features of {np.nanmax(np.abs(maps)):g}: use "
            "dtype='float32'"
        )
    return cast
