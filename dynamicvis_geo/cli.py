"""The command line, ``dynamicvis-geo``.

Only the arguments are here; each command is a module of ``dynamicvis_geo.commands``,
imported when it runs, so that ``--help`` needs neither PyTorch nor TorchGeo.
"""

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from dynamicvis_geo.errors import DynamicVisGeoError

#: What the shell sees after an error of the user's, as after wrong arguments.
USER_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments, those of the process by default.

    Returns:
        0, or what the command says, or 2 after an error that was said in one line, or
        130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    warnings.showwarning = _show_warning
    command = importlib.import_module(f'dynamicvis_geo.commands.{arguments.command}')
    try:
        code: int | None = command.run(arguments)
    except DynamicVisGeoError as error:
        if arguments.debug:
            raise
        print(f'dynamicvis-geo: error: {_one_line(error)}', file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print('dynamicvis-geo: interrupted', file=sys.stderr)
        return INTERRUPTED
    return code or 0


def _one_line(error: DynamicVisGeoError) -> str:
    """Give the message; that of a DataLoader worker ends a copy of its traceback."""
    last = str(error).strip().splitlines()[-1]
    prefix, colon, message = last.partition(': ')
    return message if colon and prefix.startswith('dynamicvis_geo.') else last


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f'dynamicvis-geo: warning: {message}', file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='dynamicvis-geo',
        description='Features of the frozen DynamicVis backbone for satellite images.',
    )
    parser.add_argument(
        '--version', action=_Version, nargs=0, help='show the version and exit'
    )
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    _add_embed(commands)
    _add_fetch(commands)
    _add_cache(commands)
    _add_demo(commands)
    _add_info(commands)
    _add_verify(commands)
    _add_convert(commands)
    return parser


