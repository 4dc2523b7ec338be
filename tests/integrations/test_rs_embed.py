"""DynamicVis as a model of rs-embed."""

# ruff: noqa: E402
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rioxarray  # noqa: F401 - the accessor
import xarray as xr

import dynamicvis_geo as dv
from tests.datasets.rasters import pattern
from tests.earthengine_server import EarthEngineServer
from tests.integrations.rs_embed_material import (
    BOX,
    NOWHERE,
    PLOT,
    S2,
    TEMPORAL,
    provided,
)
from tests.places import DATES, RANDOM, earth, quick

rs_embed = pytest.importorskip('rs_embed')
from rs_embed.core.errors import ModelError
from rs_embed.providers import ProviderBase, register_provider
from rs_embed.tools.projection import common_grid

from dynamicvis_geo.integrations.rs_embed import (
    DynamicVisEmbedder,
    EarthEngineProvider,
)

__all__ = ('earth', 'provided', 'quick')

pytestmark = pytest.mark.usefixtures('provided')

CLOUDY = rs_embed.FetchSpec(cloudy_pct=90)
CALL: dict[str, Any] = {
    'temporal': TEMPORAL,
    'fetch': CLOUDY,
    'backend': 'dynamicvis_geo',
    'device': 'cpu',
    'weights': 'random',
}
OUTPUTS = {
    'mean': (rs_embed.OutputSpec.pooled(), dv.OutputSpec.pooled()),
    'max': (rs_embed.OutputSpec.pooled('max'), dv.OutputSpec.pooled('max')),
    'grid': (rs_embed.OutputSpec.grid(), dv.OutputSpec.grid()),
}


class Archive(ProviderBase):
    """Another's provider, on rs-embed's own grid."""

    name = 'archive'

    def ensure_ready(self) -> None:
        pass

    def fetch_sensor_patch_chw(self, **request: Any) -> Any:
        return EarthEngineProvider().fetch_sensor_patch_chw(**request)


register_provider('archive', Archive)


def ours(place: Any, output: dv.OutputSpec, earth: dict[str, Any]) -> dv.Embedding:
    spatial = (
        dv.BBox(place.minlon, place.minlat, place.maxlon, place.maxlat)
        if isinstance(place, rs_embed.BBox)
        else dv.PointBuffer(place.lon, place.lat, place.buffer_m)
    )
    return dv.get_embedding(spatial=spatial, output=output, backbone=RANDOM, **earth)


def same(one: Any, other: Any) -> bool:
    """Tell if features are equal, and those of a map in the same place."""
    if isinstance(other, xr.DataArray):
        return bool(one.identical(other))
    return one.dtype == other.dtype and np.array_equal(one, other)


# The model.


def test_model_is_listed_and_described() -> None:
    assert 'dynamicvis' in rs_embed.list_models()
    told = rs_embed.describe_model('dynamicvis')
    assert told['inputs'] == {'collection': S2, 'bands': ['B4', 'B3', 'B2']}
    assert told['output'] == ['pooled', 'grid']
    assert told['defaults']['image_size'] == [64, 64]
    assert 'large' in told['model_config']['variant']['choices']
    assert told['model_config']['path_type']['default'] == 'forward_reverse_mean'
    assert json.loads(json.dumps(told)) == told
    image = rs_embed.UserData(np.zeros((12, 8, 8)), collection='s2')
    [entry] = [
        e for e in rs_embed.list_models_for_data(image) if e['model'] == 'dynamicvis'
    ]
    assert entry['bands_used'] == ['B4', 'B3', 'B2']


@pytest.mark.parametrize('output', OUTPUTS)
def test_numbers_are_those_of_this_package(output: str, earth: dict[str, Any]) -> None:
    theirs, own = OUTPUTS[output]
    for place in (PLOT, BOX):
        known = ours(place, own, earth)
        for prep in (None, 'resize'):
            found = rs_embed.get_embedding(
                'dynamicvis', spatial=place, output=theirs, input_prep=prep, **CALL
            )
            assert same(found.data, known.data)
            told = found.meta | {'backend': 'gee'}
            assert {key: told[key] for key in known.meta} == known.meta
            assert found.meta['backend'] == 'dynamicvis_geo'
            assert found.meta['temporal'] == {
                'mode': 'range',
                'start': DATES[0],
                'end': DATES[1],
            }
            json.dumps(found.meta, allow_nan=False)


@pytest.mark.parametrize('prep', [None, 'resize'])
def test_batch_gives_each_place_in_order(
    prep: str | None, earth: dict[str, Any]
) -> None:
    places = [PLOT, BOX, PLOT]
    theirs, own = OUTPUTS['grid']
    found = rs_embed.get_embeddings_batch(
        'dynamicvis', spatials=places, output=theirs, input_prep=prep, **CALL
    )
    for place, each in zip(places, found, strict=True):
        assert same(each.data, ours(place, own, earth).data)


