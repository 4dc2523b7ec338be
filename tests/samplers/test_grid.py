import warnings
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from torchgeo.datasets import RasterDataset

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.samplers import GridSampler

from ..datasets.rasters import Areas, pattern, write_geotiff

# 25.6 km by 12.8 km in whole chips of 128 pixels of 10 m.
BOX = shapely.box(384_000, 4_300_800, 409_600, 4_313_600)


def corners(sampler: GridSampler) -> list[tuple[float, float]]:
    return [(x.start, y.stop) for x, y, _ in sampler]


def chip_boxes(sampler: GridSampler) -> list[shapely.Polygon]:
    return [shapely.box(x.start, y.start, x.stop, y.stop) for x, y, _ in sampler]


def test_covers_the_area_without_gap_or_overlap_from_the_north_west() -> None:
    sampler = GridSampler(Areas([BOX]), 128)
    assert len(sampler) == len(list(sampler)) == 20 * 10
    assert shapely.union_all(chip_boxes(sampler)).equals(BOX)
    x, y, t = next(iter(sampler))
    assert (x, y) == (
        slice(384_000, 385_280, 10.0),
        slice(4_312_320, 4_313_600, 10.0),
    )
    assert t == slice(pd.Timestamp('2022-06-01'), pd.Timestamp('2022-09-01'), 1)
    assert corners(sampler) == sorted(corners(sampler), key=lambda c: (-c[1], c[0]))


def test_place_of_a_chip_does_not_depend_on_the_roi() -> None:
    everything = set(corners(GridSampler(Areas([BOX]), (96, 128), (48, 100))))
    roi = shapely.Point(398_765, 4_306_789).buffer(2500)
    some = corners(GridSampler(Areas([BOX]), (96, 128), (48, 100), roi=roi))
    assert 0 < len(some) < len(everything)
    assert set(some) < everything
    assert all(x % 1000 == 0 and y % 480 == 0 for x, y in some)


