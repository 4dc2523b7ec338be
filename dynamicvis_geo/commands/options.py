"""Options that several commands have, and how the values of options are read."""

import argparse
import logging
import math
import sys
import textwrap
from collections.abc import Callable
from typing import NoReturn, TypeAlias, TypeVar

from dynamicvis_geo.errors import DynamicVisGeoError
from dynamicvis_geo.models.config import MAX_IMG_SIZE, MIN_IMG_SIZE
from dynamicvis_geo.paths import (
    image_path,
    input_path,
    local_input,
    local_output,
    output_path,
)

T = TypeVar('T')
Commands: TypeAlias = 'argparse._SubParsersAction[argparse.ArgumentParser]'


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2.

        Args:
            message: What is wrong.
        """
        if message.endswith('expected one argument'):
            message += ' (a value that begins with a minus follows an equals sign)'
        message = ' '.join(message.split())
        name, _, _ = self.prog.partition(' ')
        self.exit(2, f'{name}: error: {message}; see {self.prog} --help\n')


def add_command(
    commands: Commands, name: str, summary: str, description: str | None = None
) -> argparse.ArgumentParser:
    """Add a command, or a kind of one, to the list of all.

    Args:
        commands: What ``add_subparsers`` gave.
        name: Of the command.
        summary: Its line in the list.
        description: First paragraph of its help, if there is one.

    Returns:
        Parser of the command, to which its arguments are added.
    """
    parser = commands.add_parser(name, help=summary, description=description)
    parser.set_defaults(parser=parser)
    parser.add_argument(
        '--debug', action='store_true', help='show the traceback of an error'
    )
    return parser


def add_examples(parser: argparse.ArgumentParser, *lines: str) -> None:
    """Add examples to the help, before the options, which may be many."""
    text = textwrap.fill(' '.join((parser.description or '').split()), 78)
    parser.description = '\n  '.join([f'{text}\n\nexamples:', *lines])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def option_name(action: argparse.Action) -> str:
    """Name an argument as a user calls it: ``--size``, or ``SOURCE``.

    Args:
        action: The argument.
    """
    return str([action.metavar, *action.option_strings][-1])


def option_of(arguments: argparse.Namespace, dest: str) -> str:
    """Name the option that sets a value, as a user calls it.

    Args:
        arguments: The options.
        dest: Name under which the value is kept.
    """
    actions = arguments.parser._actions
    return next(option_name(action) for action in actions if action.dest == dest)


def add_input(
    parser: argparse._ActionsContainer,
    what: str = 'a .parquet file of pooled embeddings, or a folder of maps',
) -> None:
    """Add ``INPUT``, an output or an image."""
    parser.add_argument('input', type=source, metavar='INPUT', help=what)


def add_overwrite(parser: argparse._ActionsContainer, what: str = 'an output') -> None:
    """Add ``--overwrite``, where it replaces files that exist."""
    that = 'that exist' if what.endswith('s') else 'that exists'
    parser.add_argument(
        '--overwrite', action='store_true', help=f'replace {what} {that}'
    )


def add_backbone(parser: argparse._ActionsContainer) -> None:
    """Add ``--weights`` and ``--img-size``."""
    parser.add_argument(
        '--weights',
        type=checkpoint,
        default='pretrained',
        metavar='pretrained|random|PATH',
        help='the published checkpoint, untrained weights for trying things out, or a '
        'checkpoint file (default: pretrained)',
    )
    parser.add_argument(
        '--img-size',
        type=img_size,
        metavar='PIXELS',
        help='side to which chips are resized for the backbone; the time grows with '
        'its square (default: RS_EMBED_DYNAMICVIS_IMG, else 512, as in training)',
    )


def add_device(parser: argparse._ActionsContainer) -> None:
    """Add ``--device``."""
    parser.add_argument(
        '--device',
        default='auto',
        metavar='auto|cpu|cuda|cuda:N|mps',
        help='where the backbone runs (default: auto)',
    )


def add_precision(parser: argparse._ActionsContainer) -> None:
    """Add ``--precision``."""
    parser.add_argument(
        '--precision',
        choices=('32-true', 'bf16-mixed'),
        default='32-true',
        help='of the backbone (default: 32-true)',
    )


def add_running(parser: argparse.ArgumentParser) -> None:
    """Add the options for the device, the processes and the speed of a run.

    Args:
        parser: Of the command.
    """
    group = parser.add_argument_group('running')
    group.add_argument(
        '--batch-size',
        type=positive,
        default=4,
        metavar='N',
        help='chips a forward pass (default: 4)',
    )
    group.add_argument(
        '--num-workers',
        type=count,
        metavar='N',
        help='processes that get images ahead, for each one that computes (default: 2 '
        'for Earth Engine, else 0)',
    )
    add_device(group)
    group.add_argument(
        '--devices',
        type=devices,
        default=1,
        metavar='N|auto',
        help='processes that compute, each on a GPU of its own where there are any; '
        'auto takes all GPUs (default: 1)',
    )
    group.add_argument(
        '--nodes',
        type=positive,
        default=1,
        metavar='N',
        help='machines of the run, as started by Slurm or torchrun (default: 1)',
    )
    group.add_argument(
        '--quiet',
        action='store_true',
        help='no progress bar, and of messages only warnings and the last line',
    )
    add_precision(group)


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add the options for images beside features, and their bands.

    Args:
        parser: Of the command.
    """
    parser.add_argument(
        '--images',
        type=images,
        metavar='PATH',
        help='where the images of the chips are: the GeoTIFF or the folder that was '
        'embedded, or the cache of chips',
    )
    add_bands(parser, 'those that were embedded, if the input says so, else 1,2,3')


