"""Grids of chips with made-up feature maps, and what a mosaic of them must hold."""

import json
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import rasterio
import xarray as xr
from rasterio.transform import from_origin

from dynamicvis_geo.callbacks.blocks import (
    DESCRIPTION_FILE,
    BlockPlan,
    block_name,
    describe,
    finished,
    make_plan,
    read_description,
    share,
)
from dynamicvis_geo.callbacks.output import Merged, join_blocks
from dynamicvis_geo.callbacks.shards import Shard
from dynamicvis_geo.datasets.chips import ChipDataset
from dynamicvis_geo.datasets.source import ChipFailure
from dynamicvis_geo.formats.base import OpenRun, Predictions
from dynamicvis_geo.formats.block_files import SUFFIX, encode_block
from dynamicvis_geo.formats.zarr import Zarr
from dynamicvis_geo.store import Location
from tests.callbacks.test_blocks import begin

D = 3
ALL = Shard()
NOW = datetime(2024, 5, 6, tzinfo=UTC)
PROVENANCE = {
    'model': {'weights': 'random'},
    'source': {'images': 'made up'},
    'processing:software': {'dynamicvis-geo': '0.1.0'},
}


def scene(
    folder: Path,
    name: str = 'S2_20240601.tif',
    crs: str = 'EPSG:32618',
    corner: tuple[float, float] = (499200.0, 4500480.0),
    shape: tuple[int, int] = (96, 128),
    res: float = 10.0,
) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    with rasterio.open(
        folder / name,
        'w',
        driver='GTiff',
        dtype='uint8',
        count=1,
        height=shape[0],
        width=shape[1],
        crs=crs,
        transform=from_origin(*corner, res, res),
    ) as image:
        image.write(np.ones((1, *shape), np.uint8))


def feature_map(chip_id: str, cells: int = 4) -> np.ndarray:
    """A map that only this chip has."""
    generator = np.random.default_rng(list(chip_id.encode()))
    return generator.standard_normal((D, cells, cells)).astype(np.float32)


class Run:
    """One process of a run: what a writer does with a format."""

    def __init__(
        self,
        target: Path | str,
        chips: ChipDataset,
        block_chips: int = 4,
        fails: Collection[int] = (),
        cells: int = 4,
        dtype: str = 'float32',
        provenance: Mapping[str, Any] = PROVENANCE,
    ) -> None:
        self.chips, self.fails, self.cells = chips, set(fails), cells
        self.format = Zarr(str(target), dtype)
        self.target = Location.of(str(target))
        self.store = self.target.blocks
        self.format.check(chips)
        there = read_description(self.store)
        left_out = chips.among(self.format.held()) if there is None else there.left_out
        settings = {'dtype': dtype}
        plan = self._plan(block_chips, left_out)
        self.run = begin(self.store, describe(plan, settings, provenance))
        self.plan = self._plan(block_chips, self.run.left_out)
        assert self.plan.fingerprint == self.run.plan
        self.work = OpenRun(
            self.store,
            self.run.id,
            self.run.provenance,
            chips,
            self.plan.block_of(len(chips.table)),
            self.plan.square,
        )

    def _plan(self, block_chips: int, left_out: Any) -> BlockPlan:
        return make_plan(
            self.chips.table,
            self.chips.source_crs,
            block_chips,
            strides=self.chips.strides,
            origins=self.format.origins(self.chips),
            point_ids=self.chips.point_ids,
            left_out=left_out,
        )

    def predictions(self, rows: Sequence[int]) -> Predictions:
        """What a model gives for some chips, in another order."""
        failures: tuple[ChipFailure, ...] = tuple(
            ChipFailure(int(row), 'NoImageryError', 'nothing there')
            for row in rows
            if row in self.fails
        )
        rows = [int(row) for row in rows if row not in self.fails][::-1]
        ids = self.chips.rows(rows)['chip_id']
        maps = np.zeros((len(rows), D, self.cells, self.cells), np.float32)
        for i, name in enumerate(ids):
            maps[i] = feature_map(name, self.cells)
        valid = np.abs(np.tanh(maps[:, 0, 0, 0]))
        return Predictions(np.array(rows, np.int64), maps, valid, failures)

    def block(self, number: int) -> None:
        block = self.plan.block(number)
        predictions = self.predictions(block.tolist())
        if len(predictions.chip):
            self.format.write_maps(self.work, number, [predictions])
        content = encode_block(self.chips, block, [predictions], NOW, None)
        name = block_name(self.run, number, SUFFIX)
        self.store.put(name, memoryview(content))

    def do(self, shard: Shard = ALL, numbers: Iterable[int] | None = None) -> None:
        if numbers is None:
            numbers = share(finished(self.store, self.run, SUFFIX), shard).tolist()
        for number in numbers:
            self.block(number)

    def merge(self, partial: bool = False) -> Merged:
        return join_blocks(self.format, self.target, self.run, partial)

    def end(self) -> Merged:
        merged = self.merge()
        self.store.clear(DESCRIPTION_FILE)
        return merged

    def seams(self) -> list[str]:
        return [name for name in self.store.names() if name.startswith('seam-')]


