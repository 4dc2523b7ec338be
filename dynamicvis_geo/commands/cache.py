"""``dynamicvis-geo cache``: what a cache of chips holds."""

from argparse import Namespace
from datetime import UTC, datetime

from dynamicvis_geo.earthengine import CacheInfo, ChipCache
from dynamicvis_geo.errors import SpecError


def run(arguments: Namespace) -> None:
    """Print what the cache holds, or held."""
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
