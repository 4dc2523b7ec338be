"""What a run says it will do, against what it does."""

from datetime import datetime
from pathlib import Path
from typing import Any

import geopandas as gpd
import pytest

from dynamicvis_geo import (
    EarthEngineClient,
    EarthEngineDataModule,
    SensorSpec,
)
from dynamicvis_geo.errors import SpecError
from tests.earthengine_server import EarthEngineServer, world

TIME = ('2022-06-01', '2022-07-21')
#: 12 chips of 64 pixels on both sides of a border of zones, and one far away.
AREA = '11.99,50.395,12.01,50.405'


@pytest.fixture
def earth(server: EarthEngineServer) -> dict[str, Any]:
    client = EarthEngineClient(project='x', url=server.url)
    return {
        'time': TIME,
        'size': 64,
        'sensor': SensorSpec(cloudy_pct=90),
        'client': client,
    }


def pixels_asked_for(server: EarthEngineServer) -> int:
    sizes = [request['grid']['dimensions'] for request in server.log()]
    return sum(size['width'] * size['height'] for size in sizes)


@pytest.mark.parametrize('batch_size', [1, 4, 100])
def test_requests_and_bytes_are_those_of_the_run(
    server: EarthEngineServer, earth: dict[str, Any], batch_size: int
) -> None:
    module = EarthEngineDataModule(
        roi=AREA, on_missing='fill', batch_size=batch_size, **earth
    )
    plan = module.plan()
    assert server.counts()['requests'] == 0
    assert sum(len(batch['chip']) for batch in module.predict_dataloader()) == (
        plan.chips
    )
    assert plan.requests == server.counts()['requests']
    assert plan.fetch_bytes == pixels_asked_for(server) * 3 * 2
    assert plan.zones == ('EPSG:32632', 'EPSG:32633')
    assert (plan.side, plan.finished, plan.laid_out) == (64, 0, True)
    assert plan.write_bytes == plan.output_bytes == plan.chips * 768 * 4
    assert not plan.excess


def test_fetching_ahead(
    server: EarthEngineServer, earth: dict[str, Any], tmp_path: Path
) -> None:
    module = EarthEngineDataModule(roi=AREA, cache=tmp_path / 'cache', **earth)
    plan = module.plan_fetch()
    assert (plan.finished, plan.chip_bytes) == (0, 64 * 64 * 3 * 2)
    pairs = module.pairs
    reports = [
        dataset.prefetch(sampler, progress=False)  # type: ignore[attr-defined]
        for dataset, sampler in pairs[:1]
    ]
    half = module.plan_fetch()
    assert half.finished == reports[0].chips
    assert plan.requests == half.requests + reports[0].requests
    assert plan.fetch_bytes == half.fetch_bytes + pixels_asked_for(server) * 3 * 2
    assert half.write_bytes == (half.chips - half.finished) * half.chip_bytes
    # What is in the cache is no work that is finished for a run of the model.
    assert module.plan().finished == 0
    for dataset, sampler in pairs[1:]:
        dataset.prefetch(sampler, progress=False)  # type: ignore[attr-defined]
    for done in (module.plan_fetch(), module.plan()):
        assert (done.requests, done.fetch_bytes) == (0, 0)


def test_requests_of_many_chips_are_counted_for_a_part(
    earth: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = EarthEngineDataModule(roi='10,50,10.25,50.2', **earth)
    exact = module.plan()
    monkeypatch.setattr('dynamicvis_geo.datamodules.chips.COUNTED', 200)
    assert exact.chips > 900
    assert module.plan().requests == pytest.approx(exact.requests, rel=0.05)
    assert module.plan().fetch_bytes == pytest.approx(exact.fetch_bytes, rel=0.05)


def test_the_whole_earth_is_told_from_its_area(earth: dict[str, Any]) -> None:
    for size, stride in ((64, None), (64, 16)):
        module = EarthEngineDataModule(
            roi='-180,-90,180,90', stride=stride, **{**earth, 'size': size}
        )
        plan = module.plan()
        assert not plan.laid_out
        metres = 10 * (stride or size)
        assert plan.chips * metres**2 == pytest.approx(510.066e12, rel=0.01)
        assert len(plan.zones) == 122
        assert plan.excess[0] == 'more than 1,000,000 chips'


@pytest.mark.parametrize(
    ('roi', 'stride'),
    [
        ('10,50,10.1,50.1', None),
        ('179.85,-16.1,-179.95,-16', None),
        ('5.9,63.95,6.1,64.05', 40),
    ],
)
def test_the_area_tells_of_no_more_chips_than_there_are(
    earth: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    roi: str,
    stride: int | None,
) -> None:
    module = EarthEngineDataModule(roi=roi, stride=stride, **earth)
    laid_out = module.plan()
    monkeypatch.setattr('dynamicvis_geo.datamodules.plan.MOST_CHIPS', 10)
    told = module.plan()
    assert not told.laid_out
    assert 0.5 * laid_out.chips < told.chips <= laid_out.chips
    assert told.zones == laid_out.zones


def test_many_points_are_counted_without_chips(
    earth: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('dynamicvis_geo.datamodules.plan.MOST_CHIPS', 3)
    points = gpd.GeoDataFrame(
        geometry=gpd.points_from_xy([10.3, 12.3], [50.4, 50.4]), crs=4326
    )
    windows = [TIME, ('2021-06-01', '2021-07-21')]
    module = EarthEngineDataModule(points=points, **{**earth, 'time': windows})
    plan = module.plan()
    assert (plan.chips, plan.laid_out, len(plan.zones)) == (4, False, 2)


@pytest.mark.parametrize('roi', [True, False])
def test_scenes_of_one_chip_take_one_request(
    server: EarthEngineServer, earth: dict[str, Any], roi: bool
) -> None:
    where = {'roi': '10.3,50.4,10.302,50.402'}
    if not roi:
        points = gpd.GeoDataFrame(
            geometry=gpd.points_from_xy([10.301], [50.401]), crs=4326
        )
        where = {'points': points}
    module = EarthEngineDataModule(**where, **earth)
    start, end = map(datetime.fromisoformat, TIME)
    around = (10.299, 50.399, 10.303, 50.403)
    scenes = [
        scene
        for scene in world.scenes(world.SENTINEL2, around, start, end)
        if scene.properties['CLOUDY_PIXEL_PERCENTAGE'] <= 90
    ]
    assert module.count_scenes() == len(scenes) > 5
    (request,) = server.log()
    assert request['grid']['dimensions'] == {'width': 1, 'height': 1}


@pytest.mark.parametrize('argument', [{'size': 0}, {'stride': 0}, {'size': -1}])
def test_wrong_sizes_are_no_plan(
    earth: dict[str, Any], argument: dict[str, int]
) -> None:
    (name,) = argument
    with pytest.raises(SpecError, match=name):
        EarthEngineDataModule(roi=AREA, **{**earth, **argument}).plan()
