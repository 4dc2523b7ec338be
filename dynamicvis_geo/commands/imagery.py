"""What the options for imagery mean."""

from argparse import Namespace
from typing import Any

from dynamicvis_geo.datamodules import (
    ChipDataModule,
    EarthEngineDataModule,
    ScenesDataModule,
)
from dynamicvis_geo.earthengine import EarthEngineClient
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.specs import SensorSpec, TemporalSpec

_ONLY_EARTH_ENGINE = ('roi', 'start', 'end', 'year', 'buffer', 'cache')


def check_imagery(arguments: Namespace) -> None:
    """Refuse options that contradict each other.

    Raises:
        SpecError: if a source is given along with options for Earth Engine, or neither.
    """
    given = [f'--{name}' for name in _ONLY_EARTH_ENGINE if getattr(arguments, name)]
    if arguments.source is not None and given:
        raise SpecError(
            f'{", ".join(given)} ask for Earth Engine, but SOURCE is '
            f'{arguments.source}: leave out one or the other'
        )
    if arguments.source is None and not given:
        raise SpecError(
            'there is nothing to embed: give SOURCE (a GeoTIFF or a folder), or for '
            'Earth Engine --roi or --points, with --year or --start and --end'
        )


def imagery(arguments: Namespace) -> ChipDataModule:
    """Make the data module that the options of ``embed`` describe.

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
    check_imagery(arguments)
    if arguments.source is None:
        return earthengine(arguments, **loading)
    return ScenesDataModule(
        arguments.source,
        arguments.bands,
        arguments.size,
        arguments.stride,
        arguments.points,
        **loading,
    )


def earthengine(arguments: Namespace, **loading: Any) -> EarthEngineDataModule:
    """Make the data module that the options for Earth Engine describe.

    Args:
        arguments: the options.
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
        sensor=SensorSpec(
            scale_m=arguments.scale,
            cloudy_pct=arguments.cloudy_pct,
            composite=arguments.composite,
            cloud_mask=arguments.cloud_mask,
        ),
        client=EarthEngineClient(
            project=arguments.project,
            url=arguments.ee_url,
            max_concurrency=arguments.max_concurrency,
        ),
        cache=arguments.cache,
        on_missing=arguments.on_missing,
        **loading,
    )


def _window(arguments: Namespace) -> TemporalSpec:
    start, end, year = arguments.start, arguments.end, arguments.year
    if year is not None and start is None and end is None:
        return TemporalSpec.year(year)
    if year is None and start is not None and end is not None:
        return TemporalSpec.range(start, end)
    raise SpecError('give either --year, or both --start and --end: when')
