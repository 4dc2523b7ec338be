"""``dynamicvis-geo embed``: chips of GeoTIFFs or of Earth Engine, embedded.

Cut chips from GeoTIFFs, or fetch them from Google Earth Engine; embed them, and write
the embeddings with their footprints: pooled to one GeoParquet file, or with --grid the
feature maps to one GeoTIFF a chip. Interrupted and started again, it computes only what
is missing. Exits with 3 if the images of some chips could not be had.
"""

from __future__ import annotations

import math
import warnings
from argparse import ArgumentParser, ArgumentTypeError, Namespace, _ActionsContainer
from typing import TYPE_CHECKING, Any

from dynamicvis_geo.commands.chips import (
    add_chips,
    add_earthengine,
    add_plan,
    earthengine,
    goes_ahead,
    is_first,
)
from dynamicvis_geo.commands.options import (
    add_backbone,
    add_bands,
    add_examples,
    add_running,
    images,
    log,
    option_of,
    output,
    positive,
)
from dynamicvis_geo.errors import SpecError

if TYPE_CHECKING:
    from dynamicvis_geo.callbacks.shards import Shard
    from dynamicvis_geo.datamodules import ChipDataModule
    from dynamicvis_geo.datasets import Scenes
    from dynamicvis_geo.models.config import BackboneConfig
    from dynamicvis_geo.tasks.features import OutputMode


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.usage = '%(prog)s [options] --output OUT [SOURCE]'
    add_examples(
        parser,
        'dynamicvis-geo embed scene.tif --output embeddings.parquet',
        'dynamicvis-geo embed scenes --grid --size 256 --output maps',
        'dynamicvis-geo embed --points plots.csv --year 2022 --buffer 640 '
        '--output plots.parquet',
        'dynamicvis-geo embed --roi area.gpkg --start 2022-06-01 --end '
        '2022-09-01 --dry-run --output area.parquet',
    )
    parser.add_argument(
        'source',
        type=images,
        nargs='?',
        metavar='SOURCE',
        help='a GeoTIFF, or a folder of them, or a URL or GDAL path (/vsi...) of such; '
        'without it, chips come from Earth Engine',
    )
    parser.add_argument(
        '--output',
        dest='path',
        type=output,
        required=True,
        metavar='OUT',
        help='file that ends in .parquet; with --grid a folder, or a name that ends in '
        '.zarr',
    )
    parser.add_argument(
        '--shard',
        metavar='I/N',
        help='do one of N equal shares, the I-th from 1, beside others; or /N in an '
        'array job, which tells I (default: as an array job says, else everything)',
    )
    _add_output(parser.add_argument_group('output'))
    chips = parser.add_argument_group('chips')
    add_chips(chips)
    add_bands(chips)
    chips.add_argument(
        '--input-range',
        type=_value_range,
        default=(0.0, 10000.0),
        metavar='LOW,HIGH',
        help='values that become black and white (default: 0,10000, Sentinel-2 surface '
        'reflectance)',
    )
    earth_engine = parser.add_argument_group('Earth Engine, without SOURCE')
    add_earthengine(earth_engine)
    earth_engine.add_argument(
        '--on-missing',
        dest='data.on_missing',
        choices=('raise', 'fill', 'skip'),
        help='for a chip without imagery: stop, fill it with zeros, or leave it out '
        '(default: raise)',
    )
    earth_engine.add_argument(
        '--shards-at-once',
        dest='shards.at_once',
        type=positive,
        metavar='N',
        help='shards that run at a time, among which --max-concurrency is divided '
        '(default: all of them)',
    )
    features = parser.add_argument_group('features')
    features.add_argument(
        '--grid',
        dest='output',
        action='store_const',
        const='grid',
        default='pooled',
        help='feature maps instead of pooled vectors',
    )
    features.add_argument(
        '--pooling',
        choices=('mean', 'max'),
        help='over the cells of a map (default: mean)',
    )
    features.add_argument(
        '--stage',
        type=int,
        choices=(0, 1, 2, 3),
        default=3,
        help='of the model whose features are taken: cells of 4, 8, 16 or 32 pixels of '
        'its input, 512 by default; finer ones know more of texture and less of what '
        'it is (default: 3)',
    )
    add_backbone(features)
    add_plan(parser)
    add_running(parser)


