import pickle
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
import torch
from matplotlib.figure import Figure
from pyproj import CRS
from rasterio.transform import from_origin
from torch.utils.data import DataLoader
from torchgeo.datasets import GeoDataset, RasterDataset, stack_samples

from dynamicvis_geo.datasets import ChipFailure, EarthEngineDataset, collate
from dynamicvis_geo.earthengine import ChipCache, EarthEngineClient
from dynamicvis_geo.errors import NoImageryError, RequestTooLargeError, SpecError
from dynamicvis_geo.specs import BBox, PointBuffer, SensorSpec, TemporalSpec
from tests.earthengine_server import EarthEngineServer
from tests.earthengine_server.oracle import expected
from tests.processes import HANG, Start, wait_for

from .composites import GAP, ROI, SENSOR, WINDOW, assert_right, grid, make, query

# Places and projections.


@pytest.mark.parametrize(
    ('roi', 'crs'),
    [
        (ROI, None),
        (ROI, 'EPSG:32633'),
        (ROI, 3857),
        (ROI, 4326),
        (BBox(20, -33.6, 20.4, -33.4), None),
        (BBox(10, 84.3, 30, 84.9), None),
        (BBox(10, 70, 12, 71), CRS('EPSG:3413')),
        (BBox(179.9, -16.6, -179.9, -16.4), None),
        (ROI, '+proj=laea +lat_0=52 +lon_0=10 +datum=WGS84'),
    ],
)
def test_pixels_are_those_of_the_place(
    server: EarthEngineServer, roi: BBox, crs: Any
) -> None:
    dataset = make(server, roi, crs=crs)
    for where in (query(dataset), query(dataset, 2, -3)):
        assert_right(dataset, where, dataset[where])


@pytest.mark.parametrize('composite', ['median', 'mosaic'])
@pytest.mark.parametrize('cloud_mask', [None, 'scl', 'cs+'])
def test_composites_and_cloud_masks(
    server: EarthEngineServer, composite: Any, cloud_mask: Any
) -> None:
    sensor = SensorSpec(
        bands=('B8', 'B2'),
        cloudy_pct=60,
        composite=composite,
        cloud_mask=cloud_mask,
        cloud_threshold=0.55,
        fill_value=-7,
    )
    dataset = make(server, sensor=sensor, on_missing='fill')
    samples = [dataset[where] for where in grid(dataset, 2, 2, 48)]
    for where, sample in zip(grid(dataset, 2, 2, 48), samples, strict=True):
        assert_right(dataset, where, sample)


def test_floating_point_bands(server: EarthEngineServer) -> None:
    two = ('2022-06-01', '2022-06-10')
    sensor = SensorSpec(cloudy_pct=100, dtype='float32')
    dataset = make(server, time=two, sensor=sensor)
    where = query(dataset)
    image = dataset[where]['image']
    x, y, _ = where
    values, valid = expected(dataset.crs, x, y, two, sensor)
    # Medians of an even number of scenes keep their halves.
    assert (np.floor(image.numpy()) == values)[:, valid].all()
    assert not (image == image.round()).all()


def test_the_threshold_of_clouds_is_inclusive(server: EarthEngineServer) -> None:
    dataset = make(server)
    where = query(dataset)
    for percent in (9, 53, 77, 87):
        dataset.sensor = SensorSpec(cloudy_pct=percent)
        assert_right(dataset, where, dataset[where])


def test_chips_of_overlapping_queries_agree(server: EarthEngineServer) -> None:
    dataset = make(server)
    x, y, t = query(dataset, px=64)
    whole = dataset[x, y, t]['image']
    for east, north in ((160, 0), (70, 310), (320, 320)):
        x1 = slice(x.start + east, x.start + east + 320, 10)
        y1 = slice(y.start + north, y.start + north + 320, 10)
        part = dataset[x1, y1, t]['image']
        top, left = 64 - north // 10 - 32, east // 10
        assert (part == whole[:, top : top + 32, left : left + 32]).all()


