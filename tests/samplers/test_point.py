from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import shapely
from torchgeo.datasets import RasterDataset

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.samplers import PointSampler

from ..datasets.rasters import UTM, Areas, pattern, write_geotiff

BOX = shapely.box(400_000, 4_290_000, 410_000, 4_300_000)


def points(*places: tuple[float, float], **columns: list[object]) -> gpd.GeoDataFrame:
    xs, ys = zip(*places, strict=True)
    return gpd.GeoDataFrame(columns, geometry=gpd.points_from_xy(xs, ys), crs=UTM)


@pytest.mark.parametrize('size', [64, 65, (31, 48)])
def test_chip_is_centred_and_on_the_pixels(size: int | tuple[int, int]) -> None:
    places = [(404_321.7, 4_295_432.1), (401_000.0, 4_299_000.0)]
    height, width = size if isinstance(size, tuple) else (size, size)
    for (px, py), (x, y, _) in zip(
        places, PointSampler(Areas([BOX]), points(*places), size), strict=True
    ):
        assert x.start % 10 == 0
        assert y.start % 10 == 0
        assert (x.stop - x.start, y.stop - y.start) == (width * 10, height * 10)
        assert abs((x.start + x.stop) / 2 - px) <= 5
        assert abs((y.start + y.stop) / 2 - py) <= 5


def test_pixels_of_a_file_off_the_lattice_of_its_crs(tmp_path: Path) -> None:
    pixels = pattern(100, 120)
    west, north = 400_000 + 10 / 3, 4_300_000 - 20 / 3
    dataset = RasterDataset(write_geotiff(tmp_path / 'a.tif', pixels, west, north))
    # The centre of the pixel in row 40, column 50.
    place = points((west + 505, north - 405))
    (query,) = PointSampler(dataset, place.to_crs(4326), 33)
    np.testing.assert_array_equal(
        dataset[query]['image'].numpy(), pixels[:, 24:57, 34:67].astype(np.float32)
    )


def test_one_chip_for_each_window_that_shows_the_point() -> None:
    west, east = shapely.box(0, 0, 1000, 1000), shapely.box(500, 0, 1500, 1000)
    times = [('2022-01-01', '2022-02-01'), ('2023-01-01', '2023-02-01')]
    places = points((1200, 500), (700, 500), (100, 500), id=['e', 'm', 'w'])
    sampler = PointSampler(Areas([west, east], times), places, 8)
    years = [t.start.year for _, _, t in sampler]
    assert sampler.point_ids == ['e', 'm', 'm', 'w']
    assert years == [2023, 2022, 2023, 2022]
    assert len(sampler) == 4


def test_ids_are_the_index_where_there_is_no_id_column() -> None:
    table = points((404_000, 4_295_000), (405_000, 4_295_000)).set_index(
        np.array(['a', 'b'])
    )
    assert PointSampler(Areas([BOX]), table, 8).point_ids == ['a', 'b']
    assert PointSampler(Areas([BOX]), table.geometry, 8).point_ids == ['a', 'b']


def test_a_point_on_the_border_counts_and_doubles_are_kept() -> None:
    table = points((400_000, 4_300_000), (404_000, 4_295_000), (404_000, 4_295_000))
    assert PointSampler(Areas([BOX]), table, 8).point_ids == ['0', '1', '2']


def test_points_outside_are_listed_with_the_bounds_of_the_data() -> None:
    table = points((404_000, 4_295_000), (300_000, 4_295_000), id=['in', 'P7'])
    with pytest.raises(SpecError, match=r'1 of 2 points') as error:
        PointSampler(Areas([BOX]), table.to_crs(4326), 8)
    message = str(error.value)
    assert 'P7 (-77.30' in message
    assert '-76.15' in message
    assert '38.84' in message
    assert '\n' not in message


@pytest.mark.parametrize(
    ('wrong', 'names'),
    [
        (gpd.GeoSeries([], crs=UTM), 'no points'),
        (gpd.GeoSeries([shapely.Point(404_000, 4_295_000)]), 'no CRS'),
        (gpd.GeoSeries([BOX], crs=UTM), 'row 1 has Polygon'),
        (gpd.GeoSeries([shapely.Point(), None], crs=UTM), 'rows 1, 2 have no coord'),
        (points((404_000, 4_295_000), id=[None]), "column 'id'"),
        ([(404_000, 4_295_000)], 'points=list'),
    ],
)
def test_wrong_points(wrong: object, names: str) -> None:
    with pytest.raises(SpecError, match=names):
        PointSampler(Areas([BOX]), wrong, 8)  # type: ignore[arg-type]