def drive(target: Path, chips: ChipDataset, shards: int = 1, **options: Any) -> Path:
    """Do a run, shard by shard, with the last one first."""
    for index in reversed(range(shards)):
        run = Run(target, chips, **options)
        run.do(Shard(index, shards))
    run.end()
    return target


def expected(
    ds: Any,
    rows: gpd.GeoDataFrame,
    cells: int = 4,
    dtype: str = 'float32',
    fails: Collection[int] = (),
) -> np.ndarray:
    """What each cell must hold: chip by chip, from the bounds of the chips."""
    array = np.full(tuple(ds.sizes[n] for n in ('time', 'embedding', 'y', 'x')), np.nan)
    starts = [None if pd.isna(t) else pd.Timestamp(t) for t in ds['time'].values]
    x, y = np.meshgrid(ds['x'].values, ds['y'].values)
    for t, start in enumerate(starts):
        owner = np.full(x.shape, -1)
        # Of the owner: distance of the centre, place from the north and from the west.
        best = np.full((3, *x.shape), np.inf)
        for n, chip in enumerate(rows.itertuples()):
            if start != (None if pd.isna(chip.start) else chip.start):
                continue
            inside = (chip.minx < x) & (x < chip.maxx)
            inside &= (chip.miny < y) & (y < chip.maxy)
            centre = (chip.minx + chip.maxx) / 2, (chip.miny + chip.maxy) / 2
            away = np.round((x - centre[0]) ** 2 + (y - centre[1]) ** 2, 3)
            closer = away < best[0]
            for key, value in ((1, -chip.maxy), (2, chip.minx)):
                equal = (away == best[0]) & (best[1:key] == -chip.maxy).all(axis=0)
                closer |= equal & (value < best[key])
            closer &= inside
            owner[closer] = n
            best[0][closer] = away[closer]
            best[1][closer], best[2][closer] = -chip.maxy, chip.minx
        for n, chip in enumerate(rows.itertuples()):
            mine = owner == n
            if n in fails or not mine.any():
                continue
            features = feature_map(chip.chip_id, cells).astype(dtype)
            down = (chip.maxy - y[mine]) / (chip.maxy - chip.miny) * cells
            across = (x[mine] - chip.minx) / (chip.maxx - chip.minx) * cells
            array[t][:, mine] = features[:, down.astype(int), across.astype(int)]
    return array


def open_group(target: Path, group: str = 'EPSG_32618') -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return xr.open_zarr(target, group=group, chunks=None)


def content(folder: Path) -> dict[str, Any]:
    # Older zarr writes the members of a group in any order.
    return {
        str(file.relative_to(folder)): json.loads(file.read_bytes())
        if file.suffix == '.json'
        else file.read_bytes()
        for file in sorted(folder.rglob('*'))
        # A process that is killed leaves what it was writing.
        if file.is_file() and not file.name.endswith('.partial')
    }


def assert_same(one: Path, two: Path) -> None:
    a, b = content(one), content(two)
    assert list(a) == list(b)
    assert [name for name in a if a[name] != b[name]] == []
