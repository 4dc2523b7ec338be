"""Which projection suits a place: UTM, with its exceptions, and UPS at the poles."""

from typing import Any

import shapely
from pyproj import CRS

__all__ = ('lonlat_centre', 'utm_crs', 'utm_zone')


def utm_zone(lon: float, lat: float) -> int:
    """UTM zone number of a place.

    Zones are 6 degrees wide, but for south-western Norway (32V reaches west to 3
    degrees east) and for Svalbard (31X, 33X, 35X and 37X take the place of seven
    zones), as drawn in NGA.SIG.0012, "The Universal Grids and the Transverse Mercator
    and Polar Stereographic Map Projections".

    Args:
        lon: Longitude in degrees; any turn of the globe.
        lat: Latitude in degrees, -80 to 84.

    Returns:
        The zone, 1 to 60.
    """
    lon = (lon + 180) % 360 - 180
    if 56 <= lat < 64 and 3 <= lon < 12:
        return 32
    if lat >= 72 and 0 <= lon < 42:
        return 31 + 2 * (int(lon + 3) // 12)
    return int((lon + 180) // 6) + 1


def utm_crs(lon: float, lat: float) -> CRS:
    """The projection in metres that suits a place best.

    Args:
        lon: Longitude in degrees.
        lat: Latitude in degrees.

    Returns:
        The place's UTM zone on WGS 84 (EPSG:326xx north, 327xx south); UPS
        (EPSG:32661, EPSG:32761) from 84 degrees north and beyond 80 degrees south.
    """
    if lat >= 84:
        return CRS.from_epsg(32661)
    if lat < -80:
        return CRS.from_epsg(32761)
    return CRS.from_epsg((32600 if lat >= 0 else 32700) + utm_zone(lon, lat))


def lonlat_centre(geometry: Any) -> tuple[float, float]:
    """Middle of a geometry's extent, also where it crosses the antimeridian.

    Args:
        geometry: A shapely geometry in EPSG:4326.

    Returns:
        Longitude in [-180, 180) and latitude, in degrees.
    """
    west, south, east, north = geometry.bounds
    if east - west > 180:
        # Counted eastwards from Greenwich, the two sides of the antimeridian are one.
        lons = shapely.get_coordinates(geometry)[:, 0] % 360
        if float(lons.max() - lons.min()) < east - west:
            west, east = float(lons.min()), float(lons.max())
    lon = ((west + east) / 2 + 180) % 360 - 180
    return lon, (south + north) / 2