def test_batch_is_fetched_at_once_and_embedded_together(
    server: EarthEngineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    forward = dv.FeatureExtraction.features

    def count(task: Any, inputs: Any) -> Any:
        sizes.append(len(inputs))
        return forward(task, inputs)

    monkeypatch.setattr(dv.FeatureExtraction, 'features', count)
    monkeypatch.setenv('RS_EMBED_DYNAMICVIS_FETCH_WORKERS', '3')
    server.set(latency=0.15)
    places = [rs_embed.PointBuffer(10.3 + i / 50, 50.4, 100) for i in range(6)]
    rs_embed.get_embeddings_batch(
        'dynamicvis', spatials=places, input_prep='resize', **CALL
    )
    assert server.counts()['peak'] == 3
    assert sizes == [6]


def test_large_image_is_cut_into_tiles_only_if_asked() -> None:
    theirs = rs_embed.OutputSpec.grid()
    whole = rs_embed.get_embedding('dynamicvis', spatial=PLOT, output=theirs, **CALL)
    assert whole.data.shape == (768, 2, 2)
    tiles = rs_embed.get_embedding(
        'dynamicvis',
        spatial=PLOT,
        output=theirs,
        input_prep=rs_embed.InputPrepSpec.tile(tile_size=33),
        **CALL,
    )
    assert tiles.data.shape == (768, 4, 4)
    assert tiles.meta['input_prep']['tile_count'] == 4


@pytest.mark.parametrize('output', OUTPUTS)
def test_image_of_the_user(output: str) -> None:
    theirs, own = OUTPUTS[output]
    # Blue first, and a band that the model does not look at.
    image = pattern(40, 50)
    stack = np.stack([image[2], image[1], image[0], image[0]])
    data = rs_embed.UserData(stack, collection='s2', bands=('B2', 'B3', 'B4', 'B8'))
    embed = {'output': theirs, 'device': 'cpu', 'weights': 'random'}
    found = rs_embed.get_embedding_from_data('dynamicvis', data, **embed)
    known = dv.get_embedding(input_chw=image, output=own, backbone=RANDOM, device='cpu')
    assert same(found.data, known.data)
    assert found.meta['source'] == 'input_chw'
    assert found.meta['user_input']['collection'] == S2
    batch = rs_embed.get_embeddings_batch_from_data('dynamicvis', [data] * 2, **embed)
    assert all(same(each.data, known.data) for each in batch)


def test_image_on_the_grid_of_rs_embed_lies_there() -> None:
    grid = common_grid(PLOT, scale_m=10)
    data = rs_embed.UserData(
        pattern(*grid.shape), 's2', PLOT, ('B4', 'B3', 'B2'), TEMPORAL
    )
    found = rs_embed.get_embedding_from_data(
        'dynamicvis',
        data,
        output=rs_embed.OutputSpec.grid(),
        device='cpu',
        weights='random',
    )
    assert found.data.rio.crs == 'EPSG:3857'
    assert found.data.rio.bounds() == pytest.approx(grid.bounds())
    assert found.meta['start'] == DATES[0]


def test_image_for_the_embedder_itself() -> None:
    image = pattern(40, 50)
    model = DynamicVisEmbedder()
    same_for_all: dict[str, Any] = {
        'temporal': TEMPORAL,
        'sensor': None,
        'output': rs_embed.OutputSpec.pooled(),
        'backend': 'auto',
        'device': 'cpu',
        'model_config': {'weights': 'random'},
    }
    found = model.get_embedding(spatial=PLOT, input_chw=image, **same_for_all)
    known = dv.get_embedding(input_chw=image, backbone=RANDOM, device='cpu')
    assert same(found.data, known.data)
    # Clipped, as of old.
    bright = np.where(image > 9000, 15000, image)
    found = model.get_embedding(spatial=PLOT, input_chw=bright, **same_for_all)
    clipped = bright.clip(0, 10000)
    known = dv.get_embedding(input_chw=clipped, backbone=RANDOM, device='cpu')
    assert same(found.data, known.data)


def test_images_of_another_provider_are_its_own() -> None:
    sensor = rs_embed.SensorSpec(S2, ('B4', 'B3', 'B2'), cloudy_pct=90)
    image = Archive().fetch_sensor_patch_chw(
        spatial=PLOT, temporal=TEMPORAL, sensor=sensor
    )
    known = dv.get_embedding(
        input_chw=image.clip(0, 10000),
        output=dv.OutputSpec.grid(),
        backbone=RANDOM,
        device='cpu',
    )
    for prep in (None, 'resize'):
        found = rs_embed.get_embedding(
            'dynamicvis',
            spatial=PLOT,
            output=rs_embed.OutputSpec.grid(),
            input_prep=prep,
            **{**CALL, 'backend': 'archive'},
        )
        assert np.array_equal(found.data, known.data)
        bounds = common_grid(PLOT, scale_m=10).bounds()
        assert found.data.rio.bounds() == pytest.approx(bounds)
        assert found.data.rio.crs == 'EPSG:3857'
        assert (found.meta['backend'], found.meta['source']) == ('archive', S2)


# rs-embed embeds images together on any device but 'cpu'.
@pytest.mark.parametrize(
    ('device', 'prep'), [('cpu', None), ('cpu:0', None), ('cpu:0', 'resize')]
)
def test_export(
    device: str, prep: str | None, tmp_path: Path, earth: dict[str, Any]
) -> None:
    request = rs_embed.ExportModelRequest.configure('dynamicvis', weights='random')
    [done, failed] = rs_embed.export_batch(
        spatials=[PLOT, NOWHERE],
        temporal=TEMPORAL,
        models=[request],
        target=rs_embed.ExportTarget.per_item(str(tmp_path), names=['plot', 'nowhere']),
        config=rs_embed.ExportConfig(continue_on_error=True, show_progress=False),
        fetch=CLOUDY,
        backend='dynamicvis_geo',
        device=device,
        input_prep=prep,
    )
    assert (done['status'], failed['status']) == ('ok', 'failed')
    with np.load(tmp_path / 'plot.npz') as file:
        [name] = [name for name in file.files if name.startswith('embedding')]
        found = file[name]
    known = ours(PLOT, dv.OutputSpec.pooled(), earth)
    assert same(found, known.data)
    told = done['models'][0]['meta']
    assert (told['chip_id'], told['crs']) == (known.meta['chip_id'], 'EPSG:32632')


def test_settings_come_from_the_call_and_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = rs_embed.UserData(pattern(40, 40), 's2', bands=('B4', 'B3', 'B2'))

    def told(**settings: Any) -> dict[str, Any]:
        settings = {'weights': 'random', 'device': 'cpu', **settings}
        embedding = rs_embed.get_embedding_from_data('dynamicvis', data, **settings)
        return dict(embedding.meta)

    monkeypatch.setenv('RS_EMBED_DYNAMICVIS_PATH_TYPE', 'forward')
    assert told()['path_type'] == 'forward'
    meta = told(variant='base', img_size=32, path_type='shuffle')
    assert (meta['arch'], meta['image_size']) == ('b', 32)
    assert meta['path_type'] == 'shuffle'
    assert told(stage=1)['feature_shape'] == [192, 8, 8]
    for settings, message in (
        ({'variant': 'huge'}, "arch='huge'"),
        ({'variant': 'b', 'arch': 'b'}, 'variant and arch'),
        ({'depth': 3}, 'depth: no settings.*variant, stage, hf_repo'),
        ({'stage': 4}, 'stage=4'),
        ({'device': 'cuda:99'}, "device='cuda:99'"),
    ):
        with pytest.raises(ModelError, match=message):
            told(**settings)


@pytest.mark.parametrize('prep', [None, 'resize'])
def test_errors_are_those_of_rs_embed(prep: str | None) -> None:
    def embed(**arguments: Any) -> None:
        call = {'spatial': PLOT, 'input_prep': prep, **CALL, **arguments}
        rs_embed.get_embedding('dynamicvis', **call)

    with pytest.raises(ModelError, match=r'PointBuffer.*lon=10\.5.*90 %'):
        embed(spatial=NOWHERE)
    with pytest.raises(ModelError, match=r"sensor\.bands=\('B4', 'B3'\).*three"):
        embed(fetch=None, sensor=rs_embed.SensorSpec(S2, ('B4', 'B3')))
    landsat = rs_embed.SensorSpec('LANDSAT/LC08/C02/T1_L2', ('RED', 'GREEN', 'BLUE'))
    with pytest.raises(ModelError, match=r'LANDSAT.*cloudy_pct=None'):
        embed(fetch=None, sensor=landsat)
    with pytest.raises(ModelError, match='pixels, more than 4096'):
        embed(spatial=rs_embed.PointBuffer(10, 50, 90000))
    image = rs_embed.UserData(pattern(8, 8)[:2], 's2', bands=('B4', 'B3'))
    with pytest.raises(ModelError, match='lacks'):
        rs_embed.get_embedding_from_data('dynamicvis', image)
    dark = rs_embed.UserData(pattern(8, 8) / 10000, 's2', bands=('B4', 'B3', 'B2'))
    with (
        pytest.raises(ModelError, match=r'input_chw.*10000'),
        pytest.warns(UserWarning, match='raw surface-reflectance'),
    ):
        rs_embed.get_embedding_from_data('dynamicvis', dark, weights='random')
