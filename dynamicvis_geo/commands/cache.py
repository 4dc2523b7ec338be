"""``dynamicvis-geo cache``: what a cache of chips holds.

Show what a cache of chips holds, or remove its chips.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from dynamicvis_geo.commands.options import (
    add_examples,
    local_source,
)
from dynamicvis_geo.errors import SpecError

if TYPE_CHECKING:
    from dynamicvis_geo.earthengine import CacheInfo


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_examples(
        parser,
        'dynamicvis-geo cache info chips',
    )
    parser.add_argument('action', choices=('info', 'clear'))
    parser.add_argument('folder', type=local_source, metavar='FOLDER')


def run(arguments: Namespace) -> None:
    """Print what the cache holds, or held.

    Args:
        arguments: The options.

    Raises:
        SpecError: If there is no such folder.
    """
    from dynamicvis_geo.earthengine import ChipCache

    if not arguments.folder.is_dir():
        raise SpecError(f'{arguments.folder} is no folder: name that of --cache')
    cache = ChipCache(arguments.folder)
    if arguments.action == 'info':
        print(f'{cache.path} holds {_describe(cache.info())}.')
    else:
        print(f'Removed {_describe(cache.clear())} from {cache.path}.')


def _describe(info: CacheInfo) -> str:
    text = f'{info.chips} chips, {info.bytes / 1e6:.1f} MB'
    if info.oldest is None or info.newest is None:
        return text
    first, last = (
        datetime.fromtimestamp(time, UTC).isoformat(' ', 'minutes')
        for time in (info.oldest, info.newest)
    )
    return f'{text}, fetched from {first} to {last}'
