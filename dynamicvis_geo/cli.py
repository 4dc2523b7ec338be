"""The command line, ``dynamicvis-geo``.

Each command is a module of ``dynamicvis_geo.commands``, which has its arguments, too.
"""

import argparse
import importlib
import os
import re
import select
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TextIO

import dynamicvis_geo
from dynamicvis_geo.commands import COMMANDS
from dynamicvis_geo.commands.options import Parser, add_command, option_name, option_of
from dynamicvis_geo.errors import DynamicVisGeoError
from dynamicvis_geo.paths import is_gdal_path, is_url
from dynamicvis_geo.termination import EXIT_CODE, Terminated, say, terminable

#: What the shell sees after an error of the user's, as after wrong arguments.
USER_ERROR = 2
INTERRUPTED = 130
UNREAD = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments, those of the process by default.

    Returns:
        0, or what the command says, or 2 after an error that was said in one line, or
        130 after Ctrl-C, or 143 after SIGTERM.

    Raises:
        SystemExit: With 141 if nobody reads what is printed any more, as of a program
            that the system ends for this; and as argparse does.
    """
    try:
        try:
            return _main(argv)
        finally:
            # Python would do so when nobody can tell any more what an error means.
            print(end='', flush=True)
    except BrokenPipeError:
        if not _unread():
            raise
        sys.exit(UNREAD)


def _main(argv: Sequence[str] | None) -> int:
    if '_ARGCOMPLETE' in os.environ:
        _complete(os.environ['COMP_LINE'])
    arguments = _parse(sys.argv[1:] if argv is None else argv)

    def show_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = _with_options(str(message), arguments.parser)
        # In one piece, so that lines of several processes do not mix.
        sys.stderr.write(f'dynamicvis-geo: warning: {text}\n')

    warnings.showwarning = show_warning
    with terminable():
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    try:
        code: int | None = _module(arguments.command).run(arguments)
    except DynamicVisGeoError as error:
        if arguments.debug:
            raise
        message = _with_options(_message(error), arguments.parser)
        message = _with_argument(message, arguments)
        print(f'dynamicvis-geo: error: {message}', file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        say('interrupted')
        return INTERRUPTED
    except Terminated:
        say('terminated')
        return EXIT_CODE
    return code or 0


def _complete(line: str) -> None:
    """Tell a shell how its line may go on, and end the process."""
    import argcomplete

    parser = _parser(line.split())
    argcomplete.autocomplete(parser, always_complete_options=False)


def _unread() -> bool:
    """Tell if standard output is a pipe without a reader; if so, write no more."""
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, OSError):
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser(argv)
    if list(argv[:1]) == ['predict']:
        # LightningCLI, which knows the classes, reads all but --debug itself.
        arguments = parser.parse_args(argv[:1])
        arguments.debug = '--debug' in argv
        arguments.rest = [argument for argument in argv[1:] if argument != '--debug']
        return arguments
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        arguments.parser.error(f'unrecognized arguments: {" ".join(unknown)}')
    return arguments


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Make the parser, with the arguments of the command that is named."""
    parser: argparse.ArgumentParser = Parser(
        prog='dynamicvis-geo',
        description='Features of the frozen DynamicVis backbone for satellite images.',
    )
    parser.add_argument(
        '--version', action=_Version, nargs=0, help='show the version and exit'
    )
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for name, summary in COMMANDS.items():
        command = add_command(commands, name, summary)
        if name in argv and name != 'predict':
            module = _module(name)
            # Below the line that says what the module is, its docstring is the help.
            command.description = (module.__doc__ or '').partition('\n\n')[2]
            module.add_arguments(command)
        elif name == 'predict':
            # For completion: LightningCLI reads it.
            command.add_argument('--config', metavar='FILE', help='what to run')
    return parser


def _module(command: str) -> ModuleType:
    return importlib.import_module(
        f'dynamicvis_geo.commands.{command.replace("-", "_")}'
    )


def _message(error: DynamicVisGeoError) -> str:
    """Give the message; that of a DataLoader worker ends a copy of its traceback."""
    text = str(error).strip()
    if not text.startswith('Caught '):
        return text
    _, _, message = text.rpartition('\ndynamicvis_geo.')
    return message.partition(': ')[2] or text.splitlines()[-1]


def _with_options(message: str, parser: argparse.ArgumentParser) -> str:
    """Name options where a message names arguments of Python (``cloudy_pct=130``)."""
    for action in parser._actions:
        option, word = option_name(action), action.dest.rpartition('.')[2]
        if option.startswith('--'):
            name = rf'(?<![\w./-]){word}'
            message = message.replace(f'{word}={action.const!r}', option)
            message = re.sub(rf"{name}='([\w./:+-]+)'", rf'{option} \1', message)
            message = re.sub(rf'{name}=(?=[^\s,;.)])', f'{option} ', message)
            # A word of English alone stands for itself.
            alone = rf'{name}=|{name}(?![\w/-])' if '_' in word else f'{name}='
            message = re.sub(alone, option, message)
    return message


def _with_argument(message: str, arguments: argparse.Namespace) -> str:
    """Say which argument a path was given as, where an error names the path alone."""
    found = []
    for dest, given in vars(arguments).items():
        for value in given if isinstance(given, list) else [given]:
            known = isinstance(value, Path) or is_url(value) or is_gdal_path(value)
            if dest in ('weights', 'checkpoint') or known:
                path = rf'(?<![\w.-]){re.escape(str(value))}(?![\w.-])'
                if (place := re.search(path, message)) is not None:
                    found.append((place.start(), dest))
    if not found or message.startswith('--'):
        return message
    _, dest = min(found)
    option = option_of(arguments, dest)
    return message if option in message else f'argument {option}: {message}'


class _Version(argparse.Action):
    """Look the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f'dynamicvis-geo {dynamicvis_geo.__version__}')
        parser.exit()


if __name__ == '__main__':
    sys.exit(main())
