from pathlib import Path
from typing import Any

import geopandas as gpd
import pytest
import shapely

from dynamicvis_geo import (
    BBox,
    EarthEngineClient,
    EarthEngineDataModule,
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


def test_windows_in_all_their_forms() -> None:
    roi = '10,50,10.01,50.01'
    one = laid_out(roi=roi)['chip_id'].tolist()
    # What YAML makes of it.
    assert laid_out(roi=roi, time=list(TIME))['chip_id'].tolist() == one
    assert laid_out(roi=roi, time=TemporalSpec(*TIME))['chip_id'].tolist() == one
    years = [TemporalSpec.year(2021), ['2022-01-01', '2023-01-01']]
    both = laid_out(roi=roi, time=years)
    assert both['start'].dt.year.tolist() == [2021] * len(one) + [2022] * len(one)


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


def test_images_of_two_zones_in_one_batch(
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
    (batch,) = module.predict_dataloader()
    assert batch['image'].shape == (2, 3, 32, 32)
    assert batch['chip'].tolist() == [[0], [1]]
    assert (batch['valid_fraction'] > 0).all()
