"""The command line, ``dynamicvis-geo``.

Each command is a module of ``dynamicvis_geo.commands``, imported when it runs, so that
``--help`` needs neither PyTorch nor TorchGeo; the arguments are in
``dynamicvis_geo.arguments``.
"""

import argparse
import importlib
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from dynamicvis_geo.arguments import MODULES, predict
from dynamicvis_geo.arguments.common import Parser
from dynamicvis_geo.errors import DynamicVisGeoError
from dynamicvis_geo.paths import is_gdal_path, is_url
from dynamicvis_geo.termination import EXIT_CODE, Terminated, say, terminable

#: What the shell sees after an error of the user's, as after wrong arguments.
USER_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments, those of the process by default.

    Returns:
        0, or what the command says, or 2 after an error that was said in one line, or
        130 after Ctrl-C, or 143 after SIGTERM.
    """
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = _show_warning
    with terminable():
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    name = arguments.command.replace('-', '_')
    try:
        command = importlib.import_module(f'dynamicvis_geo.commands.{name}')
        code: int | None = command.run(arguments)
    except DynamicVisGeoError as error:
        if arguments.debug:
            raise
        print(
            f'dynamicvis-geo: error: {_named(_message(error), arguments)}',
            file=sys.stderr,
        )
        return USER_ERROR
    except KeyboardInterrupt:
        say('interrupted')
        return INTERRUPTED
    except Terminated:
        say('terminated')
        return EXIT_CODE
    return code or 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    if list(argv[:1]) != [predict.NAME]:
        arguments, unknown = _parser().parse_known_args(argv)
        if unknown:
            arguments.parser.error(f'unrecognized arguments: {" ".join(unknown)}')
        return arguments
    # The command reads all but --debug itself.
    arguments = _parser().parse_args(argv[:1])
    arguments.debug = '--debug' in argv
    arguments.rest = [argument for argument in argv[1:] if argument != '--debug']
    return arguments


def _message(error: DynamicVisGeoError) -> str:
    """Give the message; that of a DataLoader worker ends a copy of its traceback."""
    text = str(error).strip()
    if not text.startswith('Caught '):
        return text
    _, _, message = text.rpartition('\ndynamicvis_geo.')
    return message.partition(': ')[2] or text.splitlines()[-1]


def _named(message: str, arguments: argparse.Namespace) -> str:
    """Say which argument a path was given as, where an error names the path alone."""
    found = []
    for name, given in vars(arguments).items():
        for value in given if isinstance(given, list) else [given]:
            known = isinstance(value, Path) or is_url(value) or is_gdal_path(value)
            if name in ('weights', 'checkpoint') or known:
                path = rf'(?<![\w.-]){re.escape(str(value))}(?![\w.-])'
                if (place := re.search(path, message)) is not None:
                    found.append((place.start(), name))
    if not found or message.startswith('--'):
        return message
    _, name = min(found)
    usage = arguments.parser.format_usage()
    option = f'--{name}' if f'--{name} ' in usage else name.upper()
    return message if option in message else f'argument {option}: {message}'


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
    parser = Parser(
        prog='dynamicvis-geo',
        description='Features of the frozen DynamicVis backbone for satellite images.',
    )
    parser.add_argument(
        '--version', action=_Version, nargs=0, help='show the version and exit'
    )
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for module in MODULES:
        module.add_commands(commands)
    return parser


class _Version(argparse.Action):
    """Look the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f'dynamicvis-geo {version("dynamicvis-geo")}')
        parser.exit()


if __name__ == '__main__':
    sys.exit(main())