def test_512_pixels_stay_512_for_any_origin(server: EarthEngineServer) -> None:
    dataset = make(server, on_missing='fill')
    x, y, t = query(dataset)
    random = np.random.default_rng(2)
    for dx, dy in random.uniform(-3000, 3000, (2, 2)):
        where = (
            slice(x.start + dx, x.start + dx + 5120),
            slice(y.start + dy, y.start + dy + 5120),
            t,
        )
        assert dataset[where]['image'].shape == (3, 512, 512)
    sent = [entry['grid'] for entry in server.log()]
    assert all(g['dimensions'] == {'width': 512, 'height': 512} for g in sent)


def test_windows_are_taken_from_the_query(server: EarthEngineServer) -> None:
    windows = [('2022-06-01', '2022-07-01'), TemporalSpec('2022-07-01', '2022-08-01')]
    dataset = make(server, time=windows)
    assert len(dataset) == 2
    x, y, _ = query(dataset)
    for window, interval in zip(
        (windows[0], ('2022-07-01', '2022-08-01')), dataset.index.index, strict=True
    ):
        t = slice(interval.left, interval.right)
        assert_right(dataset, (x, y, t), dataset[x, y, t], window)


@pytest.mark.parametrize(
    ('asked', 'window'),
    [
        # Part of a window, or its end as people write it: the whole of it.
        (('2022-06-10', '2022-06-11'), ('2022-06-01', '2022-07-01')),
        (('2022-06-01', '2022-07-01'), ('2022-06-01', '2022-07-01')),
        (('2022-05-01', '2022-06-02'), ('2022-06-01', '2022-07-01')),
        (('2022-07-01', '2022-07-01'), ('2022-07-01', '2022-08-01')),
        # Several windows: from the start of the first to the end of the last.
        (('2022-06-10', '2022-07-21'), ('2022-06-01', '2022-08-01')),
        ((None, None), ('2022-06-01', '2023-08-01')),
    ],
)
def test_windows_are_never_cut(
    server: EarthEngineServer, asked: tuple[Any, Any], window: tuple[str, str]
) -> None:
    months = [('2022-06-01', '2022-07-01'), ('2022-07-01', '2022-08-01')]
    dataset = make(server, time=[*months, ('2023-07-01', '2023-08-01')])
    x, y, _ = query(dataset)
    t = slice(*(None if moment is None else pd.Timestamp(moment) for moment in asked))
    where = dataset._disambiguate_slice((x, y, t))
    assert_right(dataset, where, dataset[x, y, t], window)


def test_a_window_within_another_is_one_of_its_own(server: EarthEngineServer) -> None:
    season = ('2022-06-10', '2022-07-01')
    dataset = make(server, time=[('2022-06-01', '2022-08-01'), season])
    x, y, _ = query(dataset)
    interval = TemporalSpec(*season).interval
    t = slice(interval.left, interval.right)
    assert_right(dataset, (x, y, t), dataset[x, y, t], season)


@pytest.mark.parametrize(
    ('roi', 'code'),
    [
        (BBox(5, 60, 5.5, 60.5), 32632),
        (BBox(10, 78, 11, 78.5), 32633),
        (BBox(-71, -34, -70, -33), 32719),
        (BBox(0, 85, 90, 88), 32661),
        (shapely.box(0, -89, 90, -85), 32761),
        (PointBuffer(179.99, 10, 5000), 32660),
        (shapely.Polygon([(179, 1), (-179, 1), (-179, 2), (179, 2)]), 32601),
        (shapely.box(179, 1, 181, 2), 32601),
    ],
)
def test_the_crs_suits_the_area(roi: Any, code: int) -> None:
    dataset = EarthEngineDataset(roi, WINDOW)
    assert dataset.crs.to_epsg() == code
    assert dataset.res == (10, 10)
    west, south, east, north = dataset.index.total_bounds
    assert max(east - west, north - south) < 800_000


def test_a_square_of_metres_is_exact_in_its_zone() -> None:
    west, south, east, north = EarthEngineDataset(
        PointBuffer(10, 60, 2560), WINDOW
    ).index.total_bounds
    assert (east - west, north - south) == (5120, 5120)


