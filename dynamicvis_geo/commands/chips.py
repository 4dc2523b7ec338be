"""Options that say which chips, and the data module and the plan they come to."""

from __future__ import annotations

import logging
import os
import warnings
from argparse import ArgumentParser, Namespace, _ActionsContainer
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dynamicvis_geo.commands.options import (
    local_output_path,
    metres,
    percent,
    positive,
    source,
)
from dynamicvis_geo.commands.windows import windows, years
from dynamicvis_geo.errors import EarthEngineError, SpecError
from dynamicvis_geo.paths import is_url

if TYPE_CHECKING:
    from dynamicvis_geo.callbacks.shards import Shard
    from dynamicvis_geo.datamodules import ChipDataModule
    from dynamicvis_geo.datamodules.plan import Plan
    from dynamicvis_geo.earthengine import EarthEngineClient
    from dynamicvis_geo.specs import TemporalSpec

_logger = logging.getLogger(__name__)


def add_chips(group: _ActionsContainer) -> None:
    """Add the options for the size and stride of chips, and for points.

    Args:
        group: To which they are added.
    """
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


def add_earthengine(group: _ActionsContainer) -> None:
    """Add the options for the area, the dates and the imagery of Earth Engine.

    What an option sets is its ``dest``: an argument of :class:`EarthEngineDataModule`
    (``data.``), :class:`SensorSpec` (``sensor.``), :class:`EarthEngineClient`
    (``client.``) or :class:`TemporalSpec` (``time.``). What is not given keeps their
    defaults.

    Args:
        group: To which they are added.
    """
    group.add_argument(
        '--roi',
        dest='data.roi',
        metavar='AREA',
        help='where, instead of --points: a vector file, WKT in EPSG:4326, or '
        '--roi=minlon,minlat,maxlon,maxlat',
    )
    group.add_argument(
        '--start',
        dest='time.start',
        metavar='DATE',
        help='first day, such as 2022-06-01',
    )
    group.add_argument(
        '--end', dest='time.end', metavar='DATE', help='the day after the last'
    )
    group.add_argument(
        '--year',
        dest='time.year',
        type=positive,
        metavar='YEAR',
        help='instead of --start and --end',
    )
    group.add_argument(
        '--windows',
        dest='time.windows',
        type=windows,
        metavar='START/END,...',
        help='a chip of each place for each of several time windows, such as '
        '2022-06-01/2022-09-01,2023-06-01/2023-09-01, the end not included; they may '
        'overlap. Dates in the file of --points are not used',
    )
    group.add_argument(
        '--years',
        dest='time.years',
        type=years,
        metavar='YEARS',
        help='a chip of each place for each year, such as 2018-2024 or 2018,2020',
    )
    group.add_argument(
        '--buffer',
        dest='data.buffer_m',
        type=metres,
        metavar='METRES',
        help='half the side of a chip, on the ground, instead of --size',
    )
    group.add_argument(
        '--scale',
        dest='sensor.scale_m',
        type=metres,
        metavar='METRES',
        help='side of a pixel (default: 10)',
    )
    group.add_argument(
        '--cloudy-pct',
        dest='sensor.cloudy_pct',
        type=percent,
        metavar='PERCENT',
        help='scenes with more clouds are left out (default: 30)',
    )
    group.add_argument(
        '--composite',
        dest='sensor.composite',
        choices=('median', 'mosaic'),
        help='how scenes become one image (default: median)',
    )
    group.add_argument(
        '--cloud-mask',
        dest='sensor.cloud_mask',
        choices=('scl', 'cs+'),
        help='mask clouds pixel by pixel, by the scene classification or by Cloud '
        'Score+ (default: no mask)',
    )
    group.add_argument(
        '--cache',
        dest='data.cache',
        type=local_output_path,
        metavar='FOLDER',
        help='keep fetched chips here',
    )
    group.add_argument(
        '--project', dest='client.project', metavar='ID', help='Google Cloud project'
    )
    group.add_argument(
        '--ee-url',
        dest='client.url',
        metavar='URL',
        help='server (default: the high-volume endpoint of Earth Engine)',
    )
    group.add_argument(
        '--max-concurrency',
        dest='client.max_concurrency',
        type=positive,
        metavar='N',
        help='requests in flight, of all processes and shards together (default: 32)',
    )


def add_plan(parser: ArgumentParser) -> None:
    """Add the options to plan a run only, and not to refuse it for its size.

    Args:
        parser: Of the command.
    """
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


