import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import rioxarray
from lightning.pytorch import Trainer
from rasterio.transform import from_bounds
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dynamicvis_geo import (
    BackboneConfig,
    BBox,
    ChipDataset,
    EarthEngineClient,
    EarthEngineDataset,
    FeatureExtraction,
    OutputSpec,
    PointBuffer,
    PointSampler,
    SensorSpec,
    TemporalSpec,
    collate,
    embedding,
    get_embedding,
    get_embeddings_batch,
    load_backbone,
    open_scenes,
)
from dynamicvis_geo.errors import NoImageryError, SpecError, UnavailableError
from tests.datasets.rasters import pattern, write_geotiff
from tests.earthengine_server import EarthEngineServer
from tests.places import (
    NOWHERE,
    PLOT,
    RANDOM,
    SENSOR,
    TEMPORAL,
    Native,
    Thumbnail,
    Vector,
    earth,
    normalised,
    pixels_of,
    quick,
)

__all__ = ('earth', 'quick')

pytestmark = pytest.mark.usefixtures('quick')

#: Two zones of the north, one of the south across the antimeridian, and UPS.
EVERYWHERE = (
    PLOT,
    PointBuffer(12.3, 50.4, 320),
    BBox(179.997, -16.505, -179.997, -16.5),
    PointBuffer(10.31, 50.4, 500),
    PointBuffer(10, 85, 320),
    PLOT,
)


# One place from Earth Engine.


def test_call_of_the_established_adapter(earth: dict[str, Any]) -> None:
    result = get_embedding(
        'dynamicvis',
        spatial=PointBuffer(lon=121.5, lat=31.2, buffer_m=2048),
        temporal=TemporalSpec.range('2022-06-01', '2022-09-01'),
        output=OutputSpec.pooled(),
        backend='gee',
        client=earth['client'],
        backbone=RANDOM,
    )
    assert isinstance(result.data, np.ndarray)
    assert result.data.dtype == np.float32
    assert result.data.shape == (768,)
    meta = json.loads(json.dumps(result.meta, allow_nan=False))
    assert meta == result.meta
    provenance = meta.pop('provenance')
    assert provenance['model']['preprocessing']['resize'] == [64, 64]
    assert provenance['source']['sources'][0]['dataset'] == 'EarthEngineDataset'
    sensor = meta.pop('sensor')
    assert sensor['collection'] == 'COPERNICUS/S2_SR_HARMONIZED'
    assert sensor['bands'] == ['B4', 'B3', 'B2']
    assert meta == {
        'model': 'dynamicvis',
        'backend': 'gee',
        'source': 'COPERNICUS/S2_SR_HARMONIZED',
        'start': '2022-06-01',
        'end': '2022-09-01',
        'input_time': '2022-07-17',
        'chip_id': 'EPSG32651_x355040_y3454790_410x410px_10m_20220601-20220901',
        'crs': 'EPSG:32651',
        'bounds': [355040.0, 3450690.0, 359140.0, 3454790.0],
        'image_shape': [3, 410, 410],
        'valid_fraction': 1.0,
        'image_size': 64,
        'weights': 'random',
        'hf_repo': None,
        'ckpt_file': None,
        'revision': None,
        'sha256': None,
        'arch': 'b',
        'path_type': 'forward_reverse_mean',
        'sampling_scale': 0.1,
        'mamba2': False,
        'implementation': 'native',
        'device': meta['device'],
        'feature_kind': 'featmap',
        'stage': 3,
        'feature_shape': [768, 2, 2],
        'grid_hw': [2, 2],
        'grid_kind': None,
        'pooling': 'featmap_mean',
    }


@pytest.mark.parametrize(
    'spatial',
    [PLOT, BBox(10.3, 50.4, 10.306, 50.403), EVERYWHERE[2], PointBuffer(10, -85, 325)],
)
def test_pixels_are_those_of_the_place(earth: dict[str, Any], spatial: Any) -> None:
    earth['temporal'] = TemporalSpec.range('2022-06-01', '2022-06-21')
    result = get_embedding(
        spatial=spatial, backbone=Native(), output=OutputSpec.grid(), **earth
    )
    image, valid = pixels_of(result.meta)
    assert result.meta['valid_fraction'] == pytest.approx(valid.mean(), abs=1e-6)
    np.testing.assert_allclose(result.data, normalised(image), atol=1e-5)


