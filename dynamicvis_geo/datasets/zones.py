"""Areas and points anywhere on Earth, divided among the projections that suit them."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import geopandas as gpd
import numpy as np
import shapely
from pyproj import CRS

from dynamicvis_geo.datasets.areas import lonlat_area
from dynamicvis_geo.projections import utm_codes

#: Latitudes at which zones change: the poles, Norway, Svalbard and the equator.
_PARALLELS = (-90, -80, 0, 56, 64, 72, 84, 90)
#: Every meridian at which a zone begins or ends is a multiple of this.
_MERIDIANS = 3
#: Parts of an area that are thinner, in degrees, are what rounding leaves of a side
#: that lies on the border of a zone.
_THIN = 1e-9


def split_area(area: gpd.GeoSeries) -> list[tuple[CRS, gpd.GeoSeries]]:
    """Divide an area among UTM zones, and UPS at the poles.

    Args:
        area: geometries in any CRS, as :func:`~.areas.read_area` gives them.

    Returns:
        pairs of a projection and the part of *area* in its zone, in EPSG:4326, sorted
        by EPSG code. Zones that a polygon or line only touches are left out.

    Raises:
        SpecError: if the area cannot be drawn in longitude and latitude.
    """
    parts = shapely.get_parts(shapely.get_parts(lonlat_area(area).values))
    dimensions = shapely.get_dimensions(parts)
    kinds = [
        (dimension, shapely.union_all(parts[dimensions == dimension]))
        for dimension in np.unique(dimensions)
    ]
    pairs = []
    for code, zone in zones().items():
        found = []
        for dimension, geometry in kinds:
            part = shapely.intersection(geometry, zone)
            if shapely.get_dimensions(part) == dimension and not _is_thin(part):
                found.append(part)
        if found:
            pairs.append((CRS.from_epsg(code), gpd.GeoSeries(found, crs='EPSG:4326')))
    return pairs


def _is_thin(part: shapely.Geometry) -> bool:
    if shapely.get_dimensions(part) == 2:
        return bool(part.area <= _THIN * part.length)
    return bool(part.is_empty) or (
        shapely.get_dimensions(part) == 1 and part.length < _THIN
    )


def split_points(points: gpd.GeoDataFrame) -> list[tuple[CRS, gpd.GeoDataFrame]]:
    """Divide points among UTM zones, and UPS at the poles.

    Args:
        points: points in any CRS.

    Returns:
        pairs of a projection and the points of its zone, in the order of *points*;
        sorted by EPSG code.
    """
    lonlat = points.geometry.to_crs('EPSG:4326')
    groups = points.groupby(utm_codes(lonlat.x, lonlat.y), sort=True)
    return [(CRS.from_epsg(int(code)), part) for code, part in groups]


@lru_cache(maxsize=1)
def zones() -> dict[int, shapely.Geometry]:
    """Outline in EPSG:4326 of each UTM zone, and of UPS, by EPSG code, sorted."""
    edges = np.arange(-180, 181, _MERIDIANS)
    cells: dict[int, list[shapely.Geometry]] = {}
    for south, north in pairwise(_PARALLELS):
        middle = edges[:-1] + _MERIDIANS / 2
        codes = utm_codes(middle, np.full(len(middle), (south + north) / 2))
        for code, (west, east) in zip(codes.tolist(), pairwise(edges), strict=True):
            cells.setdefault(code, []).append(shapely.box(west, south, east, north))
    return {code: shapely.union_all(cells[code]) for code in sorted(cells)}
