"""Earth Engine as a provider of rs-embed."""

# ruff: noqa: E402
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dynamicvis_geo as dv
from tests.earthengine_server import EarthEngineServer
from tests.earthengine_server.oracle import expected
from tests.integrations.rs_embed_material import (
    BOX,
    NOWHERE,
    PLOT,
    S2,
    TEMPORAL,
    provided,
)
from tests.places import DATES, quick

rs_embed = pytest.importorskip('rs_embed')
from rs_embed.core.embedding import Embedding
from rs_embed.core.errors import ProviderError
from rs_embed.core.registry import register
from rs_embed.core.specs import ModelInputSpec
from rs_embed.embedders.base import EmbedderBase
from rs_embed.providers import get_provider, list_providers
from rs_embed.tools.projection import common_grid

from dynamicvis_geo.integrations.rs_embed import (
    EarthEngineProvider,
    register_provider,
)

__all__ = ('provided', 'quick')

CLOUDY = rs_embed.FetchSpec(cloudy_pct=90)

pytestmark = pytest.mark.usefixtures('provided')


class Brightness(EmbedderBase):
    """Another's model: the image itself, as the provider gives it."""

    input_spec = ModelInputSpec(
        collection=S2, bands=('RED', 'NIR'), cloudy_pct=90, expected_channels=2
    )

    def describe(self) -> dict[str, Any]:
        inputs = {'collection': S2, 'bands': ['RED', 'NIR']}
        return {
            'type': 'on_the_fly',
            'backend': ['provider'],
            'inputs': inputs,
            'output': ['pooled'],
            'defaults': {'image_size': 512, 'cloudy_pct': 90},
        }

    def get_embedding(self, *, input_chw: Any = None, **rest: Any) -> Any:
        return Embedding(input_chw, {})


register('brightness')(Brightness)


def pixels(place: Any, bands: tuple[str, ...], window: Any = DATES) -> Any:
    """What rs-embed's grid shows, rounded down; and where there is anything."""
    minx, miny, maxx, maxy = common_grid(place, scale_m=10).bounds()
    sensor = dv.SensorSpec(bands=bands, cloudy_pct=90)
    x, y = slice(minx, maxx, 10), slice(miny, maxy, 10)
    return expected('EPSG:3857', x, y, window, sensor)


def test_provider_is_one_more() -> None:
    assert 'dynamicvis_geo' in list_providers()
    assert get_provider('dynamicvis_geo').name == 'dynamicvis_geo'
    assert not isinstance(get_provider('gee'), EarthEngineProvider)