@pytest.mark.parametrize('stride', [None, (64, 32), 200])
def test_agrees_with_every_chip_tried_one_by_one(
    stride: int | tuple[int, int] | None,
) -> None:
    roi = shapely.Polygon(
        [(385_000, 4_301_000), (408_000, 4_304_000), (390_000, 4_313_000)],
        [[(390_000, 4_305_000), (395_000, 4_304_500), (392_000, 4_308_000)]],
    )
    down, across = (
        (64, 64)
        if stride is None
        else stride
        if isinstance(stride, tuple)
        else (200,) * 2
    )
    found = set(corners(GridSampler(Areas([BOX]), 64, stride, roi=roi)))
    inside = set(corners(GridSampler(Areas([BOX]), 64, stride, roi=roi, edge='drop')))
    expected, wholly = set(), set()
    for i in range(38_400 // across - 3, 41_000 // across + 3):
        for j in range(430_000 // down - 3, 431_400 // down + 3):
            west, north = i * across * 10.0, j * down * 10.0
            chip = shapely.box(west, north - 640, west + 640, north)
            if chip.intersection(roi).area > 1:
                expected.add((west, north))
            if roi.covers(chip):
                wholly.add((west, north))
    assert found == expected
    assert inside == wholly


def test_to_share_an_edge_is_not_to_touch() -> None:
    assert len(GridSampler(Areas([BOX]), 128, roi=shapely.box(*BOX.bounds))) == 200
    chip = shapely.box(385_280, 4_302_080, 386_560, 4_303_360)
    assert corners(GridSampler(Areas([BOX]), 128, roi=chip)) == [(385_280, 4_303_360)]
    beside = shapely.box(BOX.bounds[2], 4_302_080, 500_000, 4_303_360)
    assert len(GridSampler(Areas([BOX]), 128, roi=beside)) == 0


@pytest.mark.parametrize(
    ('roi', 'count'),
    [
        (shapely.Point(385_001, 4_302_001), 1),
        (shapely.Point(385_280, 4_302_500), 2),
        (shapely.Point(384_000, 4_313_600), 1),
        (shapely.LineString([(385_000, 4_302_000), (387_000, 4_302_000)]), 3),
        (shapely.box(385_000, 4_302_000, 385_003, 4_302_003), 1),
        (shapely.MultiPoint([(385_001, 4_302_001), (400_001, 4_310_001)]), 2),
        (shapely.Point(0, 0), 0),
    ],
)
def test_small_regions_points_and_lines(
    roi: shapely.geometry.base.BaseGeometry, count: int
) -> None:
    assert len(GridSampler(Areas([BOX]), 128, roi=roi)) == count


def test_data_smaller_than_a_chip_give_one() -> None:
    assert len(GridSampler(Areas([shapely.box(0, 10, 30, 40)]), 512)) == 1
    assert len(GridSampler(Areas([shapely.Point(5, 15)]), 512)) == 1
    assert len(GridSampler(Areas([shapely.box(0, 10, 30, 40)]), 512, edge='drop')) == 0


def test_roi_in_another_crs() -> None:
    roi = gpd.GeoSeries([shapely.Point(398_765, 4_306_789).buffer(2500)], crs=32618)
    here = corners(GridSampler(Areas([BOX]), 64, roi=roi.iloc[0]))
    lonlat = gpd.GeoDataFrame(geometry=roi).to_crs(4326)
    assert corners(GridSampler(Areas([BOX]), 64, roi=lonlat)) == here
    assert corners(GridSampler(Areas([BOX]), 64, roi=lonlat.geometry)) == here


def test_straight_sides_of_a_large_roi_bend_with_the_crs() -> None:
    # At 60 degrees the chord of 6 degrees of a parallel runs 13 km off it.
    dataset = Areas([shapely.box(300_000, 6_600_000, 700_000, 6_700_000)])
    south_of_60 = gpd.GeoSeries([shapely.box(-78, 50, -72, 60)], crs=4326)
    chips = gpd.GeoSeries(
        chip_boxes(GridSampler(dataset, 100, roi=south_of_60)), crs=32618
    ).to_crs(4326)
    assert len(chips)
    assert (chips.bounds.miny < 60).all()


def test_every_time_window_has_its_own_area() -> None:
    west, east = shapely.box(0, 0, 1280, 1280), shapely.box(1280, 0, 2560, 1280)
    times = [('2023-01-01', '2023-02-01'), ('2022-01-01', '2022-02-01')]
    dataset = Areas([west, east, east], [*times, times[0]])
    found = [(x.start, t.start.year) for x, _, t in GridSampler(dataset, 128)]
    assert found == [(1280, 2022), (0, 2023), (1280, 2023)]
    late = GridSampler(dataset, 128, toi=('2023-01-15', '2024-01-01'))
    assert list({t.start: t for _, _, t in late}.values()) == [
        slice(pd.Timestamp('2023-01-01'), pd.Timestamp('2023-02-01'), 1)
    ]
    # The end is exclusive, that of an interval as it says.
    assert len(GridSampler(dataset, 128, toi=('2022-12-01', '2023-01-01'))) == 0
    closed = pd.Interval(
        pd.Timestamp('2022-12-01'), pd.Timestamp('2023-01-01'), closed='right'
    )
    assert len(GridSampler(dataset, 128, toi=closed)) == 2


def test_drop_keeps_chips_across_the_seam_of_two_files() -> None:
    left, right = shapely.box(0, 0, 1900, 1280), shapely.box(1900 + 1e-6, 0, 3840, 1280)
    assert len(GridSampler(Areas([left, right]), 128, edge='drop')) == 3
    gap = shapely.box(1910, 0, 3840, 1280)
    assert len(GridSampler(Areas([left, gap]), 128, edge='drop')) == 2


@pytest.mark.parametrize(
    ('west', 'north', 'res', 'crs'),
    [
        (400_000.0, 4_300_000.0, 10.0, 'EPSG:32618'),
        (400_000.0 + 10 / 3, 4_300_000.0 - 10 / 3, 10.0, 'EPSG:32618'),
        (452_475.0, 3_408_645.0, 30.0, 'EPSG:32616'),
        (-71.123456789, 44.987654321, 0.0001, 'EPSG:4326'),
        (-71.25, 44.5, 1 / 3600, 'EPSG:4326'),
        (9_999_995.1, -19_000_000.3, 0.6, 'EPSG:3857'),
    ],
)
def test_chips_are_the_pixels_of_the_file(
    tmp_path: Path, west: float, north: float, res: float, crs: str
) -> None:
    pixels = pattern(150, 170)
    write_geotiff(tmp_path / 'a.tif', pixels, west, north, res, crs)
    dataset = RasterDataset(tmp_path)
    sampler = GridSampler(dataset, (48, 32), edge='drop')
    assert len(sampler) >= 2 * 4
    for query in sampler:
        x, y, _ = query
        assert round((x.stop - x.start) / x.step, 6) == 32
        row = round((north - y.stop) / res)
        col = round((x.start - west) / res)
        expected = pixels[:, row : row + 48, col : col + 32].astype(np.float32)
        np.testing.assert_array_equal(dataset[query]['image'].numpy(), expected)


def test_lattice_of_joined_datasets_is_that_of_the_first_file(tmp_path: Path) -> None:
    write_geotiff(tmp_path / 'a.tif', pattern(100, 100), west=400_003.0)
    write_geotiff(tmp_path / 'b.tif', pattern(100, 100), west=400_003.0)
    one, two = RasterDataset(tmp_path / 'a.tif'), RasterDataset(tmp_path / 'b.tif')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        joined = [one & two, one | two, (one & two) | one]
    for dataset in joined:
        assert {x % 320 for x, _ in corners(GridSampler(dataset, 32))} == {3.0}


def test_512_stays_512_far_from_the_origin() -> None:
    far = Areas([shapely.box(2e7, 2e7, 2e7 + 1e4, 2e7 + 1e4)], crs='EPSG:3857', res=0.1)
    for x, y, _ in GridSampler(far, 512, stride=5120):
        assert round((x.stop - x.start) / 0.1, 4) == 512
        assert round((y.stop - y.start) / 0.1, 4) == 512


@pytest.mark.parametrize(
    ('arguments', 'names'),
    [
        ({'size': 0}, 'size=0'),
        ({'size': 12.5}, 'size=12.5'),
        ({'size': True}, 'size=True'),
        ({'size': (64, 64, 3)}, 'size='),
        ({'size': 64, 'stride': -1}, 'stride=-1'),
        ({'size': 64, 'edge': 'crop'}, "edge='crop'"),
        ({'size': 64, 'roi': (0, 0, 1, 1)}, 'roi='),
        ({'size': 64, 'roi': shapely.Polygon()}, 'roi is empty'),
        ({'size': 64, 'roi': gpd.GeoSeries([BOX])}, 'roi has no CRS'),
        ({'size': 64, 'toi': '2022'}, "toi='2022'"),
        ({'size': 64, 'toi': ('2023-01-01', '2022-01-01')}, 'ends before it starts'),
        ({'size': 64, 'toi': (None, '2022-01-01')}, 'toi='),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], names: str) -> None:
    with pytest.raises(SpecError, match=names):
        GridSampler(Areas([BOX]), **arguments)  # type: ignore[arg-type]


def test_a_dataset_without_resolution_is_refused() -> None:
    with pytest.raises(SpecError, match=r'set dataset\.res'):
        GridSampler(Areas([BOX], res=0.0), 64)


def test_features_of_a_roi_far_beyond_the_crs_are_left_out() -> None:
    places = [shapely.Point(-75.5, 38.9), shapely.Point(15.0, 0.0)]
    roi = gpd.GeoSeries(places, crs=4326)
    dataset = Areas([shapely.box(0, 4_000_000, 1_000_000, 5_000_000)])
    assert len(GridSampler(dataset, 64, roi=roi)) == 1
