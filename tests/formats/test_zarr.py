"""Feature maps mosaicked into Zarr, against an oracle made from the bounds of chips."""

import json
import os
import shutil
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from rasterio.transform import from_origin

from dynamicvis_geo.callbacks.existing import check_place
from dynamicvis_geo.callbacks.shards import Shard
from dynamicvis_geo.datasets.chips import ChipDataset
from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.false_colour import plot_false_colours
from dynamicvis_geo.formats import zarr_layout
from dynamicvis_geo.formats.zarr import Zarr
from dynamicvis_geo.outputs import Output, open_output
from dynamicvis_geo.provenance import read_provenance
from dynamicvis_geo.report import write_report
from dynamicvis_geo.samplers import GridSampler, PointSampler
from tests.formats.conftest import DatedImages, UndatedImages
from tests.formats.mosaics import (
    PROVENANCE,
    D,
    Run,
    assert_same,
    content,
    drive,
    expected,
    open_group,
    scene,
)
from tests.processes import HANG

xr = pytest.importorskip('xarray')
zarr = pytest.importorskip('zarr')
pytest.importorskip('zarr_cm')
pytest.importorskip('rioxarray')

OLDER = Path(__file__).parents[1] / 'data/outputs/maps-before-blocks.zarr.tar.gz'
SMALL = {'CHUNK_BYTES': (1, 2**20), 'SHARD_BYTES': 500}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards for the little that tests write."""
    for name, value in SMALL.items():
        monkeypatch.setattr(zarr_layout, name, value)


@pytest.fixture
def grid(tmp_path: Path) -> Callable[..., ChipDataset]:
    """Chips of 32 pixels on a grid over one scene of 96 x 128 pixels."""

    def make(
        stride: int | None = None,
        size: int = 32,
        skip: Sequence[str] = (),
        roi: Any = None,
        names: Sequence[str] = ('S2_20240601.tif',),
        squares: bool = True,
        **options: Any,
    ) -> ChipDataset:
        folder = tmp_path / '-'.join(names)
        for name in names:
            scene(folder, name, **options)
        dated = all('_2' in name for name in names)
        dataset = (DatedImages if dated else UndatedImages)(folder)
        sampler = GridSampler(dataset, size, stride, roi=roi, edge='drop')
        # Of mere slices nobody knows the stride: their blocks are no squares.
        pairs = [(dataset, sampler if squares else list(sampler))]
        return ChipDataset(pairs, skip=skip)

    return make


def test_xarray_and_rioxarray_find_every_cell_in_its_place(
    tmp_path: Path, grid: Callable[..., ChipDataset]
) -> None:
    chips = grid()
    target = drive(tmp_path / 'out.zarr', chips)
    ds = open_group(target)
    assert list(ds.data_vars) == ['embeddings']
    assert ds['embeddings'].dims == ('time', 'embedding', 'y', 'x')
    assert ds['embeddings'].shape == (1, D, 12, 16)
    assert ds['embeddings'].dtype == np.float32
    assert ds.rio.crs == 'EPSG:32618'
    assert ds['embeddings'].rio.crs == 'EPSG:32618'
    assert ds.rio.transform() == from_origin(499200, 4500480, 80, 80)
    assert ds.rio.transform(recalc=True) == from_origin(499200, 4500480, 80, 80)
    assert ds.rio.bounds() == (499200, 4499520, 500480, 4500480)
    assert ds['time'].values[0] == np.datetime64('2024-06-01')
    assert ds['time_bounds'].values[0, 1] == np.datetime64('2024-06-01T23:59:59.999999')
    np.testing.assert_array_equal(ds['embeddings'], expected(ds, chips.chips))
    assert not np.isnan(ds['embeddings']).any()
    away = ds['embeddings'].isel(time=0).rio.reproject('EPSG:4326')
    assert away.rio.bounds()[0] == pytest.approx(-75.0, abs=0.01)


def test_what_is_in_the_folder(
    tmp_path: Path, grid: Callable[..., ChipDataset]
) -> None:
    chips = grid()
    target = drive(tmp_path / 'out.zarr', chips)
    assert sorted(path.name for path in target.iterdir()) == [
        'EPSG_32618',
        'chips.parquet',
        'metadata.json',
        'zarr.json',
    ]
    table = gpd.read_parquet(target / 'chips.parquet')
    rows = chips.chips
    assert sorted(table['id']) == sorted(rows['chip_id'])
    assert table.crs == 'EPSG:4326'
    same = table.set_index('id').loc[rows['chip_id']]
    assert shapely.equals_exact(same.geometry.values, rows.geometry.values, 1e-9).all()
    assert (same['start'].dt.tz_localize(None).values == rows['start'].values).all()
    assert (same['crs'] == 'EPSG:32618').all()
    assert same['valid_fraction'].between(0, 1).all()
    assert 'point_id' not in table
    provenance = read_provenance(target)
    assert provenance['model'] == PROVENANCE['model']
    assert provenance['emb:dimensions'] == D
    assert provenance['data_type'] == 'float32'
    attributes = open_group(target).attrs
    assert json.loads(attributes['dynamicvis_geo']) == provenance
    assert attributes['emb:type'] == 'pixel'
    metadata = json.loads((target / 'EPSG_32618' / 'zarr.json').read_text())
    assert 'embeddings' in metadata['consolidated_metadata']['metadata']
    (codec,) = metadata['consolidated_metadata']['metadata']['embeddings']['codecs']
    assert codec['name'] == 'sharding_indexed'
    assert codec['configuration']['codecs'][1]['name'] == 'zstd'


@pytest.mark.parametrize('stride', [8, 16, 24, 40])
def test_chip_centres_win(
    tmp_path: Path, grid: Callable[..., ChipDataset], stride: int
) -> None:
    chips = grid(stride)
    ds = open_group(drive(tmp_path / 'out.zarr', chips))
    np.testing.assert_array_equal(ds['embeddings'], expected(ds, chips.chips))


def test_failed_chips_leave_their_cells_empty_until_they_are_done(
    tmp_path: Path, grid: Callable[..., ChipDataset]
) -> None:
    chips = grid(16)
    fails = range(0, len(chips), 3)
    target = drive(tmp_path / 'out.zarr', chips, fails=fails)
    ds = open_group(target)
    array = expected(ds, chips.chips, fails=fails)
    np.testing.assert_array_equal(ds['embeddings'], array)
    listed = gpd.read_parquet(tmp_path / 'out.failures.parquet')
    assert len(listed) == len(fails)
    retry = Run(target, chips)
    assert sorted(retry.plan.rows) == list(fails)
    retry.do()
    assert retry.end().rows == len(fails)
    assert not (tmp_path / 'out.failures.parquet').exists()
    ds = open_group(target)
    np.testing.assert_array_equal(ds['embeddings'], expected(ds, chips.chips))
    assert len(gpd.read_parquet(target / 'chips.parquet')) == len(chips)


@pytest.mark.parametrize('shards', [2, 50])
@pytest.mark.parametrize('stride', [16, 24, 32])
def test_shards_make_no_difference(
    tmp_path: Path, grid: Callable[..., ChipDataset], shards: int, stride: int
) -> None:
    chips = grid(stride)
    one = drive(tmp_path / 'one.zarr', chips)
    many = drive(tmp_path / 'many.zarr', chips, shards=shards)
    assert len(list(one.rglob('c/*/*/*/*'))) > 3
    assert_same(one, many)


@pytest.fixture
def large(tmp_path: Path) -> Callable[..., ChipDataset]:
    """19 x 22 chips of 8 pixels and 4 cells, not from a corner of a square."""

    def make(stride: int | tuple[int, int]) -> ChipDataset:
        folder = tmp_path / 'large'
        down, across = np.broadcast_to(stride, 2).tolist()
        shape = 18 * down + 8, 21 * across + 8
        scene(folder, shape=shape, corner=(499200.0 - 70 * across, 4500480 + 30 * down))
        dataset = DatedImages(folder)
        sampler = GridSampler(dataset, 8, stride, edge='drop')
        return ChipDataset([(dataset, sampler)])

    return make


#: More of what work is divided into: 4 chips a side a block.
BLOCK = 16
#: Bytes of a chip of 4 x 4 cells, twice two chips a side.
SHARDS_OF_FOUR = 4 * 4 * 4 * D * 4


@pytest.mark.parametrize('stride', [8, 6, 2, (4, 8), 16])
def test_blocks_of_a_grid_write_whole_shards(
    tmp_path: Path,
    large: Callable[..., ChipDataset],
    monkeypatch: pytest.MonkeyPatch,
    stride: int | tuple[int, int],
) -> None:
    monkeypatch.setattr(zarr_layout, 'SHARD_BYTES', SHARDS_OF_FOUR)
    chips = large(stride)
    run = Run(tmp_path / 'out.zarr', chips, BLOCK)
    assert len(run.plan) > 9
    run.do()
    assert run.seams() == []
    run.end()
    ds = open_group(tmp_path / 'out.zarr')
    filled = np.isfinite(ds['embeddings'].values[0, 0])
    # What is empty lies in the north and west.
    margin = np.argmax(filled.any(axis=1)), np.argmax(filled.any(axis=0))
    apart = np.broadcast_to(stride, 2)
    for i, name in enumerate(('y', 'x')):
        assert 17 * margin[i] <= ds.sizes[name]
        assert margin[i] == 0 or apart[i] < 8
    maps = {name: n for n, name in enumerate(chips.chips['chip_id'])}
    assert len(maps) == len(chips)
    assert filled[margin[0] :, margin[1] :].all() == (stride != 16)
    assert_chip_centres_win(ds, chips)


def assert_chip_centres_win(ds: Any, chips: ChipDataset) -> None:
    """Compare some cells with the oracle: it is slow."""
    rng = np.random.default_rng(0)
    rows = chips.chips
    for _ in range(5):
        y, x = (int(rng.integers(0, ds.sizes[n] - 6)) for n in ('y', 'x'))
        part = ds.isel(y=slice(y, y + 6), x=slice(x, x + 6))
        west, east = (float(part['x'][i]) for i in (0, -1))
        north, south = (float(part['y'][i]) for i in (0, -1))
        near = rows[
            (rows['minx'] < east)
            & (rows['maxx'] > west)
            & (rows['miny'] < north)
            & (rows['maxy'] > south)
        ]
        np.testing.assert_array_equal(part['embeddings'], expected(part, near))


@pytest.mark.parametrize('stride', [16, 24, 32])
def test_seams_are_joined(
    tmp_path: Path,
    grid: Callable[..., ChipDataset],
    monkeypatch: pytest.MonkeyPatch,
    stride: int,
) -> None:
    monkeypatch.setattr(zarr_layout, 'SHARD_BYTES', SHARDS_OF_FOUR)
    chips = grid(stride, squares=False)
    run = Run(tmp_path / 'out.zarr', chips, 5)
    run.do()
    assert len(run.seams()) > 1
    run.end()
    ds = open_group(tmp_path / 'out.zarr')
    np.testing.assert_array_equal(ds['embeddings'], expected(ds, chips.chips))


@pytest.mark.parametrize('stride', [8, 12, 16])
def test_ragged_edges(
    tmp_path: Path,
    grid: Callable[..., ChipDataset],
    monkeypatch: pytest.MonkeyPatch,
    stride: int,
) -> None:
    monkeypatch.setattr(zarr_layout, 'SHARD_BYTES', SHARDS_OF_FOUR)
    hole = shapely.box(499500, 4499900, 499700, 4500100)
    roi = shapely.Point(499900, 4500000).buffer(500).difference(hole)
    chips = grid(stride, size=16, roi=roi, shape=(128, 160))
    ds = open_group(drive(tmp_path / 'out.zarr', chips, block_chips=BLOCK))
    np.testing.assert_array_equal(ds['embeddings'], expected(ds, chips.chips))


def test_two_sources_in_one_place(
    tmp_path: Path,
    grid: Callable[..., ChipDataset],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zarr_layout, 'SHARD_BYTES', SHARDS_OF_FOUR)
    dataset = grid().datasets[0]
    # Three rows of chips each.
    halves = shapely.box(0, 4500000, 1e6, 1e7), shapely.box(0, 0, 1e6, 4500000)
    pairs = [(dataset, GridSampler(dataset, 16, roi=half)) for half in halves]
    chips = ChipDataset(pairs)
    run = Run(tmp_path / 'out.zarr', chips, BLOCK)
    run.do()
    assert 0 < len(run.seams()) < len(run.plan)
    run.end()
    ds = open_group(tmp_path / 'out.zarr')
    np.testing.assert_array_equal(ds['embeddings'], expected(ds, chips.chips))
    assert len(gpd.read_parquet(tmp_path / 'out.zarr/chips.parquet')) == len(chips)


def test_zones_and_times(tmp_path: Path) -> None:
    pairs = []
    places = ('EPSG:32618', (499200.0, 4500480.0)), ('EPSG:32719', (3.2e5, 8e6))
    for zone, corner in places:
        folder = tmp_path / zone[-5:]
        for date in ('20240601', '20230601'):
            scene(folder, f'S2_{date}.tif', zone, corner, (64, 64))
        dataset = DatedImages(folder)
        pairs.append((dataset, GridSampler(dataset, 32)))
    chips = ChipDataset(pairs)
    assert len(chips) == 16
    target = drive(tmp_path / 'out.zarr', chips, shards=2)
    rows = chips.chips
    for zone in ('EPSG:32618', 'EPSG:32719'):
        ds = open_group(target, zone.replace(':', '_'))
        assert ds.rio.crs == zone
        years = [2023, 2024]
        assert pd.DatetimeIndex(ds['time'].values).year.tolist() == years
        array = expected(ds, rows[rows['crs'] == zone])
        np.testing.assert_array_equal(ds['embeddings'], array)
    tree = xr.open_datatree(target, engine='zarr', chunks=None)
    assert set(tree.children) == {'EPSG_32618', 'EPSG_32719'}
    assert len(gpd.read_parquet(target / 'chips.parquet')) == 16


def test_undated_chips_share_one_time(
    tmp_path: Path, grid: Callable[..., ChipDataset]
) -> None:
    chips = grid(names=('image.tif',))
    ds = open_group(drive(tmp_path / 'out.zarr', chips))
    assert np.isnat(ds['time'].values).tolist() == [True]
    assert np.isnat(ds['time_bounds'].values).all()
    np.testing.assert_array_equal(ds['embeddings'], expected(ds, chips.chips))
    assert gpd.read_parquet(tmp_path / 'out.zarr/chips.parquet')['start'].isna().all()


def test_projection_without_authority_and_cells_of_part_of_a_pixel(
    tmp_path: Path, grid: Callable[..., ChipDataset]
) -> None:
    crs = '+proj=laea +lat_0=10 +lon_0=20 +datum=WGS84 +units=m'
    # Chips of 24 pixels have cells of 4.8 pixels.
    chips = grid(size=24, crs=crs, corner=(-1000.5, 333.25), res=0.1, shape=(72, 72))
    target = drive(tmp_path / 'out.zarr', chips, cells=5)
    (group,) = (path.name for path in target.iterdir() if path.is_dir())
    ds = open_group(target, group)
    assert ds.rio.crs == rasterio.CRS.from_string(crs)
    assert ds.rio.crs == ds.attrs['proj:wkt2']
    assert ds.rio.resolution() == pytest.approx((0.48, -0.48))
    np.testing.assert_array_equal(ds['embeddings'], expected(ds, chips.chips, 5))


def test_float16(tmp_path: Path, grid: Callable[..., ChipDataset]) -> None:
    chips = grid(16)
    fails = range(3, 9)
    target = drive(tmp_path / 'out.zarr', chips, dtype='float16', fails=fails)
    ds = open_group(target)
    assert ds['embeddings'].dtype == np.float16
    array = expected(ds, chips.chips, dtype='float16', fails=fails)
    np.testing.assert_array_equal(ds['embeddings'], array)
    assert read_provenance(target)['data_type'] == 'float16'
    run = Run(tmp_path / 'b.zarr', chips, dtype='float16')
    first = run.predictions(run.plan.block(0)[:1].tolist())
    large = replace(first, embedding=np.full((1, D, 4, 4), 1e5, np.float32))
    with pytest.raises(OutputError, match="float16' cannot hold features of 100000"):
        run.format.write_maps(run.work, 0, [large])
    with pytest.raises(OutputError, match='3 x 4 x 4 float16'):
        drive(target, chips)


def test_nothing_to_write(tmp_path: Path, grid: Callable[..., ChipDataset]) -> None:
    cases = ('a', ChipDataset([]), ()), ('b', grid(), range(12))
    for name, chips, fails in cases:
        target = drive(tmp_path / f'{name}.zarr', chips, 2, fails=fails)
        assert Zarr(str(target), 'float32').held().to_pylist() == []
        assert len(gpd.read_parquet(target / 'chips.parquet')) == 0
        assert list(xr.open_datatree(target, engine='zarr').children) == []
    drive(target, grid())
    assert len(Zarr(str(target), 'float32').held()) == 12
    assert read_provenance(target)['emb:dimensions'] == D


def test_what_is_begun_may_be_overwritten(
    tmp_path: Path, grid: Callable[..., ChipDataset]
) -> None:
    run = Run(tmp_path / 'out.zarr', grid())
    run.block(0)
    check_place(tmp_path / 'out.zarr', run.format, overwrite=True)


def test_a_part_is_joined_and_the_run_goes_on(
    tmp_path: Path, grid: Callable[..., ChipDataset]
) -> None:
    chips = grid(16)
    target = tmp_path / 'out.zarr'
    run = Run(target, chips)
    run.do(Shard(1, 3))
    with pytest.raises(OutputError, match='lacks'):
        run.merge()
    merged = run.merge(partial=True)
    assert merged.missing == len(run.plan) - len(range(1, len(run.plan), 3))
    ds = open_group(target)
    done = np.concatenate([run.plan.block(n) for n in range(1, len(run.plan), 3)])
    assert merged.rows == len(done) == len(run.format.held())
    fails = np.setdiff1d(np.arange(len(chips)), done).tolist()
    array = expected(ds, chips.chips, fails=fails)
    np.testing.assert_array_equal(ds['embeddings'], array)
    # Another process, which finds chips in the store that are in the plan.
    again = Run(target, chips)
    again.do()
    again.end()
    assert_same(target, drive(tmp_path / 'other.zarr', chips))


class Killed(BaseException):
    """Nothing that follows happens, not even cleaning up."""


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[str]]]:
    """Fail before the n-th change of the file system, and at all that follow."""
    left = [sys.maxsize]
    names: list[str] = []

    def patch(module: Any, name: str) -> None:
        original = getattr(module, name)

        def change(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            names.append(f'{name} {args[-1]}')
            return original(*args, **options)

        monkeypatch.setattr(module, name, change)

    for name in ('replace', 'link', 'unlink', 'mkdir'):
        patch(os, name)

    def at(number: int) -> list[str]:
        left[0] = number
        names.clear()
        return names

    yield at
    left[0] = sys.maxsize


def killed_everywhere(
    tmp_path: Path,
    kill: Callable[[int], list[str]],
    begin: Callable[[Path], None],
    run: Callable[[Path], Any],
) -> None:
    """Kill a run at changes of the file system; the next must make up for it."""
    whole = tmp_path / 'whole.zarr'
    begin(whole)
    names = kill(sys.maxsize)
    run(whole)
    changes = len(names)
    assert changes > 20
    for number in range(0, changes, changes // 5):
        target = tmp_path / f'killed-{number}.zarr'
        begin(target)
        kill(number)
        with pytest.raises(Killed):
            run(target)
        kill(number // 2 + 5)
        with suppress(Killed):
            run(target)
        kill(sys.maxsize)
        run(target)
        assert_same(target, whole)


def test_killed_at_any_moment(
    tmp_path: Path,
    grid: Callable[..., ChipDataset],
    kill: Callable[[int], list[str]],
) -> None:
    chips = grid(24)
    killed_everywhere(
        tmp_path, kill, lambda target: None, lambda target: drive(target, chips)
    )


def test_killed_while_adding(
    tmp_path: Path,
    grid: Callable[..., ChipDataset],
    kill: Callable[[int], list[str]],
) -> None:
    chips = grid(24, squares=False)
    killed_everywhere(
        tmp_path,
        kill,
        lambda target: drive(target, chips, fails=[1, 4, 5]) and None,
        lambda target: drive(target, chips, block_chips=1),
    )


@pytest.mark.parametrize('stride', [16, 32])
def test_chips_added_within_the_array(
    tmp_path: Path, grid: Callable[..., ChipDataset], stride: int
) -> None:
    chips = grid(stride)
    some = range(0, len(chips), 2)
    target = drive(tmp_path / 'out.zarr', chips, fails=some)
    before = gpd.read_parquet(target / 'chips.parquet')['id'].tolist()
    # Some of them, and with another size of blocks.
    part = ChipDataset(
        [(chips.datasets[0], GridSampler(chips.datasets[0], 32, stride, edge='drop'))],
        skip=chips.rows([0, 1, 2, 5])['chip_id'],
    )
    drive(target, part, 2, block_chips=2)
    table = gpd.read_parquet(target / 'chips.parquet')
    assert table['id'].tolist()[: len(before)] == before
    drive(target, chips, block_chips=64)
    ds = open_group(target)
    np.testing.assert_array_equal(ds['embeddings'], expected(ds, chips.chips))
    assert len(gpd.read_parquet(target / 'chips.parquet')) == len(chips)
    there = content(target)
    drive(target, chips)
    now = content(target)
    assert [name for name in there if there[name] != now[name]] == []


def test_a_store_of_an_older_version_is_filled_further(
    tmp_path: Path, grid: Callable[..., ChipDataset]
) -> None:
    # Made of this grid when chips were staged; neighbours filled what had failed.
    with tarfile.open(OLDER) as archive:
        archive.extractall(tmp_path, filter='data')
    target, chips, failed = tmp_path / 'maps.zarr', grid(16), [4, 9, 10]
    done = [row for row in range(len(chips)) if row not in failed]
    ds = open_group(target)
    assert 'zarr_conventions' not in ds.attrs
    array = expected(ds, chips.rows(done))
    np.testing.assert_array_equal(ds['embeddings'], array)
    assert same_maps(target).total == len(done)
    drive(target, chips, fails=[4, 9, 10])
    np.testing.assert_array_equal(open_group(target)['embeddings'], array)
    run = Run(target, chips, 16)
    assert sorted(run.plan.rows) == failed
    run.do()
    run.end()
    again = open_group(target)
    assert again.sizes == ds.sizes
    names = [convention['name'] for convention in again.attrs['zarr_conventions']]
    assert names == ['geoemb:', 'proj', 'spatial']
    np.testing.assert_array_equal(again['embeddings'], expected(ds, chips.chips))
    table = gpd.read_parquet(target / 'chips.parquet')
    assert table['id'].tolist()[-3:] == chips.rows(run.plan.rows)['chip_id'].tolist()
    assert len(table) == len(chips)


def test_chips_beyond_the_array_are_refused(
    tmp_path: Path, grid: Callable[..., ChipDataset]
) -> None:
    east = grid(16, names=('S2_20240601.tif',), corner=(499520.0, 4500320.0))
    target = drive(tmp_path / 'out.zarr', east)
    before = content(target)
    larger = grid(16, corner=(499200.0, 4500640.0))
    with pytest.raises(OutputError, match=r'to the north.*to the west.*overwrite=True'):
        Run(target, larger)
    later = grid(
        16,
        names=('S2_20240601.tif', 'S2_20230101.tif'),
        corner=(499520.0, 4500320.0),
    )
    with pytest.raises(OutputError, match=r'of the time 2023-01-01.*another output'):
        Run(target, later)
    assert content(target) == before
    assert not (tmp_path / 'out.zarr.partial').exists()


def test_stride_that_is_no_whole_number_of_cells(
    tmp_path: Path, grid: Callable[..., ChipDataset]
) -> None:
    target = tmp_path / 'out.zarr'
    run = Run(target, grid(12))
    with pytest.raises(OutputError, match=r'1\.5 cells.*multiple of 8 pixels, such as'):
        run.block(0)
    assert not target.exists()
    # The same grid with another model, and another grid with this one.
    drive(tmp_path / 'other.zarr', grid(12), cells=8)
    with pytest.raises(OutputError, match='multiple of 4 pixels'):
        Run(tmp_path / 'other.zarr', grid(6))


def test_chips_that_make_no_grid(
    tmp_path: Path, grid: Callable[..., ChipDataset]
) -> None:
    target = tmp_path / 'out.zarr'
    grid()
    dataset = DatedImages(tmp_path / 'S2_20240601.tif')
    xy = np.array([[499533.0, 4499855.0], [499647.0, 4499966.0], [499800.0, 4499800.0]])
    points = gpd.GeoDataFrame(geometry=gpd.points_from_xy(*xy.T), crs='EPSG:32618')
    around = ChipDataset([(dataset, PointSampler(dataset, points, 32))])
    with pytest.raises(OutputError, match=r"around points.*format='geotiff'"):
        Run(target, around)
    grids = [(dataset, GridSampler(dataset, size)) for size in (32, 16)]
    with pytest.raises(OutputError, match=r"32 x 32.*16 x 16.*format='geotiff'"):
        Run(target, ChipDataset(grids))
    x, y = 499200.0, 4500480.0
    shifted = [
        (slice(x, x + 320, 10), slice(y - 320, y, 10), dataset.bounds[2]),
        (slice(x + 325, x + 645, 10), slice(y - 320, y, 10), dataset.bounds[2]),
    ]
    with pytest.raises(OutputError, match=r"grid of pixels.*format='geotiff'"):
        Run(target, ChipDataset([(dataset, shifted)]))
    assert not target.exists()
    drive(target, grid())
    off = [(slice(x + 50, x + 370, 10), slice(y - 320, y, 10), dataset.bounds[2])]
    with pytest.raises(OutputError, match='whole cells apart'):
        Run(target, ChipDataset([(dataset, off)]))


def test_points_on_a_grid(tmp_path: Path, grid: Callable[..., ChipDataset]) -> None:
    grid()
    dataset = DatedImages(tmp_path / 'S2_20240601.tif')
    xy = [
        (499360 + 80 * i, 4500320 - 80 * j) for i, j in [(0, 0), (1, 0), (0, 0), (6, 3)]
    ]
    points = gpd.GeoDataFrame(
        {'id': list('abcd')},
        geometry=gpd.points_from_xy(*np.transpose(xy)),
        crs='EPSG:32618',
    )
    chips = ChipDataset([(dataset, PointSampler(dataset, points, 32))])
    target = drive(tmp_path / 'out.zarr', chips, block_chips=1)
    ds = open_group(target)
    np.testing.assert_array_equal(ds['embeddings'], expected(ds, chips.chips))
    table = gpd.read_parquet(target / 'chips.parquet')
    assert sorted(table['point_id']) == list('abcd')
    held = Zarr(str(target), 'float32').held()
    assert chips.among(held).all()


def test_maps_of_another_shape(
    tmp_path: Path, grid: Callable[..., ChipDataset]
) -> None:
    chips = grid()
    run = Run(tmp_path / 'out.zarr', chips)
    run.block(0)
    run.cells = 8
    with pytest.raises(OutputError, match=r'3 x 4 x 4 float32.* 3 x 8 x 8 float32'):
        run.block(1)
    target = drive(tmp_path / 'other.zarr', chips, fails=range(1, 12))
    with pytest.raises(OutputError, match=r'3 x 4 x 4 float32.*choose another output'):
        drive(target, chips, cells=8)
    with pytest.raises(OutputError, match='different sizes'):
        Run(tmp_path / 'other.zarr', grid(size=16))


def test_damaged_output(tmp_path: Path, grid: Callable[..., ChipDataset]) -> None:
    target = tmp_path / 'out.zarr'
    target.mkdir()
    (target / 'chips.parquet').write_bytes(b'nothing')
    with pytest.raises(OutputError, match=r"'.*chips\.parquet' cannot be read"):
        Zarr(str(target), 'float32').held()
    (target / 'chips.parquet').unlink()
    drive(target, grid())
    shutil.rmtree(target / 'EPSG_32618')
    with pytest.raises(OutputError, match='is damaged'):
        Run(target, grid())
    run = Run(tmp_path / 'other.zarr', grid(24, squares=False))
    run.do()
    name = run.seams()[0]
    run.store.put(name, b'nothing')
    with pytest.raises(OutputError, match=f"{name}' cannot be read.*block-"):
        run.merge()


def test_something_else_has_begun_there(
    tmp_path: Path, grid: Callable[..., ChipDataset]
) -> None:
    target = tmp_path / 'out.zarr'
    file = target / 'EPSG_32618' / 'embeddings' / 'zarr.json'
    file.parent.mkdir(parents=True)
    file.write_text('{}')
    run = Run(target, grid())
    with pytest.raises(OutputError, match=r"zarr\.json' was begun for other chips"):
        run.do()
    (target / 'EPSG_32618' / 'zarr.json').write_text('{}')
    with pytest.raises(OutputError, match='not a Zarr group that dynamicvis_geo wrote'):
        run.do()


@pytest.mark.parametrize('package', ['zarr', 'zarr_cm'])
def test_without_zarr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OutputError, match=r"pip install 'dynamicvis-geo\[zarr\]'"):
        Zarr(str(tmp_path / 'out.zarr'), 'float32')


def all_of_it(
    target: Path, chips: ChipDataset, reverse: bool, barrier: threading.Barrier
) -> None:
    barrier.wait(HANG)
    run = Run(target, chips)
    barrier.wait(HANG)
    run.do(numbers=sorted(range(len(run.plan)), reverse=reverse))
    barrier.wait(HANG)
    run.merge()


# What is ignored in one thread is not in another.
@pytest.mark.filterwarnings('ignore:Consolidated metadata')
def test_two_do_all_of_it_at_once(
    tmp_path: Path, grid: Callable[..., ChipDataset]
) -> None:
    chips, target, barrier = grid(16), tmp_path / 'out.zarr', threading.Barrier(2)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(all_of_it, target, chips, True, barrier)
        all_of_it(target, chips, False, barrier)
        other.result(HANG)
    assert_same(target, drive(tmp_path / 'other.zarr', chips))


def test_a_store_behind_a_url(grid: Callable[..., ChipDataset], tmp_path: Path) -> None:
    chips = grid(24, squares=False)
    url = f'memory://{uuid4().hex}/out.zarr'
    for index in (1, 0):
        run = Run(url, chips, fails=[3])
        run.do(Shard(index, 2))
    run.end()
    run = Run(url, chips)
    run.do()
    run.end()
    memory = fsspec.filesystem('memory')
    copied = tmp_path / 'copied.zarr'
    memory.get(url, str(copied), recursive=True)
    other = drive(tmp_path / 'other.zarr', chips, fails=[3])
    assert_same(copied, drive(other, chips))
    memory.rm(url.rsplit('/', 1)[0], recursive=True)


def same_maps(target: Path) -> Output:
    """Open an output again; each chip has the cells that xarray sees in its place."""
    ds, opened = open_group(target), open_output(target)
    chips = opened.chips
    for chip, features in zip(chips.itertuples(), opened.maps(chips), strict=True):
        there = ds['embeddings'].sel(
            time=chip.start.tz_localize(None),
            y=slice(chip.maxy, chip.miny),
            x=slice(chip.minx, chip.maxx),
        )
        np.testing.assert_array_equal(features, there)
    return opened


def test_an_output_is_opened_again(
    tmp_path: Path, grid: Callable[..., ChipDataset]
) -> None:
    names = ('S2_20240601.tif', 'S2_20240701.tif')
    chips = grid(names=names)
    target = drive(tmp_path / 'out.zarr', chips, fails=[3])
    opened = same_maps(target)
    assert (opened.kind, opened.total, opened.dimensions) == ('grid', len(chips) - 1, D)
    assert opened.provenance['model'] == PROVENANCE['model']
    found = opened.failures()
    assert found is not None
    assert found.table['id'].tolist() == chips.rows([3])['chip_id'].tolist()
    assert len(plot_false_colours(opened).axes) == 2
    page = write_report(target, tmp_path / 'out.html').read_text()
    assert '4 x 4 cells' in page
    assert '1 chips have no embedding' in page