def test_square_measures_ground_metres_around_the_point(earth: dict[str, Any]) -> None:
    meta = get_embedding(
        spatial=PointBuffer(24.9, 60.2, 500), backbone=Native(), **earth
    ).meta
    minx, miny, maxx, maxy = meta['bounds']
    assert (maxx - minx, maxy - miny) == (1000, 1000)
    point = gpd.GeoSeries.from_xy([24.9], [60.2], crs=4326).to_crs(meta['crs'])[0]
    assert abs(point.x - (minx + maxx) / 2) <= 5
    assert abs(point.y - (miny + maxy) / 2) <= 5


def test_box_is_widened_to_whole_pixels(earth: dict[str, Any]) -> None:
    box = BBox(10.3, 50.4, 10.306, 50.403)
    meta = get_embedding(spatial=box, backbone=Native(), **earth).meta
    area = box.geometry.segmentize(1e-4).to_crs(meta['crs'])
    for edge, bound, outwards in zip(
        area.total_bounds, meta['bounds'], (-1, -1, 1, 1), strict=True
    ):
        assert bound % 10 == 0
        assert 0 <= (bound - edge) * outwards < 10


def test_scale_of_the_sensor_is_that_of_the_chip(earth: dict[str, Any]) -> None:
    earth['sensor'] = SensorSpec(cloudy_pct=90, scale_m=20, fill_value=1)
    result = get_embedding(
        spatial=PLOT, output=OutputSpec.grid(), backbone=Native(), **earth
    )
    assert result.meta['image_shape'] == [3, 33, 33]
    image, _ = pixels_of(result.meta, earth['sensor'])
    np.testing.assert_allclose(result.data, normalised(image), atol=1e-5)


def test_dates_have_a_default_that_is_told(server: EarthEngineServer) -> None:
    client = EarthEngineClient(project='x', url=server.url)
    with pytest.warns(UserWarning, match='2022-06-01 to before 2022-09-01') as record:
        meta = get_embedding(spatial=PLOT, client=client, backbone=Native()).meta
    assert (meta['start'], meta['end']) == ('2022-06-01', '2022-09-01')
    assert record[0].filename == __file__


# Output.


def test_numbers_are_those_of_a_trainer(earth: dict[str, Any]) -> None:
    dataset = EarthEngineDataset(PLOT, TEMPORAL, SENSOR, client=earth['client'])
    point = gpd.GeoSeries.from_xy([PLOT.lon], [PLOT.lat], crs=4326)
    chips = ChipDataset([(dataset, PointSampler(dataset, point, size=66))])
    trainer = Trainer(accelerator='cpu', logger=False, enable_progress_bar=False)
    backbone, _ = load_backbone(RANDOM)
    for output in (OutputSpec.pooled(), OutputSpec.pooled('max'), OutputSpec.grid()):
        result = get_embedding(spatial=PLOT, output=output, backbone=RANDOM, **earth)
        task = FeatureExtraction(backbone, output.mode, output.pooling)
        loader = DataLoader(chips, collate_fn=collate)
        [batch] = trainer.predict(task, loader)  # type: ignore[misc]
        assert result.meta['chip_id'] == chips.chips['chip_id'][0]
        assert result.meta['pooling'] == task.provenance['pooling']
        assert (np.asarray(result.data) == batch['embedding'][0].numpy()).all()


def test_grid_is_georeferenced(earth: dict[str, Any], tmp_path: Path) -> None:
    result = get_embedding(
        spatial=PLOT, output=OutputSpec.grid(), backbone=RANDOM, **earth
    )
    grid, meta = result.data, result.meta
    assert grid.dims == ('d', 'y', 'x')
    assert grid.dtype == np.float32
    assert grid.attrs['grid_kind'] == meta['grid_kind'] == 'last_stage_featmap'
    assert grid.shape == tuple(meta['feature_shape']) == (768, 2, 2)
    assert meta['pooling'] is None
    minx, miny, maxx, maxy = meta['bounds']
    assert grid.x.values.tolist() == [minx + 165, minx + 495]
    assert grid.y.values.tolist() == [maxy - 165, maxy - 495]
    assert grid.rio.crs == meta['crs']
    assert grid.rio.transform() == from_bounds(*meta['bounds'], 2, 2)
    # The file of a run's feature map opens in the same place.
    grid.rio.to_raster(tmp_path / 'map.tif')
    with rioxarray.open_rasterio(tmp_path / 'map.tif') as again:
        assert (again.values == grid.values).all()
        assert again.rio.bounds() == (minx, miny, maxx, maxy)


