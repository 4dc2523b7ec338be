"""Feature maps mosaicked into Zarr, against an oracle made from the bounds of chips."""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from rasterio.transform import from_origin

from dynamicvis_geo.callbacks import mosaic
from dynamicvis_geo.callbacks.predictions import Predictions
from dynamicvis_geo.callbacks.zarr_mosaic import ZarrMosaic
from dynamicvis_geo.datasets.chips import ChipDataset
from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.provenance import read_provenance
from dynamicvis_geo.samplers import GridSampler, PointSampler
from tests.callbacks.conftest import DatedImages, UndatedImages
from tests.callbacks.mosaics import (
    PROVENANCE,
    D,
    assert_same,
    drive,
    expected,
    job,
    open_group,
    predictions,
    scene,
)
from tests.callbacks.standins import Chips
from tests.processes import HANG

xr = pytest.importorskip('xarray')
zarr = pytest.importorskip('zarr')
pytest.importorskip('rioxarray')

SMALL = {'CHUNK_BYTES': (1, 2**20), 'SHARD_BYTES': 500}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards for the little that tests write."""
    for name, value in SMALL.items():
        monkeypatch.setattr(mosaic, name, value)


@pytest.fixture
def grid(tmp_path: Path) -> Callable[..., ChipDataset]:
    """Chips of 32 pixels on a grid over one scene of 96 x 128 pixels."""

    def make(
        stride: int | None = None,
        size: int = 32,
        skip: Sequence[str] = (),
        roi: Any = None,
        names: Sequence[str] = ('S2_20240601.tif',),
        **options: Any,
    ) -> ChipDataset:
        folder = tmp_path / '-'.join(names)
        for name in names:
            scene(folder, name, **options)
        dated = all('_2' in name for name in names)
        dataset = (DatedImages if dated else UndatedImages)(folder)
        sampler = GridSampler(dataset, size, stride, roi=roi, edge='drop')
        return ChipDataset([(dataset, sampler)], skip=skip)

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
    rng = np.random.default_rng(stride)
    rows = rng.permutation(len(chips)).tolist()
    target = drive(tmp_path / 'out.zarr', chips, rows=rows)
    ds = open_group(target)
    np.testing.assert_array_equal(ds['embeddings'], expected(ds, chips.chips))
    assert np.isnan(ds['embeddings']).any() == (stride > 32)


def test_failed_chips_leave_their_cells_to_neighbours(
    tmp_path: Path, grid: Callable[..., ChipDataset]
) -> None:
    chips = grid(16)
    rows = [i for i in range(len(chips)) if i % 3]
    target = drive(tmp_path / 'out.zarr', chips, rows=rows)
    ds = open_group(target)
    np.testing.assert_array_equal(ds['embeddings'], expected(ds, chips.rows(rows)))


@pytest.mark.parametrize('ranks', [2, 4, 50])
def test_ranks_and_batches_make_no_difference(
    tmp_path: Path, grid: Callable[..., ChipDataset], ranks: int
) -> None:
    chips = grid(16)
    one = drive(tmp_path / 'one.zarr', chips)
    many = drive(tmp_path / 'many.zarr', chips, ranks=ranks, run='b', batch=1)
    assert len(list(one.rglob('c/*/*/*/*'))) > 4
    assert_same(one, many)


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
    target = drive(tmp_path / 'out.zarr', chips, ranks=2)
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
    assert ds.rio.resolution() == pytest.approx((0.48, -0.48))
    np.testing.assert_array_equal(ds['embeddings'], expected(ds, chips.chips, 5))


def test_float16(tmp_path: Path, grid: Callable[..., ChipDataset]) -> None:
    chips = grid(16)
    target = drive(tmp_path / 'out.zarr', chips, dtype='float16', rows=[0, 1, 5, 7])
    ds = open_group(target)
    assert ds['embeddings'].dtype == np.float16
    array = expected(ds, chips.rows([0, 1, 5, 7]), dtype='float16')
    np.testing.assert_array_equal(ds['embeddings'], array)
    assert read_provenance(target)['data_type'] == 'float16'
    sink = ZarrMosaic(job(tmp_path / 'b.zarr', chips, dtype='float16'))
    large = Predictions(np.array([0]), np.full((1, D, 4, 4), 1e5, np.float32), None)
    with pytest.raises(OutputError, match="float16' cannot hold features of 100000"):
        sink.write(large)
    with pytest.raises(OutputError, match='3 x 4 x 4 float16'):
        drive(target, chips)


def test_nothing_to_write(tmp_path: Path, grid: Callable[..., ChipDataset]) -> None:
    for name, chips in (('a', None), ('b', grid())):
        target = tmp_path / f'{name}.zarr'
        sinks = [ZarrMosaic(job(target, chips, rank, 2)) for rank in range(2)]
        for sink in sinks:
            sink.flush()
            sink.assemble()
        sinks[0].complete()
        assert ZarrMosaic.finished(target).to_pylist() == []
        assert len(gpd.read_parquet(target / 'chips.parquet')) == 0
        assert list(xr.open_datatree(target, engine='zarr').children) == []
    drive(target, grid())
    assert len(ZarrMosaic.finished(target)) == 12


def test_flushed_chips_are_finished(
    tmp_path: Path, grid: Callable[..., ChipDataset]
) -> None:
    chips = grid()
    ids = chips.chips['chip_id'].tolist()
    target = tmp_path / 'out.zarr'
    assert ZarrMosaic.finished(target).to_pylist() == []
    sink = ZarrMosaic(job(target, chips))
    sink.write(predictions(chips, [4, 2]))
    assert ZarrMosaic.finished(target).to_pylist() == []
    sink.flush()
    sink.write(predictions(chips, [2, 3]))
    sink.flush()
    sink.flush()
    finished = ZarrMosaic.finished(target).to_pylist()
    assert finished == [ids[4], ids[2], ids[3]]
    # The next run may leave out what is done, or have only that left.
    left = grid(skip=finished)
    assert len(left) == 9
    drive(target, left, run='b', ranks=2)
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

    for name in ('replace', 'rename', 'unlink', 'mkdir'):
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
    run: Callable[[Path, str], Any],
) -> None:
    """Kill a run at changes of the file system; the next must make up for it."""
    whole = tmp_path / 'whole.zarr'
    begin(whole)
    names = kill(sys.maxsize)
    run(whole, 'a')
    changes = len(names)
    assert changes > 20
    for number in range(changes // 8, changes, changes // 8):
        target = tmp_path / f'killed-{number}.zarr'
        begin(target)
        kill(number)
        with pytest.raises(Killed):
            run(target, 'a')
        kill(sys.maxsize)
        before = set(ZarrMosaic.finished(target).to_pylist())
        run(target, 'b')
        assert before <= set(ZarrMosaic.finished(target).to_pylist())
        assert_same(target, whole)


def test_killed_at_any_moment(
    tmp_path: Path,
    grid: Callable[..., ChipDataset],
    kill: Callable[[int], list[str]],
) -> None:
    chips = grid(size=48)
    assert len(chips) == 4
    killed_everywhere(
        tmp_path,
        kill,
        begin=lambda target: None,
        run=lambda target, word: drive(target, chips, ranks=2, run=word, batch=1),
    )


@pytest.mark.parametrize('grow', [False, True])
def test_killed_while_adding(
    tmp_path: Path,
    grid: Callable[..., ChipDataset],
    kill: Callable[[int], list[str]],
    grow: bool,
) -> None:
    chips = grid(32, size=64)
    assert len(chips) == 6
    south = shapely.box(499200, 4499520, 500480, 4499900)
    first = grid(32, size=64, roi=south) if grow else chips
    rows = None if grow else [1, 4]
    killed_everywhere(
        tmp_path,
        kill,
        begin=lambda target: drive(target, first, rows=rows, run='begin') and None,
        run=lambda target, word: drive(target, chips, ranks=2, run=word),
    )


@pytest.mark.parametrize('stride', [16, 32])
def test_chips_added_within_the_array(
    tmp_path: Path, grid: Callable[..., ChipDataset], stride: int
) -> None:
    chips = grid(stride)
    some = list(range(0, len(chips), 2))
    target = drive(tmp_path / 'out.zarr', chips, rows=some)
    drive(target, chips, run='b', ranks=2)
    assert_same(target, drive(tmp_path / 'other.zarr', chips))
    drive(target, chips, run='c')
    assert_same(target, tmp_path / 'other.zarr')


def test_chips_added_beyond_the_array(
    tmp_path: Path, grid: Callable[..., ChipDataset]
) -> None:
    east = grid(16, names=('S2_20240601.tif',), corner=(499520.0, 4500320.0))
    target = drive(tmp_path / 'out.zarr', east)
    both = grid(
        16,
        names=('S2_20240601.tif', 'S2_20230101.tif'),
        corner=(499200.0, 4500640.0),
    )
    drive(target, both, run='b', ranks=3)
    ds = open_group(target)
    assert ds.sizes == {'time': 2, 'embedding': D, 'y': 16, 'x': 20, 'bounds': 2}
    assert ds.rio.transform() == from_origin(499200, 4500640, 80, 80)
    rows = pd.concat([east.chips, both.chips]).drop_duplicates('chip_id')
    np.testing.assert_array_equal(ds['embeddings'], expected(ds, rows))
    assert len(gpd.read_parquet(target / 'chips.parquet')) == len(rows)


def test_stride_that_is_no_whole_number_of_cells(
    tmp_path: Path, grid: Callable[..., ChipDataset]
) -> None:
    target = tmp_path / 'out.zarr'
    sink = ZarrMosaic(job(target, grid(12)))
    with pytest.raises(OutputError, match=r'1\.5 cells.*multiple of 8 pixels, such as'):
        sink.write(predictions(grid(12), [0]))
    assert not target.exists()
    # The same grid with another model, and another grid with this one.
    drive(target, grid(12), cells=8)
    with pytest.raises(OutputError, match='multiple of 4 pixels'):
        drive(target, grid(6), cells=8)


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
        ZarrMosaic(job(target, around))
    grids = [(dataset, GridSampler(dataset, size)) for size in (32, 16)]
    with pytest.raises(OutputError, match=r"32 x 32.*16 x 16.*format='geotiff'"):
        ZarrMosaic(job(target, ChipDataset(grids)))
    x, y = 499200.0, 4500480.0
    shifted = [
        (slice(x, x + 320, 10), slice(y - 320, y, 10), dataset.bounds[2]),
        (slice(x + 325, x + 645, 10), slice(y - 320, y, 10), dataset.bounds[2]),
    ]
    with pytest.raises(OutputError, match=r"grid of pixels.*format='geotiff'"):
        ZarrMosaic(job(target, ChipDataset([(dataset, shifted)])))
    with pytest.raises(OutputError, match='ChipDataset'):
        ZarrMosaic(job(target, Chips(3)))
    assert not target.exists()


def test_maps_of_another_shape(
    tmp_path: Path, grid: Callable[..., ChipDataset]
) -> None:
    chips = grid()
    sink = ZarrMosaic(job(tmp_path / 'out.zarr', chips))
    sink.write(predictions(chips, [0]))
    with pytest.raises(OutputError, match=r'\(3, 4, 4\) and \(3, 8, 8\)'):
        sink.write(predictions(chips, [1], cells=8))
    target = drive(tmp_path / 'other.zarr', chips, rows=[0])
    with pytest.raises(OutputError, match=r'3 x 4 x 4 float32.*choose another output'):
        drive(target, chips, cells=8)
    with pytest.raises(OutputError, match='different sizes'):
        drive(target, grid(size=16))


def test_damaged_output(tmp_path: Path) -> None:
    target = tmp_path / 'out.zarr'
    (target / '.staging').mkdir(parents=True)
    (target / '.staging/x.arrow').write_bytes(b'nothing')
    with pytest.raises(OutputError, match=r"cannot read '.*x\.arrow'"):
        ZarrMosaic.finished(target)
    (target / '.staging/x.arrow').unlink()
    (target / 'chips.parquet').write_bytes(b'nothing')
    with pytest.raises(OutputError, match=r"cannot read '.*chips\.parquet'"):
        ZarrMosaic.finished(target)


def test_without_zarr(
    tmp_path: Path, grid: Callable[..., ChipDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, 'zarr', None)
    with pytest.raises(OutputError, match=r"pip install 'dynamicvis-geo\[zarr\]'"):
        ZarrMosaic(job(tmp_path / 'out.zarr', grid()))


def run_rank(target: Path, chips: ChipDataset, rank: int, barrier: Any) -> None:
    for name, value in SMALL.items():
        setattr(mosaic, name, value)
    sink = ZarrMosaic(job(target, chips, rank, 2))
    barrier.wait(HANG)
    for first in range(rank, len(chips), 2):
        sink.write(predictions(chips, [first]))
        sink.flush()
    barrier.wait(HANG)
    sink.assemble()
    barrier.wait(HANG)
    if rank == 0:
        sink.complete()


def test_two_processes(tmp_path: Path, grid: Callable[..., ChipDataset]) -> None:
    chips = grid(16)
    context = multiprocessing.get_context('spawn')
    barrier = context.Barrier(2)
    target = tmp_path / 'out.zarr'
    other = context.Process(
        target=run_rank, args=(target, chips, 1, barrier), daemon=True
    )
    other.start()
    run_rank(target, chips, 0, barrier)
    other.join(HANG)
    assert other.exitcode == 0
    assert_same(target, drive(tmp_path / 'other.zarr', chips))
