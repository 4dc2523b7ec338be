from pathlib import Path
from typing import Any

import geopandas as gpd
import pytest
import shapely

from dynamicvis_geo import (
    BBox,
    EarthEngineClient,
    EarthEngineDataModule,
    PointBuffer,
    SensorSpec,
    TemporalSpec,
)
from dynamicvis_geo.errors import SourceError, SpecError
from tests.earthengine_server import EarthEngineServer

TIME = ('2022-06-01', '2022-07-21')
BOX = (11.99, 50.39, 12.01, 50.41)
PLOTS = 'id,lon,lat\na,10.3,50.4\nb,12.3,50.4\nc,10.31,50.4\nd,-179.99,-17\n'


def laid_out(**arguments: Any) -> gpd.GeoDataFrame:
    module = EarthEngineDataModule(**{'time': TIME, 'size': 64, **arguments})
    module.setup('predict')
    return module.chips.chips


def test_an_area_in_all_its_forms_is_the_same_chips(tmp_path: Path) -> None:
    box = shapely.box(*BOX)
    table = gpd.GeoDataFrame(geometry=[box], crs=4326)
    table.to_file(tmp_path / 'area.gpkg')
    forms = [box, table, BBox(*BOX), box.wkt, '11.99,50.39,12.01,50.41']
    forms += [tmp_path / 'area.gpkg', str(tmp_path / 'area.gpkg')]
    chips = [set(laid_out(roi=roi)['chip_id']) for roi in forms]
    assert all(ids == chips[0] for ids in chips)
    assert {name[:10] for name in chips[0]} == {'EPSG32632_', 'EPSG32633_'}


def test_an_area_as_a_long_text_and_as_a_triangle() -> None:
    circle = shapely.Point(12, 50.4).buffer(0.01, quad_segs=64)
    assert len(circle.wkt) > 255
    triangle = shapely.Polygon([(12, 50.4), (12.01, 50.4), (12, 50.41)])
    for area in (circle, triangle):
        ids = laid_out(roi=area.wkt)['chip_id'].tolist()
        assert ids == laid_out(roi=area)['chip_id'].tolist()


def square(lon: float, lat: float, metres: float) -> gpd.GeoSeries:
    """A square around a place in its UTM zone, whose sides bend in no other CRS."""
    return PointBuffer(lon, lat, metres).geometry.segmentize(50)


def turned(area: gpd.GeoSeries, west: float) -> shapely.Polygon:
    """An area in longitudes that are counted on from *west*."""
    lon, lat = shapely.get_coordinates(area.to_crs(4326)[0]).T
    return shapely.Polygon(zip((lon - west) % 360 + west, lat, strict=True))


FIJI = square(179.99, -17, 5000)


@pytest.mark.parametrize(
    'roi',
    [
        PointBuffer(179.99, -17, 5000),
        FIJI.to_crs(3460),
        FIJI.to_crs(3832),
        turned(FIJI, 0),
        turned(FIJI, -360),
        turned(FIJI, -180),
    ],
    ids=['buffer', 'Fiji 1986', 'Mercator of the Pacific', 'east', 'west', 'jumping'],
)
def test_an_area_across_the_antimeridian(roi: Any) -> None:
    west, south, east, north = turned(FIJI, 0).bounds
    chips = laid_out(roi=BBox(west, south, east - 360, north), size=512)
    assert set(chips['crs']) == {'EPSG:32701', 'EPSG:32760'}
    assert set(laid_out(roi=roi, size=512)['chip_id']) == set(chips['chip_id'])


def test_a_line_across_the_antimeridian() -> None:
    lines = ['179.9 -17, 180.1 -17', '179.9 -17, -179.9 -17', '-180.1 -17, -179.9 -17']
    ids = [set(laid_out(roi=f'LINESTRING ({line})')['chip_id']) for line in lines]
    assert ids[0] == ids[1] == ids[2]
    assert {name[:10] for name in ids[0]} == {'EPSG32701_', 'EPSG32760_'}


@pytest.mark.parametrize(
    ('lat', 'code'), [(90, 3995), (90, 3413), (-90, 3031), (-90, 32761)]
)
def test_a_cap_around_a_pole(lat: int, code: int) -> None:
    centre = gpd.GeoSeries([shapely.Point(0, lat)], crs=4326).to_crs(code)
    chips = laid_out(roi=centre.buffer(20_000), size=512)
    assert set(chips['crs']) == {'EPSG:32661' if lat > 0 else 'EPSG:32761'}
    # A disk of this radius takes 48 squares of 5120 m, and those along its rim.
    assert 48 <= len(chips) <= 48 + 36
    assert chips.geometry.total_bounds[0] == -180


@pytest.mark.parametrize('code', [4326, 3857, 32631, 32632, 3035])
@pytest.mark.parametrize('west', [5.95, 6.0, 5.9])
def test_an_area_at_the_border_of_zones(code: int, west: float) -> None:
    box = shapely.box(west, 45, west + 0.1, 45.1)
    area = gpd.GeoSeries([box], crs=4326)
    chips = laid_out(roi=area.segmentize(0.0005).to_crs(code), size=512)
    assert set(chips['chip_id']) == set(laid_out(roi=box, size=512)['chip_id'])
    assert chips['crs'].nunique() == (2 if west == 5.95 else 1)