def test_grid_of_an_earlier_stage(earth: dict[str, Any]) -> None:
    grids = OutputSpec.grid()
    fine, again = (
        get_embedding(spatial=PLOT, output=grids, backbone=RANDOM, stage=1, **earth),
        get_embeddings_batch(
            spatials=[PLOT], output=grids, backbone=RANDOM, stage=1, **earth
        )[0],
    )
    np.testing.assert_array_equal(fine.data, again.data)
    meta = fine.meta
    assert fine.data.shape == tuple(meta['feature_shape']) == (192, 8, 8)
    assert fine.data.attrs['grid_kind'] == meta['grid_kind'] == 'stage_1_featmap'
    assert meta['stage'] == meta['provenance']['model']['stage'] == 1
    assert fine.data.rio.transform() == from_bounds(*meta['bounds'], 8, 8)
    pooled = get_embedding(spatial=PLOT, backbone=RANDOM, stage=1, **earth)
    means = np.asarray(fine.data).mean((1, 2))
    np.testing.assert_allclose(pooled.data, means, rtol=1e-4, atol=1e-5)
    # The last stage is of the same backbone, which has not been changed.
    last = get_embedding(spatial=PLOT, backbone=RANDOM, **earth)
    assert (last.meta['stage'], last.data.shape) == (3, (768,))


def test_map_of_one_cell_has_a_size(earth: dict[str, Any]) -> None:
    result = get_embedding(
        spatial=PLOT, output=OutputSpec.grid(), backbone=Vector(), **earth
    )
    assert result.meta['feature_kind'] == 'vector_as_1x1'
    assert result.meta['feature_shape'] == [3, 1, 1]
    assert result.data.rio.bounds() == tuple(result.meta['bounds'])
    pooled = get_embedding(spatial=PLOT, backbone=Vector(), **earth)
    assert pooled.meta['implementation'] == 'tests.places.Vector'
    assert pooled.meta['image_size'] is pooled.meta['weights'] is None
    assert (pooled.data == result.data.values[:, 0, 0]).all()


# Many places.


def test_batch_gives_each_place_in_order(earth: dict[str, Any]) -> None:
    results = get_embeddings_batch(
        spatials=list(EVERYWHERE), backbone=RANDOM, batch_size=4, **earth
    )
    assert [r.meta['crs'][5:] for r in results] == [
        '32632',
        '32633',
        '32701',
        '32632',
        '32661',
        '32632',
    ]
    for spatial, result in zip(EVERYWHERE, results, strict=True):
        alone = get_embedding(spatial=spatial, backbone=RANDOM, **earth)
        assert (result.data == alone.data).all()
        assert result.meta == alone.meta


def test_images_of_any_size_share_a_batch(earth: dict[str, Any]) -> None:
    batches = []

    class Counting(Thumbnail):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            batches.append(len(x))
            return super().forward(x)

    get_embeddings_batch(
        spatials=EVERYWHERE, backbone=Counting(), batch_size=4, **earth
    )
    assert batches == [4, 2]
    # Without a size of its own, only images of equal size can.
    sizes = [
        r.meta['image_shape']
        for r in get_embeddings_batch(
            spatials=EVERYWHERE, backbone=Native(), output=OutputSpec.grid(), **earth
        )
    ]
    assert sizes[0] == sizes[5] == [3, 66, 66] != sizes[1]


