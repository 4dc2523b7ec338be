import json
import pickle
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import shapely
import torch
import torchgeo.samplers
from torch.utils.data import DataLoader, Subset
from torchgeo.datasets import RasterDataset

from dynamicvis_geo.datasets import ChipDataset, collate
from dynamicvis_geo.datasets.chip_table import ChipTable, GeoSlice
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.grid import Grid
from dynamicvis_geo.samplers import GridSampler, PointSampler

from .rasters import UTM, Areas, pattern, write_geotiff

WINDOW = [('2022-06-01', '2022-09-01')]


@pytest.fixture
def zones(tmp_path: Path) -> dict[str, RasterDataset]:
    """Two images in two UTM zones and one in degrees, on lattices of their own."""
    places = {
        'EPSG:32618': (400_000 + 10 / 3, 4_300_000 - 10 / 3, 10.0),
        'EPSG:32619': (300_000.0, 4_200_000.0, 20.0),
        'EPSG:4326': (-70.00005, 40.00005, 0.0001),
    }
    datasets = {}
    for i, (crs, place) in enumerate(places.items()):
        path = tmp_path / f'{i}.tif'
        datasets[crs] = RasterDataset(
            write_geotiff(path, pattern(70, 90, i), *place, crs)
        )
    return datasets


def expected_pixels(chips: ChipDataset, row: int) -> np.ndarray[Any, Any]:
    """What the pattern holds at a footprint, 0 where it ends."""
    chip = chips.rows([row]).iloc[0]
    i = ['EPSG:32618', 'EPSG:32619', 'EPSG:4326'].index(chip.crs)
    dataset = chips.datasets[i]
    west, _, _, north = dataset.index.geometry.iloc[0].bounds
    col, top = (
        round((chip.minx - west) / chip.xres),
        round((north - chip.maxy) / chip.yres),
    )
    padded = np.pad(pattern(70, 90, i), [(0, 0), (64, 64), (64, 64)])
    return padded[:, top + 64 : top + 96, col + 64 : col + 96].astype(np.float32)


def test_several_crs_are_one_dataset(zones: dict[str, RasterDataset]) -> None:
    chips = ChipDataset([(zone, GridSampler(zone, 32)) for zone in zones.values()])
    table = chips.chips
    assert len(chips) == len(table) > 3 * 9
    assert set(table['crs']) == set(zones)
    assert table['chip_id'].is_unique
    assert table.crs == 'EPSG:4326'
    for row in range(len(chips)):
        sample = chips[row]
        assert sample['chip'].dtype == torch.int64
        assert sample['chip'].tolist() == [row]
        np.testing.assert_array_equal(
            sample['image'].numpy(), expected_pixels(chips, row)
        )


@pytest.mark.parametrize('workers', [0, 2])
def test_through_a_data_loader(zones: dict[str, RasterDataset], workers: int) -> None:
    chips = ChipDataset([(zone, GridSampler(zone, 32)) for zone in zones.values()])
    first = [chips[row]['image'] for row in range(len(chips))]
    part = Subset(chips, range(1, len(chips), 2))
    loader = DataLoader(
        part,
        batch_size=4,
        shuffle=True,
        num_workers=workers,
        collate_fn=collate,
        multiprocessing_context='fork' if workers else None,
    )
    seen = []
    for batch in loader:
        for image, (row,) in zip(batch['image'], batch['chip'].tolist(), strict=True):
            assert torch.equal(image, first[row])
            seen.append(row)
    assert sorted(seen) == list(range(1, len(chips), 2))


def test_georeference_keys_are_those_of_torchgeo(
    zones: dict[str, RasterDataset],
) -> None:
    zone = zones['EPSG:32619']
    sampler = GridSampler(zone, 32)
    theirs = zone[next(iter(sampler))]
    ours = ChipDataset([(zone, sampler)])[0]
    assert ours.keys() == theirs.keys() | {'chip'}
    for key in theirs:
        same = ours[key] == theirs[key]
        assert same.all() if isinstance(same, torch.Tensor) else same


