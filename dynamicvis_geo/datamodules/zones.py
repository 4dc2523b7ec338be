"""Places anywhere on Earth as one dataset and sampler a UTM zone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import geopandas as gpd
import shapely
from pyproj import CRS
from torchgeo.datasets import GeoDataset

from dynamicvis_geo.datasets.zones import split_points
from dynamicvis_geo.samplers import GridSampler, PointSampler
from dynamicvis_geo.samplers.borders import SPACING, cover_once

#: Makes the dataset of an area (EPSG:4326 or *crs*) in the CRS of a zone.
MakeDataset: TypeAlias = Callable[[gpd.GeoSeries, CRS], GeoDataset]
Pairs: TypeAlias = Sequence[tuple[GeoDataset, GridSampler | PointSampler]]


def grid_pairs(
    zones: Sequence[tuple[CRS, gpd.GeoSeries]],
    make: MakeDataset,
    size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
) -> Pairs:
    """Cover an area with the chips of grids, once.

    How it is covered where zones meet says
    :func:`~dynamicvis_geo.samplers.borders.cover_once`.

    Args:
        zones: The area, as :func:`~dynamicvis_geo.datasets.zones.split_area` gives it.
        make: Makes the dataset of a zone.
        size: Size of a chip in pixels, or (height, width).
        stride: Pixels from chip to chip; *size* by default.
    """
    pairs = []
    for crs, part in zones:
        # Straight sides of zones bend when they are projected.
        dataset = make(part.segmentize(SPACING), crs)
        pairs.append((dataset, GridSampler(dataset, size, stride)))
    return cover_once(pairs)


def point_pairs(
    points: gpd.GeoDataFrame, make: MakeDataset, size: int | tuple[int, int]
) -> Pairs:
    """Put one chip around each point, in the zone in which the point lies.

    Args:
        points: Points in any CRS.
        make: Makes the dataset of a zone.
        size: Size of a chip in pixels, or (height, width).
    """
    pairs = []
    for crs, part in split_points(points):
        near = part.to_crs(crs)
        # The dataset says where it may be asked, not what is asked: a box is enough.
        around = gpd.GeoSeries([shapely.box(*near.total_bounds).buffer(1.0)], crs=crs)
        dataset = make(around, crs)
        pairs.append((dataset, PointSampler(dataset, near, size)))
    return pairs
