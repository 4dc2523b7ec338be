"""``dynamicvis-geo embed``: chips of GeoTIFFs or of Earth Engine, embedded."""

import warnings
from argparse import Namespace

from dynamicvis_geo.callbacks import EmbeddingWriter
from dynamicvis_geo.commands.imagery import imagery
from dynamicvis_geo.commands.options import (
    backbone_config,
    choose_device,
    feature_shape,
    require_launcher,
)
from dynamicvis_geo.commands.planning import goes_ahead, is_first
from dynamicvis_geo.commands.prediction import log, predict
from dynamicvis_geo.datamodules import ScenesDataModule
from dynamicvis_geo.datasets import Scenes
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models.checkpoint import read_head
from dynamicvis_geo.rasters import open_raster
from dynamicvis_geo.tasks import FeatureExtraction
from dynamicvis_geo.tasks.features import Output


def run(arguments: Namespace) -> int:
    """Embed what the arguments name, and print what was written."""
    output: Output = 'grid' if arguments.grid else 'pooled'
    if arguments.grid and arguments.pooling is not None:
        raise SpecError(
            f'--pooling {arguments.pooling} makes one vector a chip, and --grid writes '
            'the maps as they are: leave out one of them'
        )
    log(arguments.quiet)
    writer = EmbeddingWriter(
        arguments.output,
        arguments.format,
        overwrite=arguments.overwrite,
        dtype=arguments.dtype,
        block_chips=arguments.block_chips,
        retry_failed=arguments.retry_failed,
        shard=arguments.shard,
    )
    writer.check(output)
    if not arguments.dry_run:
        choose_device(arguments.device, arguments.devices)
        require_launcher(arguments.nodes)
    config = backbone_config(arguments.weights)
    if config.checkpoint is not None and not arguments.dry_run:
        read_head(config.checkpoint)
    data = imagery(arguments, writer.shard)
    if isinstance(data, ScenesDataModule):
        _warn_of_byte_images(data.scenes, arguments.input_range)
    # Of what is finished, the first process alone can be sure: it may be at work.
    plan = data.plan(writer if is_first() else None, feature_shape(config))
    if not goes_ahead(data, plan, arguments, writer.shard):
        return 0
    module = FeatureExtraction(
        config, output, arguments.pooling or 'mean', arguments.input_range
    )
    return predict(data, module, writer, arguments)


def _warn_of_byte_images(
    scenes: list[Scenes], input_range: tuple[float, float]
) -> None:
    """An 8-bit picture read as reflectance is nearly black, and nobody would see it."""
    for scene in scenes:
        path = scene.index['filepath'].iloc[0]
        with open_raster(path) as file:
            if file.dtypes[0] == 'uint8' and input_range[1] > 255:
                warnings.warn(
                    f'{path} has 8-bit values, but --input-range is '
                    f'{input_range[0]:g},{input_range[1]:g}: for a picture of 0..255 '
                    'give --input-range 0,255',
                    stacklevel=2,
                )