def torchgeo_samplers(dataset: RasterDataset) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        samplers = [
            torchgeo.samplers.GridGeoSampler(dataset, 32),
            torchgeo.samplers.RandomGeoSampler(dataset, 32, length=5),
            torchgeo.samplers.PreChippedGeoSampler(dataset),
        ]
        if hasattr(torchgeo.samplers, 'GriddedPatchSampler'):
            grid = torchgeo.samplers.GriddedPatchSampler(dataset, size=32)
            times = torchgeo.samplers.SequentialTimestampSampler(dataset)
            samplers += [grid, grid @ times]
    return samplers


def test_samplers_of_torchgeo(zones: dict[str, RasterDataset]) -> None:
    dataset = zones['EPSG:32618']
    for sampler in torchgeo_samplers(dataset):
        # Random samplers draw anew each time: what is frozen must be what they gave.
        queries = list(sampler)
        chips = ChipDataset([(dataset, queries)])
        assert len(chips) == len(queries) == len(ChipDataset([(dataset, sampler)])) > 0
        for query, row in zip(queries, range(len(chips)), strict=True):
            assert torch.equal(chips[row]['image'], dataset[query]['image'])
            shape = chips.rows([row])[['height', 'width']].to_numpy()[0]
            assert tuple(shape) == tuple(chips[row]['image'].shape[1:])


def test_batch_samplers_are_refused(zones: dict[str, RasterDataset]) -> None:
    dataset = zones['EPSG:32618']
    batches = torchgeo.samplers.RandomBatchGeoSampler(dataset, 32, batch_size=2)
    with pytest.raises(SpecError, match='RandomBatchGeoSampler'):
        ChipDataset([(dataset, batches)])


def test_table() -> None:
    box = shapely.box(399_360, 4_280_320, 419_840, 4_300_800)
    dataset = Areas([box], WINDOW, res=20.0)
    chips = ChipDataset([(dataset, GridSampler(dataset, 512))])
    table = chips.chips
    assert table.index.tolist() == [0, 1, 2, 3]
    assert table['chip_id'].iloc[0] == (
        'EPSG32618_x399360_y4300800_512x512px_20m_20220601-20220901T000000'
    )
    first = table.iloc[0]
    assert [first.minx, first.miny, first.maxx, first.maxy] == [
        399_360,
        4_290_560,
        409_600,
        4_300_800,
    ]
    assert [first.width, first.height, first.xres, first.yres] == [512, 512, 20.0, 20.0]
    assert first['crs'] == UTM
    assert (first.start, first.end) == tuple(pd.Timestamp(t) for t in WINDOW[0])
    back = table.to_crs(UTM).geometry
    assert back.symmetric_difference(box).area.max() < box.area
    assert (
        shapely.union_all(back.values).symmetric_difference(box).area / box.area < 1e-3
    )
    centre = gpd.GeoSeries(
        gpd.points_from_xy(table.centre_lon, table.centre_lat), crs=4326
    ).to_crs(UTM)
    assert centre.iloc[0].distance(shapely.Point(404_480, 4_295_680)) < 0.01
    assert 'point_id' not in table


def test_rows_are_those_of_the_table() -> None:
    # Chips of very different latitudes need outlines of different detail.
    areas = [shapely.box(400_000, y, 420_000, y + 20_000) for y in (1e5, 9e6)]
    dataset = Areas(areas, res=100.0)
    chips = ChipDataset([(dataset, GridSampler(dataset, 128))])
    table = chips.chips
    some = chips.rows([3, 0, -1])
    assert some.index.tolist() == [3, 0, len(chips) - 1]
    pd.testing.assert_frame_equal(
        pd.DataFrame(some), pd.DataFrame(table.loc[some.index])
    )


def test_no_time_is_nat() -> None:
    always = (pd.Timestamp.min, pd.Timestamp.max)
    dataset = Areas([shapely.box(0, 0, 100, 100)], [always])  # type: ignore[list-item]
    chips = ChipDataset([(dataset, GridSampler(dataset, 10))])
    assert chips.chips[['start', 'end']].isna().all(axis=None)
    assert chips.chips['chip_id'].iloc[0] == 'EPSG32618_x0_y100_10x10px_10m'