def _add_output(group: _ActionsContainer) -> None:
    group.add_argument(
        '--format',
        metavar='NAME',
        help='format of OUT: geoparquet, geotiff or zarr (default: as its name says, '
        'geotiff for a folder)',
    )
    group.add_argument(
        '--dtype',
        choices=('float32', 'float16', 'int8'),
        default='float32',
        help='of the numbers in OUT; int8 has a scale for each row (default: float32)',
    )
    group.add_argument(
        '--overwrite',
        action='store_true',
        help='start anew: remove what OUT holds, and what an interrupted run has left',
    )
    group.add_argument(
        '--block-chips',
        type=positive,
        metavar='N',
        help='chips that are put on disk together, at most; a killed process loses so '
        'many (default: as OUT was begun, else 64 on a CPU, 4096 vectors or 256 maps '
        'on a GPU, or fewer)',
    )
    group.add_argument(
        '--on-error',
        choices=('raise', 'skip'),
        default='raise',
        help='for a chip whose image cannot be had: stop, or leave it out and list it '
        'in OUT.failures.parquet (default: raise)',
    )
    group.add_argument(
        '--retry-failed',
        action='store_true',
        help='compute just the chips that are listed as failed',
    )


def _value_range(text: str) -> tuple[float, float]:
    """Read the values that become black and white."""
    try:
        low, high = map(float, text.split(','))
    except ValueError:
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise ArgumentTypeError(
            f'{text!r} must be two numbers, the smaller one first, such as 0,3000'
        )
    return low, high


def run(arguments: Namespace) -> int:
    """Embed what the arguments name, and print what was written.

    Args:
        arguments: The options.

    Returns:
        The exit code.

    Raises:
        SpecError: If options contradict each other, or would be ignored.
    """
    log(arguments.quiet)
    config, chips = _read(arguments)
    from dynamicvis_geo.callbacks import EmbeddingWriter
    from dynamicvis_geo.commands.backbone import choose_device, feature_shape
    from dynamicvis_geo.commands.trainer import predict, require_launcher
    from dynamicvis_geo.datamodules import EarthEngineDataModule, ScenesDataModule
    from dynamicvis_geo.tasks import FeatureExtraction

    output: OutputMode = arguments.output
    writer = EmbeddingWriter(
        arguments.path,
        arguments.format,
        overwrite=arguments.overwrite,
        dtype=arguments.dtype,
        block_chips=arguments.block_chips,
        retry_failed=arguments.retry_failed,
        shard=arguments.shard,
    )
    if not arguments.dry_run:
        choose_device(arguments.device, arguments.devices)
        require_launcher(arguments.nodes)
    data: ChipDataModule
    if arguments.source is None:
        data = EarthEngineDataModule(**chips)
    else:
        data = ScenesDataModule(**chips)
        _warn_of_byte_images(data.scenes, arguments.input_range)
    # Of what is finished, the first process alone can be sure: it may be at work.
    shape = feature_shape(config, arguments.stage)
    plan = data.plan(writer if is_first() else None, shape)
    if not goes_ahead(data, plan, arguments, writer.shard):
        return 0
    module = FeatureExtraction(
        config,
        output,
        arguments.pooling or 'mean',
        arguments.input_range,
        arguments.stage,
    )
    return predict(data, module, writer, arguments)