@pytest.mark.parametrize(
    ('crs', 'res'),
    [(4326, 10 / 111319.49079327358), (3857, 10), ('EPSG:2263', 10 / 0.3048006096)],
)
def test_the_resolution_is_in_units_of_the_crs(crs: Any, res: float) -> None:
    roi = BBox(-74, 40.6, -73.9, 40.7)
    dataset = EarthEngineDataset(roi, WINDOW, crs=crs)
    assert dataset.res == pytest.approx((res, res))
    assert EarthEngineDataset(roi, WINDOW, res=(20, 30)).res == (20, 30)


def test_areas_come_in_many_forms(tmp_path: Path) -> None:
    frame = gpd.GeoDataFrame(
        {'name': ['a', 'b']},
        geometry=[shapely.box(10, 50, 10.1, 50.1), shapely.Point(10.5, 50.5)],
        crs=4326,
    )
    frame.to_crs(32632).to_file(tmp_path / 'area.gpkg')
    for roi in (
        frame,
        frame.geometry,
        frame.to_crs(3857),
        tmp_path / 'area.gpkg',
        str(tmp_path / 'area.gpkg'),
    ):
        dataset = EarthEngineDataset(roi, WINDOW)
        assert len(dataset) == 2
        assert dataset.crs.to_epsg() == 32632
    text = 'POLYGON ((10 50, 10.1 50, 10.1 50.1, 10 50.1, 10 50))'
    for roi in (text, '10,50,10.1,50.1', frame.geometry[0]):
        bounds = EarthEngineDataset(roi, WINDOW, crs=4326).index.total_bounds
        assert np.allclose(bounds, (10, 50, 10.1, 50.1))


@pytest.mark.parametrize(
    ('options', 'named'),
    [
        ({'roi': 'nowhere.gpkg'}, 'roi'),
        ({'roi': 5}, 'roi'),
        ({'roi': shapely.Polygon()}, 'roi'),
        ({'roi': gpd.GeoSeries([shapely.Point(1, 2)])}, 'CRS'),
        ({'roi': shapely.box(50, 200, 51, 201)}, 'longitude first'),
        ({'time': '2022-06-01'}, 'time'),
        ({'time': ('2022-06-01',)}, 'time'),
        ({'time': []}, 'time'),
        ({'time': ('2022-07-01', '2022-06-01')}, 'start'),
        ({'crs': 'EPSG:999999'}, 'crs'),
        ({'res': 0}, 'res'),
        ({'on_missing': 'ignore'}, 'on_missing'),
        ({'block_size': 0}, 'block_size'),
    ],
)
def test_bad_arguments_are_named(options: dict, named: str) -> None:
    arguments = {'roi': ROI, 'time': WINDOW, **options}
    with pytest.raises(SpecError, match=named):
        EarthEngineDataset(**arguments)


# A dataset of TorchGeo's.


def test_it_is_a_dataset_of_torchgeo(server: EarthEngineServer) -> None:
    dataset = make(server)
    assert isinstance(dataset, GeoDataset)
    assert dataset.index.index.closed == 'both'
    copy = pickle.loads(pickle.dumps(dataset))
    where = query(copy)
    sample = copy[where]
    raster = {'bounds', 'crs'} if not hasattr(dataset, '_slice_to_tensor') else set()
    raster = raster or {'bounds', 'transform'}
    assert set(sample) == {'image', 'valid_fraction'} | raster
    batch = stack_samples([sample, copy[query(copy, 1)]])
    assert batch['image'].shape == (2, 3, 32, 32)
    dataset.crs = CRS.from_epsg(4326)
    dataset.res = 0.0001
    where = query(dataset)
    assert_right(dataset, where, dataset[where])
    assert isinstance(dataset.plot(sample, suptitle='chip'), Figure)


def test_queries_beyond_the_dataset_are_refused(server: EarthEngineServer) -> None:
    dataset = make(server)
    x, y, t = query(dataset)
    far = slice(x.start + 10**6, x.stop + 10**6, 10)
    late = slice(pd.Timestamp('2023-01-01'), pd.Timestamp('2023-02-01'))
    for where in ((far, y, t), (x, y, late), (slice(x.start, x.start + 1), y, t)):
        with pytest.raises(IndexError):
            dataset[where]
    assert server.counts()['requests'] == 0


