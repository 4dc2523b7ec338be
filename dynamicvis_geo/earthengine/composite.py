"""From a :class:`~dynamicvis_geo.specs.SensorSpec` to pixels of a composite."""

import io
import math
from collections.abc import Mapping
from functools import reduce
from typing import Any

import ee
import numpy as np
from numpy.typing import NDArray

from dynamicvis_geo.earthengine.failures import BrokenAnswerError
from dynamicvis_geo.errors import NoImageryError
from dynamicvis_geo.grid import Grid
from dynamicvis_geo.specs import SensorSpec

Pixels = NDArray[np.uint16] | NDArray[np.float32]

#: Value of a masked pixel on its way: zero is a legal value.
MASKED: dict[str, float] = {'uint16': 65535, 'float32': -1e30}

#: Limits of one request (documentation of Earth Engine, "ee.data.computePixels"): bytes
#: before compression, and pixels a side.
MAX_BYTES = 48 * 2**20
MAX_SIDE = 32768

#: Classes of the scene classification of Sentinel-2 Level-2A that are clouds: cloud
#: shadow, cloud of medium probability, of high probability, thin cirrus.
SCL_CLOUDS = (3, 8, 9, 10)
CLOUD_SCORE_PLUS = 'GOOGLE/CLOUD_SCORE_PLUS/V1/S2_HARMONIZED'


def max_pixels(sensor: SensorSpec) -> int:
    """Count the pixels that one request may have.

    A byte a pixel and band for the mask counts on top of the values (measured).

    Args:
        sensor: Its bands and dtype.
    """
    return MAX_BYTES // (len(sensor.bands) * (np.dtype(sensor.dtype).itemsize + 1))


def build_request(
    sensor: SensorSpec, window: tuple[str, str], grid: Grid
) -> dict[str, Any]:
    """Make the arguments of ``ee.data.computePixels``.

    Args:
        sensor: What imagery, and how it is composed.
        window: First moment, and first moment after, in ISO form.
        grid: The pixels.

    Returns:
        The arguments. Earth Engine has to be initialised.
    """
    return {
        'expression': build_composite(sensor, window, grid.lonlat_boxes),
        'fileFormat': 'NPY',
        'bandIds': list(sensor.bands),
        'grid': grid.to_ee(),
    }


def build_composite(
    sensor: SensorSpec,
    window: tuple[str, str],
    boxes: list[tuple[float, float, float, float]],
) -> ee.Image:
    """Compose the scenes of a window that touch a place.

    Args:
        sensor: What imagery, and how it is composed.
        window: First moment, and first moment after, in ISO form.
        boxes: West, south, east, north of the place, in one or two parts.

    Returns:
        The image, of the sensor's data type, masked pixels holding :data:`MASKED`.
    """
    scenes = select_scenes(sensor, window, boxes)
    if sensor.cloud_mask == 'scl':
        scenes = scenes.map(_mask_scl)
    elif sensor.cloud_mask == 'cs+':
        threshold = sensor.cloud_threshold
        scenes = scenes.linkCollection(ee.ImageCollection(CLOUD_SCORE_PLUS), ['cs'])
        scenes = scenes.map(
            lambda scene: scene.updateMask(scene.select('cs').gte(threshold))
        )
    bands = list(sensor.bands)
    scenes = scenes.select(bands)
    image = scenes.median() if sensor.composite == 'median' else scenes.mosaic()
    # Without scenes the image has no bands: this is where Earth Engine says so.
    image = image.select(bands)
    # Also beyond the footprint of the scenes, which unmask() leaves masked by default.
    image = image.unmask(MASKED[sensor.dtype], False)
    typed: ee.Image = image.toUint16() if sensor.dtype == 'uint16' else image.toFloat()
    return typed


def select_scenes(
    sensor: SensorSpec,
    window: tuple[str, str],
    boxes: list[tuple[float, float, float, float]],
) -> ee.ImageCollection:
    """Select the scenes of a window that touch a place, as :func:`build_composite`.

    Args:
        sensor: Collection and greatest share of clouds.
        window: First moment, and first moment after, in ISO form.
        boxes: West, south, east, north of the place, in one or two parts.
    """
    scenes: ee.ImageCollection = (
        ee.ImageCollection(sensor.collection)
        .filterBounds(_region(boxes))
        .filterDate(*window)
    )
    if sensor.cloudy_pct is not None:
        clear = ee.Filter.lte('CLOUDY_PIXEL_PERCENTAGE', sensor.cloudy_pct)
        scenes = scenes.filter(clear)
    return scenes