def earthengine(arguments: Namespace, shard: Shard | None = None) -> dict[str, Any]:
    """Read the options for Earth Engine, without PyTorch.

    Args:
        arguments: the options.
        shard: which of several runs this is, that share the limit of requests; None
            if it does everything.

    Returns:
        Arguments of :class:`EarthEngineDataModule`.

    Raises:
        SpecError: if options are missing or have values that cannot be used.
        SourceError: if there is no such file of points.
    """
    from dynamicvis_geo.datasets.requests import points_file, read_area
    from dynamicvis_geo.specs import SensorSpec

    given = set_by(arguments, 'data')
    if ('roi' in given) == (arguments.points is not None):
        raise SpecError('give either --roi or --points: where the chips are')
    read = {
        **given,
        'points': arguments.points,
        'time': _windows(arguments),
        'size': arguments.size,
        'stride': arguments.stride,
        'sensor': SensorSpec(**set_by(arguments, 'sensor')),
        'client': _client(arguments, 1 if shard is None else shard.count),
    }
    if arguments.points is not None:
        points_file(arguments.points)
    elif not is_url(given['roi']) and not os.path.exists(given['roi']):
        # Text, and not the name of what may take long to read.
        read_area(given['roi'])
    return read


def set_by(arguments: Namespace, owner: str) -> dict[str, Any]:
    """Collect the arguments that given options set of one owner.

    Args:
        arguments: The options.
        owner: ``data``, ``sensor``, ``client`` or ``time``.

    Returns:
        Values by the names of the arguments.
    """
    return {
        name.removeprefix(f'{owner}.'): value
        for name, value in vars(arguments).items()
        if name.startswith(f'{owner}.') and value is not None
    }


def _windows(arguments: Namespace) -> list[TemporalSpec]:
    from dynamicvis_geo.specs import TemporalSpec

    given = set_by(arguments, 'time')
    match list(given):
        case ['year']:
            return [TemporalSpec.year(**given)]
        case ['start', 'end']:
            return [TemporalSpec.range(**given)]
        case ['windows' | 'years' as name]:
            several: list[TemporalSpec] = given[name]
            return several
    told = ' '.join(
        f'--{name} {"..." if isinstance(value, list) else value}'
        for name, value in given.items()
    )
    raise SpecError(
        f'{told or "no date"} is given: give either --year, or both --start and --end; '
        'or one of --years and --windows, for several chips a place'
    )


def _client(arguments: Namespace, shards: int) -> EarthEngineClient:
    from dynamicvis_geo.earthengine import EarthEngineClient

    client = EarthEngineClient(**set_by(arguments, 'client'))
    at_once: int = set_by(arguments, 'shards').get('at_once', shards)
    return replace(
        client, max_concurrency=max(1, client.max_concurrency // min(at_once, shards))
    )


def goes_ahead(
    data: ChipDataModule, plan: Plan, arguments: Namespace, shard: Shard | None = None
) -> bool:
    """Say what will be done; return whether to do it.

    Args:
        data: the chips.
        plan: what will be done.
        arguments: the options.
        shard: as :func:`say_plan`.

    Raises:
        SpecError: if it is so much that it may be a mistake, unless ``--yes``.
    """
    excess = ' and '.join(plan.excess)
    if arguments.dry_run:
        if is_first():
            print(f'{_whose(shard)}{_with_scenes(data, plan)}')
        if excess and not arguments.yes:
            warnings.warn(f'{excess}: without --yes it is refused', stacklevel=2)
        return False
    if excess and not arguments.yes:
        raise SpecError(
            f'{excess}: {plan}. Give --yes if that is meant, else a smaller area, or '
            'another --size, --stride or --scale'
        )
    say_plan(plan, shard)
    return True


def say_plan(plan: Plan, shard: Shard | None = None) -> None:
    """Log what will be done, in the first process.

    Args:
        plan: what will be done.
        shard: which of several runs this is, that do the plan together.
    """
    if is_first():
        _logger.info('%s%s', _whose(shard), plan)


def is_first() -> bool:
    """Tell if this process speaks for all of a run."""
    from lightning.pytorch.utilities import rank_zero_only

    return getattr(rank_zero_only, 'rank', 0) == 0


def _whose(shard: Shard | None) -> str:
    if shard is None or shard.count == 1:
        return ''
    return f'all {shard.count} shards together: '


def _with_scenes(data: ChipDataModule, plan: Plan) -> Plan:
    from dynamicvis_geo.datamodules import EarthEngineDataModule
    from dynamicvis_geo.datamodules.plan import LARGEST_SIDE

    if not isinstance(data, EarthEngineDataModule) or plan.side > LARGEST_SIDE:
        return plan
    try:
        return replace(plan, scenes=data.count_scenes())
    except EarthEngineError as error:
        warnings.warn(f'scenes a chip could not be counted: {error}', stacklevel=2)
        return plan