def _read(arguments: Namespace) -> tuple[BackboneConfig, dict[str, Any]]:
    """Read the options, and look for the files, before PyTorch takes its seconds.

    Returns:
        The backbone, and the arguments of the data module.

    Raises:
        DynamicVisGeoError: if options are missing, contradict each other, or have
            values that cannot be used, or files are not there.
    """
    from dynamicvis_geo.callbacks.output import Destination
    from dynamicvis_geo.callbacks.shards import Shard
    from dynamicvis_geo.commands.backbone import backbone_config, check_device
    from dynamicvis_geo.models.safe_load import read_head

    output: OutputMode = arguments.output
    if output == 'grid' and arguments.pooling is not None:
        raise SpecError(
            f'--pooling {arguments.pooling} makes one vector a chip, and --grid writes '
            'the maps as they are: leave out one of them'
        )
    retry = arguments.retry_failed
    where = Destination.of(arguments.path, arguments.format, arguments.dtype, retry)
    where.check(arguments.overwrite, output)
    config = backbone_config(arguments)
    if not arguments.dry_run:
        check_device(arguments.device, arguments.devices)
        if config.checkpoint is not None:
            read_head(config.checkpoint)
    return config, _chips(arguments, Shard.of(arguments.shard))


def _chips(arguments: Namespace, shard: Shard) -> dict[str, Any]:
    """Make the arguments of the data module that the options describe."""
    from dynamicvis_geo.datasets.requests import points_file
    from dynamicvis_geo.datasets.scene_files import check_images

    _check(arguments, shard)
    workers = arguments.num_workers
    if workers is None:
        # Fetching and computing then go on at the same time.
        workers = 2 if arguments.source is None else 0
    loading = {
        'batch_size': arguments.batch_size,
        'num_workers': workers,
        'on_error': arguments.on_error,
    }
    if arguments.source is None:
        return {**earthengine(arguments, shard), **loading}
    bands = arguments.bands or (1, 2, 3)
    check_images(arguments.source, bands)
    if arguments.points is not None:
        points_file(arguments.points)
    return {
        'path': arguments.source,
        'bands': bands,
        'size': arguments.size,
        'stride': arguments.stride,
        'points': arguments.points,
        **loading,
    }


def _check(arguments: Namespace, shard: Shard) -> None:
    """Refuse options that contradict each other, or lack others."""
    given = {
        name: value
        for name, value in vars(arguments).items()
        # These are for Earth Engine.
        if '.' in name and value is not None
    }
    dated = any(name.startswith('time.') for name in given)
    if arguments.source is not None and given:
        options = ', '.join(option_of(arguments, name) for name in given)
        raise SpecError(
            f'only Earth Engine takes {options}, but SOURCE is {arguments.source}: '
            'leave out one or the other'
        )
    if arguments.source is not None:
        return
    if arguments.points is not None and not dated:
        raise SpecError(
            f'--points {arguments.points} without SOURCE asks for Earth Engine, which '
            'needs dates: give --year, --start and --end, --years, or --windows; or '
            'give SOURCE, the images'
        )
    if arguments.bands is not None:
        raise SpecError(
            f'--bands {",".join(map(str, arguments.bands))} is for GeoTIFFs, but there '
            'is no SOURCE: leave it out (of Earth Engine the bands are B4, B3, B2; '
            'predict has data.sensor.bands)'
        )
    if not dated and not any(name.startswith('data.') for name in given):
        raise SpecError(
            'there is nothing to embed: give SOURCE (a GeoTIFF or a folder), or for '
            'Earth Engine --roi or --points, with --year, --start and --end, --years, '
            'or --windows'
        )
    if (at_once := given.get('shards.at_once')) is not None and shard.count == 1:
        raise SpecError(
            f'--shards-at-once {at_once} is for one of several shards, and this run '
            'does everything: give --shard I/N, or leave it out'
        )


def _warn_of_byte_images(
    scenes: list[Scenes], input_range: tuple[float, float]
) -> None:
    """An 8-bit picture read as reflectance is nearly black, and nobody would see it."""
    from dynamicvis_geo.rasters import open_raster

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
