"""What a chip has to look like, computed without expressions and without a server."""

import warnings
from datetime import datetime
from typing import Any

import numpy as np
from pyproj import CRS, Transformer

from dynamicvis_geo.specs import SensorSpec
from tests.earthengine_server import world

CLOUDS = (3, 8, 9, 10)


def expected(
    crs: Any, x: slice, y: slice, window: tuple[str, str], sensor: SensorSpec
) -> tuple[Any, Any]:
    """Values ``[bands, height, width]`` (0 where masked) and validity of a chip."""
    width = round((x.stop - x.start) / x.step)
    height = round((y.stop - y.start) / y.step)
    easts = np.round(x.start + (np.arange(width) + 0.5) * x.step, 9)
    norths = np.round(y.stop - (np.arange(height) + 0.5) * y.step, 9)
    transformer = Transformer.from_crs(CRS(crs), 4326, always_xy=True)
    lon, lat = transformer.transform(*np.meshgrid(easts, norths))
    lon = (lon + 180) % 360 - 180
    start, end = map(datetime.fromisoformat, window)
    layers, masks = [], []
    west, east = lon.min() - 1, lon.max() + 1
    if east - west > 180:
        west, east = -180.0, 180.0
    around = (west, lat.min() - 1, east, lat.max() + 1)
    for scene in sorted(
        world.scenes(sensor.collection, around, start, end), key=lambda s: s.index
    ):
        clouds = scene.properties['CLOUDY_PIXEL_PERCENTAGE']
        if sensor.cloudy_pct is not None and clouds > sensor.cloudy_pct:
            continue
        valid = scene.pixels('B4', lon, lat)[1]
        if not valid.any():
            continue
        if sensor.cloud_mask == 'scl':
            valid &= ~np.isin(scene.pixels('SCL', lon, lat)[0], CLOUDS)
        elif sensor.cloud_mask == 'cs+':
            valid &= scene.pixels('cs', lon, lat)[0] >= sensor.cloud_threshold
        layers.append([scene.pixels(band, lon, lat)[0] for band in sensor.bands])
        masks.append(valid)
    if not layers:
        empty = np.zeros((len(sensor.bands), height, width))
        return empty, np.zeros((height, width), bool)
    values = np.where(np.array(masks)[:, None], np.array(layers, float), np.nan)
    if sensor.composite == 'median':
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', RuntimeWarning)
            composite = np.nanmedian(values, axis=0)
    else:
        composite = values[0]
        for layer in values[1:]:
            composite = np.where(np.isnan(layer), composite, layer)
    return np.floor(np.nan_to_num(composite)), np.any(masks, axis=0)
