"""``dynamicvis-geo embed``: chips of GeoTIFFs or of Earth Engine, embedded."""

import warnings
from argparse import Namespace

import rasterio

from dynamicvis_geo.callbacks import EmbeddingWriter
from dynamicvis_geo.commands.imagery import (
    CHIP_SIZE,
    Pairs,
    check_imagery,
    earthengine_pairs,
)
from dynamicvis_geo.commands.options import backbone_config, choose_device
from dynamicvis_geo.commands.prediction import predict
from dynamicvis_geo.datasets import (
    ChipDataset,
    Scenes,
    assign_points,
    open_scenes,
    read_points,
)
from dynamicvis_geo.samplers import GridSampler, PointSampler
from dynamicvis_geo.tasks import FeatureExtraction
from dynamicvis_geo.tasks.features import Output


def run(arguments: Namespace) -> None:
    """Embed what the arguments name, and print what was written."""
    output: Output = 'grid' if arguments.grid else 'pooled'
    writer = EmbeddingWriter(arguments.output, overwrite=arguments.overwrite)
    writer.check(output)
    choose_device(arguments.device)
    config = backbone_config(arguments.weights)
    check_imagery(arguments)
    if arguments.source is None:
        pairs = earthengine_pairs(arguments)
    else:
        pairs = _scene_pairs(arguments)
    module = FeatureExtraction(config, output, arguments.pooling, arguments.input_range)
    chips = ChipDataset(pairs)
    print(predict(chips, module, writer, arguments))
    skipped = len(chips) - writer.written
    if skipped:
        print(f'Skipped {skipped} chips without imagery.')


def _scene_pairs(arguments: Namespace) -> Pairs:
    scenes = open_scenes(arguments.source, arguments.bands)
    size = arguments.size or CHIP_SIZE
    pairs: Pairs
    if arguments.points is None:
        pairs = [(s, GridSampler(s, size, arguments.stride)) for s in scenes]
    else:
        assigned = assign_points(scenes, read_points(arguments.points))
        pairs = [(scene, PointSampler(scene, near, size)) for scene, near in assigned]
    _warn_of_byte_images(scenes, arguments.input_range)
    _warn_of_padding(pairs, size)
    return pairs


def _warn_of_byte_images(
    scenes: list[Scenes], input_range: tuple[float, float]
) -> None:
    """An 8-bit picture read as reflectance is nearly black, and nobody would see it."""
    for scene in scenes:
        path = scene.index['filepath'].iloc[0]
        with rasterio.open(path) as file:
            if file.dtypes[0] == 'uint8' and input_range[1] > 255:
                warnings.warn(
                    f'{path} has 8-bit values, but --input-range is '
                    f'{input_range[0]:g},{input_range[1]:g}: for a picture of 0..255 '
                    'give --input-range 0,255',
                    stacklevel=2,
                )


def _warn_of_padding(pairs: Pairs, size: int) -> None:
    """Say how little of a chip an image fills that is smaller than one."""
    for scene, sampler in pairs:
        x, y, _ = scene.bounds
        width, height = (round((s.stop - s.start) / s.step) for s in (x, y))
        if min(width, height) >= size:
            continue
        covered = [
            _overlap(x, chip[0]) * _overlap(y, chip[1]) / (x.step * y.step * size**2)
            for chip in sampler
        ]
        warnings.warn(
            f'chips of {size} x {size} pixels are larger than the image of {width} x '
            f'{height} pixels: they are padded, and at most the fraction '
            f'{max(covered):.3f} of one is valid; a smaller --size avoids it',
            stacklevel=2,
        )


def _overlap(one: slice, other: slice) -> float:
    length: float = min(one.stop, other.stop) - max(one.start, other.start)
    return max(0.0, length)
