"""What the options for imagery mean."""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from dynamicvis_geo.callbacks.shards import Shard
from dynamicvis_geo.datamodules import (
    ChipDataModule,
    EarthEngineDataModule,
    ScenesDataModule,
)
from dynamicvis_geo.earthengine import EarthEngineClient
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.specs import SensorSpec, TemporalSpec

#: Options that say where and when, and all others that only Earth Engine has.
_PLACE_AND_TIME = ('roi', 'start', 'end', 'year', 'buffer', 'cache')
_SENSOR = {
    'scale': 'scale_m',
    'cloudy_pct': 'cloudy_pct',
    'composite': 'composite',
    'cloud_mask': 'cloud_mask',
}
_CLIENT = {'project': 'project', 'ee_url': 'url', 'max_concurrency': 'max_concurrency'}
_ONLY_EARTH_ENGINE = (
    *(*_PLACE_AND_TIME, *_SENSOR, *_CLIENT),
    *('on_missing', 'shards_at_once'),
)
_ALL = Shard()


def check_imagery(arguments: Namespace) -> None:
    """Refuse options that contradict each other.

    Raises:
        SpecError: if a source is given along with options for Earth Engine, or neither.
    """
    if arguments.source is not None and (
        given := _given(arguments, _ONLY_EARTH_ENGINE)
    ):
        options = ', '.join(f'--{name.replace("_", "-")}' for name in given)
        raise SpecError(
            f'only Earth Engine takes {options}, but SOURCE is {arguments.source}: '
            'leave out one or the other'
        )
    if arguments.source is None and arguments.bands is not None:
        raise SpecError(
            f'--bands {",".join(map(str, arguments.bands))} is for GeoTIFFs, but there '
            'is no SOURCE: leave it out (of Earth Engine the bands are B4, B3, B2; '
            'predict has data.sensor.bands)'
        )
    if arguments.source is None and not _given(arguments, _PLACE_AND_TIME):
        raise SpecError(
            'there is nothing to embed: give SOURCE (a GeoTIFF or a folder), or for '
            'Earth Engine --roi or --points, with --year or --start and --end'
        )


def _given(arguments: Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return the options that were given, by name; the others are None."""
    values = {name: getattr(arguments, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def imagery(arguments: Namespace, shard: Shard = _ALL) -> ChipDataModule:
    """Make the data module that the options of ``embed`` describe.

    Args:
        arguments: the options.
        shard: which of several runs this is, that share the limit of requests.

    Raises:
        SpecError: if options are missing, contradict each other, or have values that
            cannot be used.
    """
    loading = {
        'batch_size': arguments.batch_size,
        'num_workers': arguments.num_workers,
        'on_error': arguments.on_error,
    }
    if arguments.num_workers is None:
        # Fetching and computing then go on at the same time.
        loading['num_workers'] = 2 if arguments.source is None else 0
    _require_dates(arguments)
    check_imagery(arguments)
    if arguments.source is None:
        return earthengine(arguments, shard, **loading)
    return ScenesDataModule(
        arguments.source,
        arguments.bands or (1, 2, 3),
        arguments.size,
        arguments.stride,
        arguments.points,
        **loading,
    )


def earthengine(
    arguments: Namespace, shard: Shard = _ALL, **loading: Any
) -> EarthEngineDataModule:
    """Make the data module that the options for Earth Engine describe.

    Args:
        arguments: the options.
        shard: which of several runs this is, that share the limit of requests.
        **loading: how batches are loaded.

    Raises:
        SpecError: if options are missing or have values that cannot be used.
    """
    if (arguments.roi is None) == (arguments.points is None):
        raise SpecError('give either --roi or --points: where the chips are')
    return EarthEngineDataModule(
        roi=arguments.roi,
        points=arguments.points,
        time=_window(arguments),
        size=arguments.size,
        stride=arguments.stride,
        buffer_m=arguments.buffer,
        sensor=SensorSpec(**_renamed(arguments, _SENSOR)),
        client=_client(arguments, shard),
        cache=arguments.cache,
        **_given(arguments, ['on_missing']),
        **loading,
    )


def _client(arguments: Namespace, shard: Shard) -> EarthEngineClient:
    client = EarthEngineClient(**_renamed(arguments, _CLIENT))
    given: int | None = getattr(arguments, 'shards_at_once', None)
    if given is not None and shard.count == 1:
        raise SpecError(
            f'--shards-at-once {given} is for one of several shards, and this run does '
            'everything: give --shard I/N, or leave it out'
        )
    share = client.max_concurrency // min(given or shard.count, shard.count)
    return replace(client, max_concurrency=max(1, share))


def _renamed(arguments: Namespace, names: dict[str, str]) -> dict[str, Any]:
    """Return the options that were given, as the arguments that they stand for."""
    given = _given(arguments, names)
    return {names[name]: value for name, value in given.items()}


def _require_dates(arguments: Namespace) -> None:
    dates = (arguments.year, arguments.start, arguments.end)
    if arguments.source is None and arguments.points is not None and not any(dates):
        raise SpecError(
            f'--points {arguments.points} without SOURCE asks for Earth Engine, which '
            'needs dates: give --year, or --start and --end; or give SOURCE, the images'
        )


def _window(arguments: Namespace) -> TemporalSpec:
    start, end, year = arguments.start, arguments.end, arguments.year
    if year is not None and start is None and end is None:
        return TemporalSpec.year(year)
    if year is None and start is not None and end is not None:
        return TemporalSpec.range(start, end)
    given = {'--year': year, '--start': start, '--end': end}
    told = [f'{name} {value}' for name, value in given.items() if value is not None]
    raise SpecError(
        f'{" ".join(told) or "no date"} is given: give either --year, or both --start '
        'and --end'
    )