class Recorder(Areas):
    """Fetches batches as Earth Engine does; notes what it was asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: list[int] = []

    def __getitems__(self, queries: Sequence[Any]) -> list[dict[str, Any]]:
        self.asked.append(len(queries))
        return [self[query] for query in queries]


def test_batches_are_fetched_together_and_keep_their_order() -> None:
    one = Recorder([shapely.box(0, 0, 1000, 1000)])
    two = Areas([shapely.box(0, 5000, 1000, 6000)])
    chips = ChipDataset([(one, GridSampler(one, 10)), (two, GridSampler(two, 10))])
    wanted = [150, 7, 199, 0, 7, 101]
    samples = chips.__getitems__(wanted)
    table = chips.rows(wanted)
    assert [sample['chip'].item() for sample in samples] == wanted
    assert [sample['image'].tolist() for sample in samples] == (
        table[['minx', 'maxy']].to_numpy().tolist()
    )
    assert one.asked == [3]


def test_skip_leaves_out_what_is_done() -> None:
    dataset = Areas([shapely.box(0, 0, 1000, 1000)])
    points = gpd.GeoSeries.from_xy(
        [105, 505, 905], [500] * 3, index=['a', 'b', 'c'], crs=UTM
    )
    sampler = PointSampler(dataset, points, 10)
    everything = ChipDataset([(dataset, sampler)]).chips
    done = everything['chip_id'].iloc[[1]]
    rest = ChipDataset([(dataset, sampler)], skip=done)
    assert rest.chips['chip_id'].tolist() == everything['chip_id'].iloc[[0, 2]].tolist()
    assert rest.chips['point_id'].tolist() == ['a', 'c']
    assert rest[1]['chip'].tolist() == [1]
    assert len(ChipDataset([(dataset, sampler)], skip=everything['chip_id'])) == 0
    with pytest.raises(SpecError, match='skip='):
        ChipDataset([(dataset, sampler)], skip=done.iloc[0])


def test_points_twice_are_two_rows_and_grids_have_no_point() -> None:
    dataset = Areas([shapely.box(0, 0, 1000, 1000)])
    points = gpd.GeoSeries.from_xy([105, 105], [500, 500], crs=UTM)
    chips = ChipDataset(
        [
            (dataset, PointSampler(dataset, points, 10)),
            (dataset, GridSampler(dataset, 50)),
        ]
    ).chips
    assert chips['point_id'].iloc[:2].tolist() == ['0', '1']
    assert chips['point_id'].iloc[2:].isna().all()
    assert chips['chip_id'].iloc[0] == chips['chip_id'].iloc[1]


class Corners:
    """A sampler of one's own: the corners of an area, each with a name."""

    @property
    def provenance(self) -> dict[str, Any]:
        return {'of': 'corners'}

    def __iter__(self) -> Iterator[GeoSlice]:
        return self.table().queries()

    def table(self) -> ChipTable:
        grid = Grid(UTM, 0.0, 1000.0, 100, 100, 10.0, 10.0)
        year = [pd.Timestamp(time).value for time in ('2022-01-01', '2023-01-01')]
        return ChipTable.parts_of(
            grid,
            rows=np.array([0, 0, 90, 90]),
            cols=np.array([0, 90, 0, 90]),
            size=(10, 10),
            windows=np.array([year] * 4),
            point_ids=pa.array(['nw', 'ne', 'sw', 'se']),
        )


def test_a_sampler_of_ones_own() -> None:
    dataset = Areas([shapely.box(0, 0, 1000, 1000)])
    chips = ChipDataset([(dataset, GridSampler(dataset, 100)), (dataset, Corners())])
    assert chips.provenance['sources'][1]['sampler'] == {
        'name': 'Corners',
        'of': 'corners',
    }
    table = chips.chips
    assert table['point_id'].tolist()[1:] == ['nw', 'ne', 'sw', 'se']
    assert (
        table['chip_id'].iloc[-1] == 'EPSG32618_x900_y100_10x10px_10m_20220101-20230101'
    )
    assert chips[4]['image'].tolist() == [900, 100]
    assert chips.strides == [(100, 100), None]