def labels(folder: Path, dataset: Any) -> RasterDataset:
    """Land cover beside the imagery, shifted by half a chip, in a file."""
    x, y, _ = query(dataset)
    transform = from_origin(x.start - 160, y.stop + 160, 10, 10)
    values = np.arange(96 * 96, dtype=np.uint8).reshape(96, 96) % 7
    with rasterio.open(
        folder / 'labels_20220615.tif',
        'w',
        driver='GTiff',
        width=96,
        height=96,
        count=1,
        dtype='uint8',
        crs=dataset.crs,
        transform=transform,
    ) as target:
        target.write(values, 1)

    class Labels(RasterDataset):
        filename_glob = '*.tif'
        filename_regex = r'labels_(?P<date>\d{8})'
        is_image = False

    return Labels(folder)


@pytest.mark.parametrize('workers', [0, 2])
def test_intersection_with_labels(
    server: EarthEngineServer, tmp_path: Path, workers: int
) -> None:
    dataset = make(server)
    both = dataset & labels(tmp_path, dataset)
    # The labels are of one day; the composite is that of the whole window.
    t = slice(both.index.index[0].left, both.index.index[0].right)
    assert t.stop - t.start < pd.Timedelta(days=1)
    x, y, _ = query(dataset)
    wanted = [
        (slice(x.start + 80 * i, x.start + 80 * i + 160, 10), y, t) for i in range(6)
    ]
    loader = DataLoader(
        both,
        batch_size=2,
        sampler=wanted,
        collate_fn=stack_samples,
        num_workers=workers,
    )
    samples = [
        {'image': image, 'valid_fraction': valid, 'mask': mask}
        for batch in loader
        for image, valid, mask in zip(
            batch['image'], batch['valid_fraction'], batch['mask'], strict=True
        )
    ]
    for where, sample in zip(wanted, samples, strict=True):
        assert_right(dataset, where, sample)
        assert sample['mask'].shape == (32, 16)


def test_union_with_another_area(server: EarthEngineServer) -> None:
    dataset = make(server)
    other = make(server, BBox(10.5, 50.3, 10.6, 50.5), crs=dataset.crs)
    both = dataset | other
    for part in (dataset, other):
        where = query(part)
        assert_right(part, where, both[where])


def test_the_samplers_of_torchgeo(server: EarthEngineServer) -> None:
    from torchgeo import samplers

    roi = PointBuffer(10.3, 50.4, 320)
    dataset = make(server, roi, on_missing='fill')
    if hasattr(samplers, 'GriddedPatchSampler'):
        sampler = samplers.GriddedPatchSampler(dataset, size=32)
    else:
        sampler = samplers.GridGeoSampler(dataset, 32, 32)
    loader = DataLoader(
        dataset, sampler=sampler, batch_size=2, collate_fn=stack_samples
    )
    count = 0
    for batch in loader:
        assert batch['image'].shape[1:] == (3, 32, 32)
        count += len(batch['image'])
    assert count == len(sampler) >= 4


# Faults, workers, limits.

FAULTS = [429, 500, 502, 503, 504, 'reset', 'close', 'truncated', 'short', 'html']


@pytest.mark.parametrize('workers', [0, 2])
def test_every_chip_is_right_whatever_fails(
    server: EarthEngineServer, workers: int
) -> None:
    dataset = make(server, block_size=1, limits={'max_concurrency': 8})
    wanted = grid(dataset, 10, 12, 16)
    # The parent makes requests first: its connections are inherited.
    assert_right(dataset, wanted[0], dataset[wanted[0]])
    server.set(kinds=FAULTS, rate=0.2, seed=workers)
    loader = DataLoader(
        dataset,
        sampler=wanted,
        batch_size=15,
        num_workers=workers,
        collate_fn=collate,
    )
    batches = list(loader)
    images = torch.cat([batch['image'] for batch in batches])
    valid = torch.cat([batch['valid_fraction'] for batch in batches])
    assert len(images) == len(wanted)
    for where, image, fraction in zip(wanted, images, valid, strict=True):
        sample = {'image': image, 'valid_fraction': fraction}
        assert_right(dataset, where, sample)
    counts = server.counts()
    assert counts['served'] == len(wanted)
    assert counts['peak'] <= 8