def _region(boxes: list[tuple[float, float, float, float]]) -> ee.Geometry:
    rings = [[[[w, s], [e, s], [e, n], [w, n], [w, s]]] for w, s, e, n in boxes]
    # Edges along parallels, as those of the boxes, rather than great circles.
    region: ee.Geometry = (
        ee.Geometry.Polygon(rings[0], None, False)
        if len(rings) == 1
        else ee.Geometry.MultiPolygon(rings, None, False)
    )
    return region


def _mask_scl(scene: ee.Image) -> ee.Image:
    classes = scene.select('SCL')
    clear = reduce(
        lambda mask, other: mask.And(other),
        [classes.neq(number) for number in SCL_CLOUDS],
    )
    return scene.updateMask(clear)


def parse_pixels(body: bytes, sensor: SensorSpec, grid: Grid) -> Pixels:
    """Read an answer, and check that it is the one to what was asked.

    Args:
        body: A NumPy file: a structured array ``[height, width]``, a field a band.
        sensor: What was asked for.
        grid: The pixels that were asked for.

    Returns:
        The pixels ``[bands, height, width]`` of the sensor's data type, masked ones
        holding :data:`MASKED`.

    Raises:
        BrokenAnswerError: If it is anything else.
    """
    array = structured_array(body)
    dtype = np.dtype(sensor.dtype)
    fields: Mapping[str, Any] = array.dtype.fields or {}
    if (
        array.shape != grid.shape
        or set(fields) != set(sensor.bands)
        or any(field[0].newbyteorder('=') != dtype for field in fields.values())
    ):
        raise BrokenAnswerError(
            f'the answer is an array {array.shape} of {array.dtype}, instead of '
            f'{grid.shape} of {dtype} in the bands {", ".join(sensor.bands)}'
        )
    pixels: Pixels = np.empty((len(sensor.bands), *grid.shape), dtype)
    for i, band in enumerate(sensor.bands):
        pixels[i] = array[band]
    return pixels


def structured_array(body: bytes) -> NDArray[np.void]:
    """Read a NumPy file without copying; ``np.load`` takes ten times as long.

    Args:
        body: The file.

    Raises:
        BrokenAnswerError: If it is no NumPy file.
    """
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(file)
        else:
            header = np.lib.format.read_array_header_2_0(file)
        shape, fortran, dtype = header
        if file.tell() + math.prod(shape) * dtype.itemsize != len(body):
            raise ValueError('its length is not that of its array')
        array = np.frombuffer(body, dtype, offset=file.tell())
        return array.reshape(shape, order='F' if fortran else 'C')
    except (ValueError, EOFError, SyntaxError) as error:
        raise BrokenAnswerError(
            f'the answer of {len(body)} bytes is no array ({error})'
        ) from error


def no_pixels(sensor: SensorSpec, grid: Grid) -> Pixels:
    """Make the pixels of a place without any scene, all masked.

    Args:
        sensor: Bands and dtype.
        grid: The pixels.

    Returns:
        ``[bands, height, width]``, all :data:`MASKED`.
    """
    pixels: Pixels = np.full(
        (len(sensor.bands), *grid.shape), MASKED[sensor.dtype], sensor.dtype
    )
    return pixels


def no_imagery(
    place: str,
    sensor: SensorSpec,
    window: tuple[str | None, str | None],
    remedy: str,
    chip: str,
) -> NoImageryError:
    """Return the error of a place without a valid pixel.

    Args:
        place: The place in the words of the user.
        sensor: What was asked for.
        window: First moment, and first moment after.
        remedy: What to do, the end of the message.
        chip: Id of the chip.
    """
    clouds = sensor.cloudy_pct
    few = '' if clouds is None else f' with at most {clouds:g} % of clouds'
    start, end = window
    return NoImageryError(
        f'{place}: no imagery of {sensor.collection} from {start} to before {end}{few}.'
        f' {remedy}',
        chip=chip,
    )


def build_scene_count(
    sensor: SensorSpec, window: tuple[str, str], grid: Grid
) -> dict[str, Any]:
    """Make the arguments of a request for the number of scenes behind a chip.

    Earth Engine's budget counts scenes. The number comes as the only pixel of an image,
    so that it is asked for, tried again and bounded as pixels are.

    Args:
        sensor: What imagery.
        window: First moment, and first moment after, in ISO form.
        grid: The pixels of the chip.
    """
    scenes = select_scenes(sensor, window, grid.lonlat_boxes)
    return {
        'expression': ee.Image.constant(scenes.size()).toUint16(),
        'fileFormat': 'NPY',
        'bandIds': ['constant'],
        'grid': grid.part(0, 0, 1, 1).to_ee(),
    }


def parse_scene_count(body: bytes) -> int:
    """Read the answer to :func:`build_scene_count`.

    Args:
        body: A NumPy file of one pixel.

    Raises:
        BrokenAnswerError: If it is no NumPy file.
    """
    return int(structured_array(body)['constant'][0, 0])