def test_nothing_to_sample() -> None:
    dataset = Areas([shapely.box(0, 0, 1000, 1000)])
    nothing = GridSampler(dataset, 10, roi=shapely.box(5000, 0, 6000, 100))
    for chips in (ChipDataset([]), ChipDataset([(dataset, nothing)])):
        assert len(chips) == 0
        assert chips.chips.empty
        assert {'chip_id', 'crs', 'start', 'geometry'} <= set(chips.chips)
        assert chips.chips.crs == 'EPSG:4326'
        assert list(DataLoader(chips)) == []
        with pytest.raises(IndexError):
            chips[0]


def test_rows_out_of_range() -> None:
    dataset = Areas([shapely.box(0, 0, 1000, 1000)])
    chips = ChipDataset([(dataset, GridSampler(dataset, 50))])
    assert chips[np.int64(3)]['chip'].item() == chips[-1]['chip'].item() == 3
    for wrong in (4, -5):
        with pytest.raises(IndexError, match=rf'chip {wrong} of 4'):
            chips[wrong]
        with pytest.raises(IndexError):
            chips.rows([wrong])


def test_same_chip_of_two_datasets_is_refused() -> None:
    one, two = (Areas([shapely.box(0, 0, 1000, 1000)]) for _ in range(2))
    with pytest.raises(SpecError, match='same chip'):
        ChipDataset([(one, GridSampler(one, 50)), (two, GridSampler(two, 50))])
    # The same dataset twice is the same pixels, and another window is another chip.
    ChipDataset([(one, GridSampler(one, 50)), (one, GridSampler(one, 50))])
    two = Areas([shapely.box(0, 0, 1000, 1000)], [('2023-01-01', '2024-01-01')])
    ChipDataset([(one, GridSampler(one, 50)), (two, GridSampler(two, 50))])


@pytest.mark.parametrize(
    'queries',
    [
        [(slice(0, 2, 10.0), slice(0, 100, 10.0))],
        [(slice(0, 100), slice(0, 100), slice(*(pd.Timestamp('2022', tz='UTC'),) * 2))],
        [slice(0, 100)],
        [0, 1],
    ],
)
def test_samplers_that_yield_no_chips(queries: list[Any]) -> None:
    with pytest.raises(SpecError, match='sampler list yields'):
        ChipDataset([(Areas([shapely.box(0, 0, 1000, 1000)]), queries)])


def test_pairs_that_are_none() -> None:
    with pytest.raises(SpecError, match='pair'):
        ChipDataset([Areas([shapely.box(0, 0, 1, 1)])])  # type: ignore[list-item]


def test_provenance_is_plain_and_complete(zones: dict[str, RasterDataset]) -> None:
    zone = zones['EPSG:32618']
    union = zone | zones['EPSG:32618']
    chips = ChipDataset(
        [(zone, GridSampler(zone, 32, 16)), (union, GridSampler(union, 7, edge='drop'))]
    )
    told = json.loads(json.dumps(chips.provenance))
    assert told['chips'] == len(chips)
    grid, joined = told['sources']
    assert grid['dataset'] == 'RasterDataset'
    assert grid['crs'] == 'EPSG:32618'
    assert grid['res'] == [10.0, 10.0]
    assert grid['files'] == {'count': 1, 'first': ['0.tif']}
    assert grid['sampler'] == {
        'name': 'GridSampler',
        'size': [32, 32],
        'stride': [16, 16],
        'edge': 'pad',
    }
    assert [part['dataset'] for part in joined['datasets']] == ['RasterDataset'] * 2


def test_workers_share_the_table_however_they_start() -> None:
    dataset = Areas([shapely.box(0, 0, 1000, 1000)])
    chips = ChipDataset([(dataset, GridSampler(dataset, 10))])
    table = chips.chips
    # What the DataLoader does for workers that are not forked.
    sent = pickle.loads(ForkingPickler.dumps(chips))
    size = len(pickle.dumps(chips)) - len(ForkingPickler.dumps(chips))
    assert size > 60 * len(chips) - 1000
    # Here as well the table has moved to shared memory, and is still the same.
    for copy in (sent, pickle.loads(pickle.dumps(chips)), chips):
        pd.testing.assert_frame_equal(pd.DataFrame(copy.chips), pd.DataFrame(table))
