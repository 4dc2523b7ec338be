"""What the tests of single places have in common."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynamicvis_geo import (
    BackboneConfig,
    EarthEngineClient,
    PointBuffer,
    SensorSpec,
    TemporalSpec,
)
from tests.earthengine_server import EarthEngineServer
from tests.earthengine_server.oracle import expected

DATES = ('2022-06-01', '2022-07-21')
TEMPORAL = TemporalSpec.range(*DATES)
SENSOR = SensorSpec(cloudy_pct=90)
RANDOM = BackboneConfig(weights='random', img_size=64)
PLOT = PointBuffer(lon=10.3, lat=50.4, buffer_m=330)
#: A place that the world of the server never shows.
NOWHERE = PointBuffer(lon=10.5, lat=40.5, buffer_m=330)


class Thumbnail(nn.Module):
    """Features to follow by hand: the preprocessed image itself, made small."""

    img_size = (32, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (nn.functional.avg_pool2d(x, 8),)


class Native(nn.Module):
    """No declared size, so that nothing is resized."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,)


class Vector(nn.Module):
    """Gives a vector instead of a map."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr('dynamicvis_geo.earthengine.web.FIRST_WAIT', 0.01)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'weights=', UserWarning)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def earth(server: EarthEngineServer) -> dict[str, Any]:
    return {
        'temporal': TEMPORAL,
        'sensor': SENSOR,
        'client': EarthEngineClient(project='x', url=server.url),
        'device': 'cpu',
    }


def pixels_of(meta: dict[str, Any], sensor: SensorSpec = SENSOR) -> Any:
    """What the chip of an embedding has to look like."""
    minx, miny, maxx, maxy = meta['bounds']
    x, y = (
        slice(minx, maxx, sensor.scale_m),
        slice(miny, maxy, sensor.scale_m),
    )
    values, valid = expected(meta['crs'], x, y, (meta['start'], meta['end']), sensor)
    return np.where(valid, values, sensor.fill_value), valid


def normalised(image: Any) -> Any:
    """Reflectance as the backbone gets it, where nothing is resized."""
    levels = np.floor(np.clip(np.float32(image) / np.float32(10000), 0, 1) * 255)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    return (levels / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