def test_fetches_up_to_the_configured_number_at_once(
    earth: dict[str, Any], server: EarthEngineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [PointBuffer(10.3 + i / 50, 50.4, 100) for i in range(9)]
    server.set(latency=0.15)
    monkeypatch.setenv('RS_EMBED_DYNAMICVIS_FETCH_WORKERS', '3')
    get_embeddings_batch(spatials=places, backbone=Native(), **earth)
    assert server.counts()['peak'] == 3


def test_no_places_give_no_embeddings(earth: dict[str, Any]) -> None:
    assert get_embeddings_batch(spatials=[], **earth) == []


# The model.


def test_model_is_loaded_once(
    earth: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []

    def load(config: BackboneConfig) -> tuple[nn.Module, dict[str, Any]]:
        loads.append(config)
        threading.Event().wait(0.05)
        return Thumbnail(), {'weights': 'made up', 'arch': 'b'}

    monkeypatch.setattr(embedding, 'load_backbone', load)
    monkeypatch.setattr(embedding, '_loaded', [])
    image = pattern(40, 40)

    def embed(size: int) -> Any:
        # A mapping makes the configuration unhashable; equal it is nevertheless.
        config = BackboneConfig(
            img_size=size, sampling_scale={'type': 'fixed', 'val': 0.1}
        )
        return get_embedding(input_chw=image, backbone=config, device='cpu').meta

    with ThreadPoolExecutor(4) as pool:
        metas = list(pool.map(embed, [32, 64, 32, 64]))
    assert len(loads) == 2
    assert {meta['weights'] for meta in metas} == {'made up'}
    get_embeddings_batch(spatials=[PLOT], backbone=loads[0], **earth)
    assert len(loads) == 2


# Errors.


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'model': 'prithvi'}, "model='prithvi'.*'dynamicvis'"),
        ({'model': None}, 'model=None'),
        ({'spatial': None}, 'spatial is missing.*PointBuffer'),
        ({'spatial': (10.3, 50.4)}, r'spatial=\(10.3, 50.4\).*PointBuffer'),
        ({'temporal': '2022'}, "temporal='2022'.*TemporalSpec"),
        ({'sensor': 'S2'}, "sensor='S2'.*SensorSpec"),
        ({'sensor': SensorSpec(bands=('B4', 'B3'))}, 'sensor.bands=.*three'),
        ({'output': 'pooled'}, "output='pooled'.*OutputSpec.pooled"),
        ({'backend': 'aws'}, "backend='aws'.*'gee', 'auto'"),
        ({'client': 'me'}, "client='me'.*EarthEngineClient"),
        ({'backbone': 'b'}, "backbone='b'.*BackboneConfig"),
        ({'stage': 5}, 'stage=5.*0, 1, 2, 3'),
        ({'device': 'gpu'}, "device='gpu'.*'cuda'"),
        ({'device': 'cuda:99'}, "device='cuda:99'"),
        ({'spatial': BBox(10, 50, 11, 51)}, 'spatial: BBox.* pixels, more.*4096'),
        ({'spatial': BBox(-170, -80, 170, 80)}, 'spatial: BBox.*more'),
        ({'spatial': PointBuffer(10, 50, 90000)}, '18000 x 18000 pixels.*GridSampler'),
        ({'spatial': PointBuffer(10, 50, 2)}, 'less than half a pixel'),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {
        'spatial': PLOT,
        'temporal': TEMPORAL,
        'backbone': Native(),
        **arguments,
    }
    with pytest.raises(SpecError, match=message):
        get_embedding(**options)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'spatials': PLOT}, 'spatials=PointBuffer.*list'),
        ({'spatials': 7}, 'spatials=7'),
        ({'spatials': [PLOT, None]}, r'spatials\[1\]=None is no place'),
        ({'spatials': [], 'model': 'x'}, "model='x'"),
        ({'spatials': [PLOT], 'batch_size': 0}, 'batch_size=0'),
        ({'spatials': [PLOT], 'batch_size': 2.5}, 'batch_size=2.5'),
    ],
)
def test_wrong_arguments_of_batches_are_named(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        get_embeddings_batch(temporal=TEMPORAL, backbone=Native(), **arguments)


def test_arguments_that_contradict_each_other(tmp_path: Path) -> None:
    write_geotiff(tmp_path / 'image.tif', pattern(100, 100))
    [scenes] = open_scenes(tmp_path)
    for name, given in (('sensor', SENSOR), ('client', EarthEngineClient())):
        with pytest.raises(SpecError, match=f'{name} is for Earth Engine.*Scenes'):
            get_embedding(spatial=PLOT, backend=scenes, **{name: given})
    with pytest.raises(SpecError, match=r'backend is a Scenes.*input_chw'):
        get_embedding(input_chw=pattern(64, 64), backend=scenes)


def test_place_without_imagery_is_named(earth: dict[str, Any]) -> None:
    with pytest.raises(NoImageryError, match=r'spatial: PointBuffer.*90 %') as caught:
        get_embedding(spatial=NOWHERE, backbone=Native(), **earth)
    assert caught.value.chip is not None
    assert caught.value.chip.startswith('EPSG32632')
    with pytest.raises(NoImageryError, match=r'spatials\[2\]: PointBuffer\(lon=10.5'):
        get_embeddings_batch(
            spatials=[PLOT, PLOT, NOWHERE, PLOT], backbone=Native(), **earth
        )


def test_failure_of_the_server_tells_of_the_place(
    earth: dict[str, Any], server: EarthEngineServer
) -> None:
    server.set(script=[503] * 1000)
    earth['client'] = EarthEngineClient(project='x', url=server.url, retry_for=0.3)
    with pytest.raises(UnavailableError) as caught:
        get_embeddings_batch(spatials=[PLOT], backbone=Native(), **earth)
    assert caught.value.status == 503
    assert 'spatials[0], PointBuffer(lon=10.3' in caught.value.__notes__[0]