def test_other_models_get_their_pixels(
    server: EarthEngineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, valid = pixels(BOX, ('B4', 'B8'))
    # Refusals and failures are tried again.
    server.set(script=[429, 503, 'reset'])
    found = rs_embed.get_embedding(
        'brightness', spatial=BOX, temporal=TEMPORAL, backend='dynamicvis_geo'
    )
    assert np.array_equal(np.floor(found.data), np.where(valid, values, 0))
    assert server.counts()['requests'] == 4
    # By the variable of rs-embed, for all models.
    monkeypatch.setenv('RS_EMBED_DEFAULT_PROVIDER', 'dynamicvis_geo')
    again = rs_embed.get_embedding('brightness', spatial=BOX, temporal=TEMPORAL)
    assert np.array_equal(again.data, found.data)


@pytest.mark.parametrize('model', ['remoteclip', 'scalemae'])
def test_input_of_models_of_rs_embed(model: str) -> None:
    told = rs_embed.inspect_model_input(
        model,
        spatial=PLOT,
        temporal=TEMPORAL,
        fetch=CLOUDY,
        backend='dynamicvis_geo',
        return_arrays=True,
    )
    values, valid = pixels(PLOT, ('B4', 'B3', 'B2'))
    image = told['frames'][0]['array_chw']
    assert np.array_equal(np.floor(image), np.where(valid, values, 0))


def test_threads_share_the_limit(
    provided: dv.EarthEngineClient, server: EarthEngineServer
) -> None:
    register_provider(replace(provided, max_concurrency=2))
    server.set(latency=0.1)
    places = [rs_embed.PointBuffer(10.3 + i / 50, 50.4, 100) for i in range(6)]

    def fetch(place: Any) -> None:
        sensor = rs_embed.SensorSpec(S2, ('B4',), cloudy_pct=90)
        get_provider('dynamicvis_geo').fetch_sensor_patch_chw(
            spatial=place, temporal=TEMPORAL, sensor=sensor
        )

    threads = [threading.Thread(target=fetch, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = server.counts()
    assert (counts['served'], counts['peak']) == (6, 2)


def test_cache_keeps_pixels(
    provided: dv.EarthEngineClient, server: EarthEngineServer, tmp_path: Path
) -> None:
    register_provider(provided, cache=tmp_path)
    for _ in range(2):
        rs_embed.get_embedding(
            'brightness', spatial=PLOT, temporal=TEMPORAL, backend='dynamicvis_geo'
        )
        rs_embed.inspect_model_input(
            'dynamicvis',
            spatial=PLOT,
            temporal=TEMPORAL,
            fetch=CLOUDY,
            backend='dynamicvis_geo',
        )
        assert server.counts()['requests'] == 2


def test_series_of_images() -> None:
    provider = EarthEngineProvider()
    series = provider.fetch_multiframe_collection_raw_tchw(
        spatial=PLOT,
        temporal=TEMPORAL,
        collection=S2,
        bands=('RED', 'B3'),
        n_frames=10,
        cloudy_pct=90,
    )
    assert series.dtype == np.float32
    days = [f'2022-06-{day:02d}' for day in range(1, 31, 5)]
    days += [f'2022-07-{day:02d}' for day in range(1, 22, 5)]
    whole, _ = pixels(PLOT, ('B4', 'B3'))
    empty = 0
    for start, end, frame in zip(days[:-1], days[1:], series, strict=True):
        values, valid = pixels(PLOT, ('B4', 'B3'), (start, end))
        empty += not valid.any()
        filled = np.where(valid, values, 0) if valid.any() else whole
        assert np.array_equal(np.floor(frame), filled)
    assert 0 < empty < 10


def test_all_bands() -> None:
    provider = EarthEngineProvider()
    image, bands = provider.fetch_collection_patch_all_bands_chw(
        spatial=PLOT, temporal=TEMPORAL, collection=S2, composite='mosaic'
    )
    assert bands == ('B2', 'B3', 'B4', 'B8', 'SCL')
    minx, miny, maxx, maxy = common_grid(PLOT, scale_m=10).bounds()
    sensor = dv.SensorSpec(bands=bands, cloudy_pct=None, composite='mosaic')
    x, y = slice(minx, maxx, 10), slice(miny, maxy, 10)
    values, _ = expected('EPSG:3857', x, y, DATES, sensor)
    assert np.array_equal(image, values)


def test_patch_can_be_inspected() -> None:
    sensor = rs_embed.SensorSpec(S2, ('RED', 'B3'), cloudy_pct=90, scale_m=20)
    told = rs_embed.inspect_provider_patch(
        spatial=PLOT,
        temporal=TEMPORAL,
        sensor=sensor,
        backend='dynamicvis_geo',
        return_array=True,
    )
    assert told['array_chw'].shape == (2, *common_grid(PLOT, scale_m=20).shape)
    told = rs_embed.inspect_model_input(
        'dynamicvis',
        spatial=PLOT,
        temporal=TEMPORAL,
        fetch=CLOUDY,
        backend='dynamicvis_geo',
    )
    assert told['ok']
    assert told['fetch_meta']['crs'] == 'EPSG:32632'


def test_errors_of_the_provider(server: EarthEngineServer) -> None:
    provider = EarthEngineProvider()
    sensor = rs_embed.SensorSpec(S2, ('B4',), cloudy_pct=90)
    call: dict[str, Any] = {'temporal': TEMPORAL, 'sensor': sensor}
    with pytest.raises(ProviderError, match='temporal is missing'):
        provider.fetch_sensor_patch_chw(spatial=PLOT, temporal=None, sensor=sensor)
    with pytest.raises(
        ProviderError, match=r'PointBuffer\(lon=10.5.*no imagery.*Widen temporal'
    ):
        provider.fetch_sensor_patch_chw(spatial=NOWHERE, **call)
    with pytest.raises(
        ProviderError, match=r'PointBuffer\(lon=10.5.*no imagery.*Widen temporal'
    ):
        provider.fetch_multiframe_collection_raw_tchw(
            spatial=NOWHERE, temporal=TEMPORAL, collection=S2, bands=('B4',)
        )
    server.set(script=[403], message='No access for you')
    with pytest.raises(ProviderError, match='No access for you'):
        provider.fetch_sensor_patch_chw(spatial=PLOT, **call)
    register_provider(dv.EarthEngineClient(url='http://127.0.0.1:9', retry_for=0.1))
    with pytest.raises(ProviderError, match='Earth Engine'):
        provider.ensure_ready()