def test_an_area_of_whole_chips_is_these_chips() -> None:
    box = shapely.box(512_000, 5_120_000, 512_000 + 2 * 5120, 5_120_000 + 5120)
    chips = laid_out(roi=gpd.GeoSeries([box], crs=32632), size=512)
    assert len(chips) == 2


@pytest.mark.parametrize('lon', [6, 180, -180])
@pytest.mark.parametrize('lat', [45, 0, 56, 84, -80])
def test_a_point_on_the_border_of_zones(lon: int, lat: int) -> None:
    point = gpd.GeoSeries([shapely.Point(lon, lat)], crs=4326)
    ids = {
        laid_out(points=gpd.GeoDataFrame(geometry=point.to_crs(code)))['chip_id'][0]
        for code in (4326, 3857, 4087)
    }
    assert len(ids) == 1


def test_windows_in_all_their_forms() -> None:
    roi = '10,50,10.01,50.01'
    one = laid_out(roi=roi)['chip_id'].tolist()
    # What YAML makes of it.
    assert laid_out(roi=roi, time=list(TIME))['chip_id'].tolist() == one
    assert laid_out(roi=roi, time=TemporalSpec(*TIME))['chip_id'].tolist() == one
    years = [TemporalSpec.year(2021), ['2022-01-01', '2023-01-01']]
    both = laid_out(roi=roi, time=years)
    assert both['start'].dt.year.tolist() == [2021] * len(one) + [2022] * len(one)
    # One that is given twice is one.
    again = EarthEngineDataModule(roi=roi, time=[*years, ['2021-01-01', '2022-01-01']])
    assert again.time == TemporalSpec.years(2021, 2022)


def test_points_of_all_zones_keep_their_ids(tmp_path: Path) -> None:
    (tmp_path / 'plots.csv').write_text(PLOTS)
    chips = laid_out(points=str(tmp_path / 'plots.csv'))
    assert dict(zip(chips['point_id'], chips['crs'], strict=True)) == {
        'a': 'EPSG:32632',
        'c': 'EPSG:32632',
        'b': 'EPSG:32633',
        'd': 'EPSG:32701',
    }
    for chip in chips.itertuples():
        (lon, lat) = {
            line.split(',')[0]: tuple(map(float, line.split(',')[1:]))
            for line in PLOTS.splitlines()[1:]
        }[chip.point_id]
        assert chip.geometry.contains(shapely.Point(lon, lat))


def test_size_by_the_ground() -> None:
    chips = laid_out(
        roi='10,50,10.01,50.01',
        size=None,
        buffer_m=480,
        sensor=SensorSpec(scale_m=15),
    )
    assert set(chips['width']) == {64}
    assert set(chips['xres']) == {15}
    assert set(laid_out(roi='10,50,10.01,50.01', size=None)['width']) == {512}


@pytest.mark.parametrize(
    ('arguments', 'names'),
    [
        ({}, 'roi or points'),
        ({'roi': '10,50,11,51', 'points': 'p.csv'}, 'roi or points'),
        ({'roi': '10,50,11,51', 'time': None}, 'time is missing'),
        ({'roi': '10,50,11,51', 'time': 'June'}, "time='June'"),
        ({'roi': '10,50,11,51', 'buffer_m': 100}, 'size or buffer_m'),
        ({'roi': '10,50,11,51', 'size': None, 'buffer_m': 1}, 'half a pixel'),
        ({'points': 'p.csv', 'stride': 9}, 'stride=9'),
        ({'roi': '50,10,11,51'}, 'roi='),
        ({'roi': '10,50,11,51', 'size': -1}, 'size=-1'),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], names: str) -> None:
    with pytest.raises(SpecError, match=names):
        laid_out(**arguments)


def test_points_that_are_missing() -> None:
    with pytest.raises(SourceError, match='no such file'):
        laid_out(points='nowhere.csv')


def test_images_of_two_zones_in_one_run(
    server: EarthEngineServer, tmp_path: Path
) -> None:
    points = gpd.GeoDataFrame(
        geometry=gpd.points_from_xy([10.3, 12.3], [50.4, 50.4]), crs=4326
    )
    module = EarthEngineDataModule(
        points=points,
        time=TIME,
        size=32,
        sensor=SensorSpec(cloudy_pct=90),
        client=EarthEngineClient(project='test-project', url=server.url),
        cache=tmp_path,
    )
    batches = [*module.predict_dataloader()]
    assert [batch['image'].shape for batch in batches] == [(1, 3, 32, 32)] * 2
    assert [batch['chip'].tolist() for batch in batches] == [[[0]], [[1]]]
    assert all((batch['valid_fraction'] > 0).all() for batch in batches)