class _Version(argparse.Action):
    """Look the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f'dynamicvis-geo {version("dynamicvis-geo")}')
        parser.exit()


def _add_embed(
    commands: 'argparse._SubParsersAction[argparse.ArgumentParser]',
) -> None:
    parser = _command(
        commands,
        'embed',
        'embed chips of GeoTIFFs or of Earth Engine composites',
        'Cut chips from GeoTIFFs, or fetch them from Google Earth Engine; embed them, '
        'and write the embeddings with their footprints: pooled to one GeoParquet '
        'file, or with --grid the feature maps to one GeoTIFF a chip.',
    )
    parser.add_argument(
        'source',
        type=Path,
        nargs='?',
        metavar='SOURCE',
        help='a GeoTIFF, or a folder of them; without it, chips come from Earth Engine',
    )
    parser.add_argument(
        '--output',
        type=Path,
        required=True,
        metavar='OUT',
        help='file that ends in .parquet, or with --grid a folder',
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='replace an output that exists'
    )
    chips = parser.add_argument_group('chips')
    _add_chips(chips)
    chips.add_argument(
        '--bands',
        type=_bands,
        default=(1, 2, 3),
        metavar='R,G,B',
        help='bands of a GeoTIFF that stand for red, green and blue (default: 1,2,3)',
    )
    chips.add_argument(
        '--input-range',
        type=_range,
        default=(0.0, 10000.0),
        metavar='LOW,HIGH',
        help='values that become black and white (default: 0,10000, Sentinel-2 surface '
        'reflectance)',
    )
    _add_imagery(parser.add_argument_group('Earth Engine, without SOURCE'))
    features = parser.add_argument_group('features')
    features.add_argument(
        '--grid', action='store_true', help='feature maps instead of pooled vectors'
    )
    features.add_argument(
        '--pooling',
        choices=('mean', 'max'),
        default='mean',
        help='over the cells of a map (default: mean)',
    )
    _add_weights(features)
    _add_run_options(parser)


def _add_fetch(
    commands: 'argparse._SubParsersAction[argparse.ArgumentParser]',
) -> None:
    parser = _command(
        commands,
        'fetch',
        'fetch chips from Earth Engine into a cache',
        'Fill a cache ahead of embed, which with the same options then needs no '
        'network. Interrupted and started again, it continues where it stopped.',
    )
    _add_chips(parser.add_argument_group('chips'))
    _add_imagery(parser.add_argument_group('Earth Engine'))


def _add_cache(
    commands: 'argparse._SubParsersAction[argparse.ArgumentParser]',
) -> None:
    parser = _command(
        commands,
        'cache',
        'show or empty a cache of chips',
        'Show what a cache of chips holds, or remove its chips.',
    )
    parser.add_argument('action', choices=('info', 'clear'))
    parser.add_argument('folder', type=Path, metavar='FOLDER')


def _add_chips(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        '--size',
        type=_positive,
        metavar='PIXELS',
        help='side of a chip (default: 512)',
    )
    group.add_argument(
        '--stride',
        type=_positive,
        metavar='PIXELS',
        help='from chip to chip (default: the size, so that chips do not overlap)',
    )
    group.add_argument(
        '--points',
        type=Path,
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
        '--year', type=_positive, metavar='YEAR', help='instead of --start and --end'
    )
    group.add_argument(
        '--buffer',
        type=float,
        metavar='METRES',
        help='half the side of a chip, on the ground, instead of --size',
    )
    group.add_argument(
        '--scale',
        type=float,
        default=10.0,
        metavar='METRES',
        help='side of a pixel (default: 10)',
    )
    group.add_argument(
        '--cloudy-pct',
        type=float,
        default=30.0,
        metavar='PERCENT',
        help='scenes with more clouds are left out (default: 30)',
    )
    group.add_argument(
        '--composite',
        choices=('median', 'mosaic'),
        default='median',
        help='how scenes become one image (default: median)',
    )
    group.add_argument(
        '--cloud-mask',
        choices=('scl', 'cs+'),
        help='mask clouds pixel by pixel, by the scene classification or by Cloud '
        'Score+ (default: no mask)',
    )
    group.add_argument(
        '--on-missing',
        choices=('raise', 'fill', 'skip'),
        default='raise',
        help='for a chip without imagery: stop, fill it with zeros, or leave it out '
        'and list it in OUT.failures.jsonl (default: raise)',
    )
    group.add_argument(
        '--cache', type=Path, metavar='FOLDER', help='keep fetched chips here'
    )
    group.add_argument('--project', metavar='ID', help='Google Cloud project')
    group.add_argument(
        '--ee-url',
        metavar='URL',
        help='server (default: the high-volume endpoint of Earth Engine)',
    )
    group.add_argument(
        '--max-concurrency',
        type=_positive,
        default=32,
        metavar='N',
        help='requests in flight, of all processes together (default: 32)',
    )


def _add_demo(
    commands: 'argparse._SubParsersAction[argparse.ArgumentParser]',
) -> None:
    parser = _command(
        commands,
        'demo',
        'embed a synthetic scene with random weights',
        'Make a small synthetic scene that looks like Sentinel-2, embed it with random '
        'weights, and write the scene, a GeoParquet file, feature maps as GeoTIFFs, '
        'and a picture. Needs no network.',
    )
    parser.add_argument(
        '--output',
        type=Path,
        default=Path('demo-output'),
        metavar='FOLDER',
        help='folder for the files (default: demo-output); those of an earlier demo '
        'are replaced',
    )
    _add_run_options(parser)


def _add_info(
    commands: 'argparse._SubParsersAction[argparse.ArgumentParser]',
) -> None:
    parser = _command(
        commands,
        'info',
        'show the configuration, or inspect a checkpoint',
        'Show the configuration of the backbone and where each value comes from, '
        'versions, the device, and the form of the selective scan that will run; or '
        'inspect a checkpoint without building a model.',
    )
    parser.add_argument(
        '--checkpoint', type=Path, metavar='FILE', help='inspect this file instead'
    )
    _add_weights(parser)
    _add_device(parser)


def _add_verify(
    commands: 'argparse._SubParsersAction[argparse.ArgumentParser]',
) -> None:
    parser = _command(
        commands,
        'verify',
        'compare this implementation with the official code',
        'Run the official code and this implementation with the same weights on the '
        'same images, on this machine, and report how far they differ. Exits with 1 if '
        'that is more than rounding explains.',
    )
    parser.add_argument(
        'images',
        type=Path,
        nargs='*',
        metavar='IMAGE',
        help='GeoTIFFs, each resized to one input (default: two generated images)',
    )
    _add_weights(parser)
    _add_device(parser)


def _add_convert(
    commands: 'argparse._SubParsersAction[argparse.ArgumentParser]',
) -> None:
    parser = _command(
        commands,
        'convert',
        'write the backbone of a checkpoint as safetensors',
        'Write the backbone alone, which is smaller and loads faster; its metadata '
        'says which file it was taken from.',
    )
    parser.add_argument('checkpoint', type=Path, metavar='CHECKPOINT')
    parser.add_argument('out', type=Path, metavar='OUT.safetensors')
    parser.add_argument(
        '--overwrite', action='store_true', help='replace an output that exists'
    )


def _add_weights(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        '--weights',
        default='pretrained',
        metavar='pretrained|random|PATH',
        help='the published checkpoint, untrained weights for trying things out, or a '
        'checkpoint file (default: pretrained)',
    )


def _add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        '--device',
        default='auto',
        metavar='auto|cpu|cuda|cuda:N|mps',
        help='where the backbone runs (default: auto)',
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('running')
    group.add_argument(
        '--batch-size',
        type=_positive,
        default=4,
        metavar='N',
        help='chips a forward pass (default: 4)',
    )
    group.add_argument(
        '--num-workers',
        type=_count,
        default=0,
        metavar='N',
        help='processes that read images ahead (default: 0, read in this process)',
    )
    _add_device(group)
    group.add_argument(
        '--precision',
        choices=('32-true', 'bf16-mixed'),
        default='32-true',
        help='of the backbone (default: 32-true)',
    )


def _command(
    commands: 'argparse._SubParsersAction[argparse.ArgumentParser]',
    name: str,
    summary: str,
    description: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=description)
    parser.add_argument(
        '--debug', action='store_true', help='show the traceback of an error'
    )
    return parser


def _positive(text: str) -> int:
    number = _count(text)
    if number == 0:
        raise argparse.ArgumentTypeError(f'{text!r} must be 1 or more')
    return number


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'{text!r} must be a whole number')
    return int(text)


def _bands(text: str) -> tuple[int, int, int]:
    numbers = text.split(',')
    if len(numbers) != 3 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise argparse.ArgumentTypeError(
            f'{text!r} must be three band numbers from 1, such as 4,3,2'
        )
    red, green, blue = map(int, numbers)
    return red, green, blue


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(','))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f'{text!r} must be two numbers, such as 0,3000'
        ) from error
    return low, high


if __name__ == '__main__':
    sys.exit(main())