def add_class_colors(parser: argparse._ActionsContainer) -> None:
    """Add ``--class-colors``."""
    parser.add_argument(
        '--class-colors',
        type=local_source,
        metavar='FILE',
        help='CSV with the columns name and color (#1b7837, green) of some classes '
        '(default: land cover as it looks, other classes so that colour-blind people '
        'tell them apart)',
    )


def read_colors(arguments: argparse.Namespace) -> dict[str, str] | None:
    """Read the file of ``--class-colors``; None if it is not given.

    Raises:
        SourceError: If a line cannot be used.
    """
    from dynamicvis_geo.plotting.palette import read_class_colours

    if arguments.class_colors is None:
        return None
    return read_class_colours(arguments.class_colors)


def add_bands(parser: argparse._ActionsContainer, default: str = '1,2,3') -> None:
    """Add ``--bands``."""
    parser.add_argument(
        '--bands',
        type=bands,
        metavar='R,G,B',
        help='bands of a GeoTIFF that stand for red, green and blue (default: '
        f'{default})',
    )


def log(quiet: bool) -> None:
    """Let the package's own messages out, a line each, on standard error.

    Args:
        quiet: Whether warnings alone are let out.
    """
    logger = logging.getLogger('dynamicvis_geo')
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter('dynamicvis-geo: %(message)s'))
    # One for each command that a process runs: standard error may have changed.
    logger.handlers = [handler]


def positive(text: str) -> int:
    """Read a whole number from 1."""
    return _whole(text, 1)


def count(text: str) -> int:
    """Read a whole number from 0."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    # More digits than these are no number that anything here can take.
    if not text.isdecimal() or len(text) > 18 or int(text) < least:
        raise argparse.ArgumentTypeError(
            f'{text!r} must be a whole number from {least}'
        )
    return int(text)


def img_size(text: str) -> int:
    """Read a side of the backbone's images."""
    if not text.isdecimal() or not MIN_IMG_SIZE <= int(text) <= MAX_IMG_SIZE:
        raise argparse.ArgumentTypeError(
            f'{text!r} must be a number of pixels, {MIN_IMG_SIZE} to {MAX_IMG_SIZE}'
        )
    return int(text)


def devices(text: str) -> int | str:
    """Read a number of processes, or auto."""
    try:
        return text if text == 'auto' else positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f'{error}, or auto') from error


def metres(text: str) -> float:
    """Read a length above 0."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f'{text!r} must be a number of metres above 0')
    return number


def percent(text: str) -> float:
    """Read a number from 0 to 100."""
    number = _number(text)
    if not 0 <= number <= 100:
        raise argparse.ArgumentTypeError(f'{text!r} must be a number from 0 to 100')
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def reader(check: Callable[[str], T]) -> Callable[[str], T]:
    """Return a check of a value whose errors argparse tells.

    Args:
        check: Reads the value, or raises an error of this package.
    """

    def read(text: str) -> T:
        try:
            return check(text)
        except DynamicVisGeoError as error:
            raise argparse.ArgumentTypeError(str(error).rstrip('.')) from error

    return read


#: The path or URL of something to be read; or GDAL's name of images, too; or no URL.
source = reader(input_path)
images = reader(image_path)
local_source = reader(local_input)
#: The path or URL of something to be written; or no URL.
output = reader(output_path)
local_output_path = reader(local_output)


def checkpoint(text: str) -> str:
    """Read the path of a checkpoint, or a name that stands for one."""
    if not text.startswith('hf://'):
        local_source(text)
    return text


def bands(text: str) -> tuple[int, int, int]:
    """Read the numbers of the red, green and blue band."""
    numbers = text.split(',')
    if len(numbers) != 3 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise argparse.ArgumentTypeError(
            f'{text!r} must be three band numbers from 1, such as 4,3,2'
        )
    red, green, blue = map(int, numbers)
    return red, green, blue