def test_dense_chips_share_requests(server: EarthEngineServer) -> None:
    dataset = make(server, block_size=128)
    wanted = grid(dataset, 4, 8, 32)
    samples = dataset.__getitems__(wanted)
    assert server.counts()['requests'] == 2
    for where, sample in zip(wanted, samples, strict=True):
        assert_right(dataset, where, sample)


def test_overlapping_chips_are_put_together(server: EarthEngineServer) -> None:
    dataset = make(server, block_size=100)
    x, y, t = query(dataset)
    wanted = [
        (
            slice(x.start + 160 * i, x.start + 160 * i + 480, 10),
            slice(y.start + 160 * j, y.start + 160 * j + 480, 10),
            t,
        )
        for i in range(6)
        for j in range(6)
    ]
    samples = dataset.__getitems__(wanted)
    for where, sample in zip(wanted, samples, strict=True):
        assert_right(dataset, where, sample)
    sizes = [entry['grid']['dimensions'] for entry in server.log()]
    assert sum(s['width'] * s['height'] for s in sizes) == 128**2


def test_what_the_server_cannot_compute_is_cut(server: EarthEngineServer) -> None:
    dataset = make(server)
    where = query(dataset, px=200)
    server.set(script=[400], message='User memory limit exceeded.')
    assert_right(dataset, where, dataset[where])
    assert server.counts()['requests'] == 5
    server.set(kinds=[400], rate=1, message='User memory limit exceeded.')
    with pytest.raises(RequestTooLargeError, match='shorter window'):
        dataset[where]


def test_a_chip_beyond_the_limit_of_a_request(server: EarthEngineServer) -> None:
    sensor = SensorSpec(bands=('B2', 'B3', 'B4', 'B8'), cloudy_pct=100, dtype='float32')
    window = ('2022-06-01', '2022-06-08')
    roi = BBox(10, 50, 11, 51)
    dataset = make(server, roi, time=window, sensor=sensor, on_missing='fill')
    where = query(dataset, px=1600)
    sample = dataset[where]
    assert sample['image'].shape == (4, 1600, 1600)
    assert server.counts()['requests'] == 4
    x, y, t = where
    # Across the seam of the parts.
    seam = (
        slice(x.start + 7840, x.start + 8160, 10),
        slice(y.start + 7840, y.start + 8160, 10),
        t,
    )
    inner = dataset[seam]['image']
    assert (sample['image'][:, 784:816, 784:816] == inner).all()


# No imagery.


@pytest.mark.parametrize('reason', ['place', 'clouds'])
def test_missing_imagery_is_an_error(server: EarthEngineServer, reason: str) -> None:
    roi = GAP if reason == 'place' else ROI
    sensor = SENSOR if reason == 'place' else SensorSpec(cloudy_pct=0)
    dataset = make(server, roi, sensor=sensor)
    with pytest.raises(NoImageryError, match='2022-06-01') as caught:
        dataset[query(dataset)]
    assert 'clouds' in str(caught.value)
    assert caught.value.chip is not None
    assert caught.value.chip.startswith('EPSG32632_x')


def test_missing_imagery_is_filled(server: EarthEngineServer) -> None:
    sensor = SensorSpec(fill_value=42)
    dataset = make(server, GAP, sensor=sensor, on_missing='fill')
    sample = dataset[query(dataset)]
    assert (sample['image'] == 42).all()
    assert sample['valid_fraction'] == torch.zeros(1)


def test_missing_imagery_is_skipped(server: EarthEngineServer) -> None:
    # From the tile that is never visited into the one beside it.
    dataset = make(server, shapely.box(10.5, 40.4, 11.5, 40.5), on_missing='skip')
    x, y, t = query(dataset)
    wanted = [
        (slice(x.start + i * 8000, x.stop + i * 8000, 10), y, t) for i in range(-4, 4)
    ]
    present = [
        bool(expected(dataset.crs, x, y, WINDOW, SENSOR)[1].any()) for x, y, _ in wanted
    ]
    assert 0 < sum(present) < 8
    samples = dataset.__getitems__(wanted)
    assert [sample is not None for sample in samples] == present
    found = dataset.submit(wanted, 'raise')()
    failures = [one for one in found if isinstance(one, ChipFailure)]
    assert [one.chip for one in failures] == np.flatnonzero(~np.array(present)).tolist()
    assert {one.reason for one in failures} == {'NoImageryError'}
    assert len(collate(samples)['image']) == sum(present)


