"""What the options for Earth Engine mean."""

from argparse import Namespace
from collections.abc import Sequence

import geopandas as gpd
import shapely
from pyproj import CRS
from torchgeo.datasets import GeoDataset

from dynamicvis_geo.datasets import read_points
from dynamicvis_geo.datasets.areas import read_area
from dynamicvis_geo.datasets.earthengine import EarthEngineDataset
from dynamicvis_geo.datasets.zones import split_area, split_points
from dynamicvis_geo.earthengine import EarthEngineClient
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.samplers import GridSampler, PointSampler
from dynamicvis_geo.specs import SensorSpec, TemporalSpec

Pairs = Sequence[tuple[GeoDataset, GridSampler | PointSampler]]

CHIP_SIZE = 512
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


def earthengine_pairs(arguments: Namespace) -> Pairs:
    """Make a dataset and its sampler for each UTM zone that is asked for.

    Args:
        arguments: the options.

    Raises:
        SpecError: if options are missing or have values that cannot be used.
        SourceError: if the points cannot be read.
    """
    if (arguments.roi is None) == (arguments.points is None):
        raise SpecError('give either --roi or --points: where the chips are')
    window = _window(arguments)
    size = _chip_size(arguments)
    sensor = SensorSpec(
        scale_m=arguments.scale,
        cloudy_pct=arguments.cloudy_pct,
        composite=arguments.composite,
        cloud_mask=arguments.cloud_mask,
    )
    client = EarthEngineClient(
        project=arguments.project,
        url=arguments.ee_url,
        max_concurrency=arguments.max_concurrency,
    )

    def dataset(roi: gpd.GeoSeries, crs: CRS) -> EarthEngineDataset:
        return EarthEngineDataset(
            roi,
            window,
            sensor,
            crs=crs,
            cache=arguments.cache,
            client=client,
            on_missing=arguments.on_missing,
        )

    pairs: list[tuple[GeoDataset, GridSampler | PointSampler]] = []
    if arguments.points is None:
        for crs, area in split_area(read_area(arguments.roi)):
            zone = dataset(area, crs)
            pairs.append((zone, GridSampler(zone, size, arguments.stride)))
        return pairs
    for crs, points in split_points(read_points(arguments.points)):
        near = points.to_crs(crs)
        squares = near.buffer(size * arguments.scale, cap_style='square')
        zone = dataset(gpd.GeoSeries([shapely.union_all(squares)], crs=crs), crs)
        pairs.append((zone, PointSampler(zone, near, size)))
    return pairs


def _window(arguments: Namespace) -> TemporalSpec:
    start, end, year = arguments.start, arguments.end, arguments.year
    if year is not None and start is None and end is None:
        return TemporalSpec.year(year)
    if year is None and start is not None and end is not None:
        return TemporalSpec.range(start, end)
    raise SpecError('give either --year, or both --start and --end: when')


def _chip_size(arguments: Namespace) -> int:
    if arguments.buffer is None:
        return arguments.size or CHIP_SIZE
    if arguments.size is not None:
        raise SpecError('give either --size or --buffer: both set the size of a chip')
    size: int = round(2 * arguments.buffer / arguments.scale)
    if size < 1:
        raise SpecError(
            f'--buffer {arguments.buffer:g} is less than half a pixel of '
            f'{arguments.scale:g} m: give more metres'
        )
    return size
