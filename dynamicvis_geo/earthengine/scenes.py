"""The scenes behind a composite: what Earth Engine's budget counts."""

import threading
from typing import Any

import ee

from dynamicvis_geo.earthengine.client import EarthEngineClient
from dynamicvis_geo.earthengine.composite import select_scenes, structured_array
from dynamicvis_geo.earthengine.sharing import Chip
from dynamicvis_geo.specs import SensorSpec


def count_scenes(client: EarthEngineClient, sensor: SensorSpec, chip: Chip) -> int:
    """Count the scenes that a chip is composed of.

    The number comes as the only pixel of an image: one request, tried again and bounded
    as those for pixels are.

    Args:
        client: How to reach Earth Engine.
        sensor: What imagery.
        chip: Where and when.

    Raises:
        EarthEngineError: If Earth Engine does not tell.
    """

    def build() -> dict[str, Any]:
        scenes = select_scenes(sensor, chip.window, chip.grid.lonlat_boxes)
        return {
            'expression': ee.Image.constant(scenes.size()).toUint16(),
            'fileFormat': 'NPY',
            'bandIds': ['constant'],
            'grid': chip.grid.part(0, 0, 1, 1).to_ee(),
        }

    def parse(body: bytes) -> int:
        return int(structured_array(body)['constant'][0, 0])

    return client.request(build, parse, chip=chip.id, cancelled=threading.Event())
