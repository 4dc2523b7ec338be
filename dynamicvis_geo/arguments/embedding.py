"""Arguments of the commands that get images and embed them."""

import argparse
from pathlib import Path

from dynamicvis_geo.arguments.common import (
    Commands,
    add_run_options,
    add_weights,
    bands,
    command,
    images,
    local_output_path,
    local_source,
    metres,
    output,
    percent,
    positive,
    source,
    value_range,
)


def add_commands(commands: Commands) -> None:
    """Add embed, merge, fetch, cache and demo."""
    _add_embed(commands)
    _add_merge(commands)
    _add_fetch(commands)
    _add_cache(commands)
    _add_demo(commands)


def _add_embed(commands: Commands) -> None:
    parser = command(
        commands,
        'embed',
        'embed chips of GeoTIFFs or of Earth Engine composites',
        'Cut chips from GeoTIFFs, or fetch them from Google Earth Engine; embed them, '
        'and write the embeddings with their footprints: pooled to one GeoParquet '
        'file, or with --grid the feature maps to one GeoTIFF a chip. Interrupted and '
        'started again, it computes only what is missing. Exits with 3 if the images '
        'of some chips could not be had.',
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
    _add_chips(chips)
    chips.add_argument(
        '--bands',
        type=bands,
        metavar='R,G,B',
        help='bands of a GeoTIFF that stand for red, green and blue (default: 1,2,3)',
    )
    chips.add_argument(
        '--input-range',
        type=value_range,
        default=(0.0, 10000.0),
        metavar='LOW,HIGH',
        help='values that become black and white (default: 0,10000, Sentinel-2 surface '
        'reflectance)',
    )
    imagery = parser.add_argument_group('Earth Engine, without SOURCE')
    _add_imagery(imagery)
    imagery.add_argument(
        '--on-missing',
        choices=('raise', 'fill', 'skip'),
        help='for a chip without imagery: stop, fill it with zeros, or leave it out '
        '(default: raise)',
    )
    imagery.add_argument(
        '--shards-at-once',
        type=positive,
        metavar='N',
        help='shards that run at a time, among which --max-concurrency is divided '
        '(default: all of them)',
    )
    features = parser.add_argument_group('features')
    features.add_argument(
        '--grid', action='store_true', help='feature maps instead of pooled vectors'
    )
    features.add_argument(
        '--pooling',
        choices=('mean', 'max'),
        help='over the cells of a map (default: mean)',
    )
    add_weights(features)
    _add_plan(parser)
    add_run_options(parser)


def _add_output(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        '--format',
        choices=('geoparquet', 'geotiff', 'zarr'),
        help='of OUT (default: as its name says, geotiff for a folder)',
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


def _add_merge(commands: Commands) -> None:
    parser = command(
        commands,
        'merge',
        'make an output of what unfinished runs have left',
        'Join the blocks that lie beside OUT, where embed has been ended, or its last '
        'shard has. Exits with 3 if the images of some chips could not be had.',
    )
    parser.add_argument(
        'out', type=output, metavar='OUT', help='--output of that embed'
    )
    parser.add_argument(
        '--partial',
        action='store_true',
        help='join what there is, also if blocks are missing; the run may still go on',
    )


def _add_fetch(commands: Commands) -> None:
    parser = command(
        commands,
        'fetch',
        'fetch chips from Earth Engine into a cache',
        'Fill a cache ahead of embed, which with the same options then needs no '
        'network. Interrupted and started again, it continues where it stopped.',
    )
    _add_chips(parser.add_argument_group('chips'))
    _add_imagery(parser.add_argument_group('Earth Engine'))
    _add_plan(parser)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('before it starts')
    group.add_argument(
        '--dry-run',
        action='store_true',
        help='say how many chips, requests, bytes and scenes it would be, and stop; '
        'needs neither weights nor GPU',
    )
    group.add_argument(
        '--yes',
        action='store_true',
        help='do it even if it is more than a million chips, chips above 4096 pixels a '
        'side, or more than 1 TB of output',
    )


def _add_cache(commands: Commands) -> None:
    parser = command(
        commands,
        'cache',
        'show or empty a cache of chips',
        'Show what a cache of chips holds, or remove its chips.',
    )
    parser.add_argument('action', choices=('info', 'clear'))
    parser.add_argument('folder', type=local_source, metavar='FOLDER')


def _add_demo(commands: Commands) -> None:
    parser = command(
        commands,
        'demo',
        'embed a synthetic scene with random weights',
        'Make a small synthetic scene that looks like Sentinel-2, embed it with random '
        'weights, and write the scene, a GeoParquet file, feature maps as GeoTIFFs, '
        'and a picture. Needs no network.',
    )
    parser.add_argument(
        '--output',
        type=local_output_path,
        default=Path('demo-output'),
        metavar='FOLDER',
        help='folder for the files (default: demo-output); those of an earlier demo '
        'are replaced',
    )
    add_run_options(parser)


def _add_chips(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        '--size',
        type=positive,
        metavar='PIXELS',
        help='side of a chip (default: 512)',
    )
    group.add_argument(
        '--stride',
        type=positive,
        metavar='PIXELS',
        help='from chip to chip (default: the size, so that chips do not overlap)',
    )
    group.add_argument(
        '--points',
        type=source,
        metavar='FILE',
        help='one chip around each point instead of a grid: CSV with columns lon and '
        'lat, or any vector file',
    )


def _add_imagery(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        '--roi',
        metavar='AREA',
        help='where, instead of --points: a vector file, WKT in EPSG:4326, or '
        '--roi=minlon,minlat,maxlon,maxlat',
    )
    group.add_argument('--start', metavar='DATE', help='first day, such as 2022-06-01')
    group.add_argument('--end', metavar='DATE', help='the day after the last')
    group.add_argument(
        '--year', type=positive, metavar='YEAR', help='instead of --start and --end'
    )
    group.add_argument(
        '--buffer',
        type=metres,
        metavar='METRES',
        help='half the side of a chip, on the ground, instead of --size',
    )
    group.add_argument(
        '--scale',
        type=metres,
        metavar='METRES',
        help='side of a pixel (default: 10)',
    )
    group.add_argument(
        '--cloudy-pct',
        type=percent,
        metavar='PERCENT',
        help='scenes with more clouds are left out (default: 30)',
    )
    group.add_argument(
        '--composite',
        choices=('median', 'mosaic'),
        help='how scenes become one image (default: median)',
    )
    group.add_argument(
        '--cloud-mask',
        choices=('scl', 'cs+'),
        help='mask clouds pixel by pixel, by the scene classification or by Cloud '
        'Score+ (default: no mask)',
    )
    group.add_argument(
        '--cache',
        type=local_output_path,
        metavar='FOLDER',
        help='keep fetched chips here',
    )
    group.add_argument('--project', metavar='ID', help='Google Cloud project')
    group.add_argument(
        '--ee-url',
        metavar='URL',
        help='server (default: the high-volume endpoint of Earth Engine)',
    )
    group.add_argument(
        '--max-concurrency',
        type=positive,
        metavar='N',
        help='requests in flight, of all processes and shards together (default: 32)',
    )