# The cache.


def test_a_second_run_needs_no_network(
    server: EarthEngineServer, tmp_path: Path
) -> None:
    first = make(server, cache=tmp_path, on_missing='fill')
    wanted = [*grid(first, 3, 3), query(first, 20)]
    samples = first.__getitems__(wanted)
    second = EarthEngineDataset(
        ROI,
        WINDOW,
        SENSOR,
        cache=tmp_path,
        on_missing='fill',
        client=EarthEngineClient(url='http://127.0.0.1:9', retry_for=0.1),
    )
    before = server.counts()['requests']
    for old, new in zip(samples, second.__getitems__(wanted), strict=True):
        assert (old['image'] == new['image']).all()
        assert old['valid_fraction'] == new['valid_fraction']
    assert server.counts()['requests'] == before
    assert len(list(tmp_path.rglob('*.tif'))) == 10


def test_that_there_is_no_imagery_is_kept_too(
    server: EarthEngineServer, tmp_path: Path
) -> None:
    dataset = make(server, GAP, cache=tmp_path)
    for _ in range(2):
        with pytest.raises(NoImageryError):
            dataset[query(dataset)]
    assert server.counts()['requests'] == 1


def test_a_damaged_file_is_fetched_again(
    server: EarthEngineServer, tmp_path: Path
) -> None:
    dataset = make(server, cache=ChipCache(tmp_path))
    where = query(dataset)
    dataset[where]
    (path,) = tmp_path.rglob('*.tif')
    path.write_bytes(path.read_bytes()[:-300])
    assert_right(dataset, where, dataset[where])
    assert server.counts()['requests'] == 2
    assert_right(dataset, where, dataset[where])
    assert server.counts()['requests'] == 2


def test_prefetch_fills_the_cache(
    server: EarthEngineServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make(server, cache=tmp_path, block_size=64)
    wanted = grid(dataset, 4, 4)
    server.set(script=[503])
    report = dataset.prefetch(wanted)
    assert (report.chips, report.fetched, report.retries) == (16, 16, 1)
    assert report.requests == 5
    assert report.bytes > 16 * 32 * 32 * 6
    assert '16/16' in capsys.readouterr().err
    again = dataset.prefetch(iter(wanted), progress=False)
    assert (again.chips, again.fetched, again.requests) == (16, 0, 0)
    assert server.counts()['requests'] == 5
    with pytest.raises(SpecError, match='cache'):
        make(server).prefetch(wanted)


KILLED = """
import sys
sys.path.insert(0, '.')
from dynamicvis_geo.datasets import EarthEngineDataset
from dynamicvis_geo.earthengine import EarthEngineClient
from tests.datasets.composites import ROI, WINDOW, SENSOR, grid
dataset = EarthEngineDataset(
    ROI, WINDOW, SENSOR, cache=sys.argv[2], block_size=1,
    client=EarthEngineClient('p', sys.argv[1], max_concurrency=4))
dataset.prefetch(grid(dataset, 10, 10, 16), progress=False)
"""


def test_what_was_fetched_before_a_kill_is_not_fetched_again(
    start: Start, server: EarthEngineServer, tmp_path: Path
) -> None:
    # The fortieth waits, so that there is a moment for the kill.
    server.set(script=[None] * 39, kinds=['hang'], rate=1)
    cache = tmp_path / 'cache'
    process = start('-c', KILLED, server.url, cache)
    wait_for(lambda: server.counts()['served'] == 39, process)
    process.kill()
    process.wait(HANG)
    server.set()
    done = len(list(cache.rglob('[!.]*.tif')))
    assert 20 <= done < 100
    dataset = make(server, cache=cache, block_size=1)
    report = dataset.prefetch(grid(dataset, 10, 10, 16), progress=False)
    assert report.fetched == 100 - done
    assert server.counts()['requests'] == 100 - done
    for where in grid(dataset, 10, 10, 16)[::9]:
        assert_right(dataset, where, dataset[where])
