"""Areas and points anywhere on Earth, divided among the projections that suit them."""

from functools import lru_cache
from itertools import pairwise

import geopandas as gpd
import shapely
from pyproj import CRS

from dynamicvis_geo.projections import utm_crs

#: Latitudes at which zones change: the poles, Norway, Svalbard and the equator.
_PARALLELS = (-90, -80, 0, 56, 64, 72, 84, 90)
#: Every meridian at which a zone begins or ends is a multiple of this.
_MERIDIANS = 3


def split_area(area: gpd.GeoSeries) -> list[tuple[CRS, gpd.GeoSeries]]:
    """Divide an area among UTM zones, and UPS at the poles.

    Args:
        area: geometries in any CRS, cut at the antimeridian if in degrees.

    Returns:
        pairs of a projection and the part of *area* in its zone, in EPSG:4326; zones
        that the area only touches are left out.
    """
    lonlat = area.to_crs('EPSG:4326').union_all()
    dimensions = shapely.get_dimensions(lonlat)
    pairs = []
    for crs, zone in _zones():
        part = shapely.intersection(lonlat, zone)
        if not part.is_empty and shapely.get_dimensions(part) == dimensions:
            pairs.append((crs, gpd.GeoSeries([part], crs='EPSG:4326')))
    return pairs


def split_points(points: gpd.GeoDataFrame) -> list[tuple[CRS, gpd.GeoDataFrame]]:
    """Divide points among UTM zones, and UPS at the poles.

    Args:
        points: points in any CRS.

    Returns:
        pairs of a projection and the points of its zone, in the order of *points*.
    """
    lonlat = points.geometry.to_crs('EPSG:4326')
    epsg = [utm_crs(point.x, point.y).to_epsg() for point in lonlat]
    groups = points.groupby(epsg, sort=True)
    return [(CRS.from_epsg(int(code)), part) for code, part in groups]


@lru_cache(maxsize=1)
def _zones() -> list[tuple[CRS, shapely.Geometry]]:
    cells: dict[CRS, list[shapely.Geometry]] = {}
    for south, north in pairwise(_PARALLELS):
        for west in range(-180, 180, _MERIDIANS):
            east = west + _MERIDIANS
            crs = utm_crs((west + east) / 2, (south + north) / 2)
            cells.setdefault(crs, []).append(shapely.box(west, south, east, north))
    zones = sorted(cells.items(), key=lambda zone: zone[0].to_string())
    return [(crs, shapely.union_all(boxes)) for crs, boxes in zones]
