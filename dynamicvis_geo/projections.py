"""Names of CRSs, and the projection that suits a place: UTM, or UPS at the poles."""

from typing import Any

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray
from pyproj import CRS

__all__ = ('crs_name', 'lonlat_centre', 'utm_codes', 'utm_crs', 'utm_zone')


def utm_codes(lon: ArrayLike, lat: ArrayLike) -> NDArray[np.int64]:
    """EPSG codes of the projections in metres that suit places best.

    UTM zones are 6 degrees wide, but for south-western Norway (32V reaches west to 3
    degrees east) and for Svalbard (31X, 33X, 35X and 37X take the place of seven
    zones), as drawn in NGA.SIG.0012, "The Universal Grids and the Transverse Mercator
    and Polar Stereographic Map Projections". A border belongs to the zone east or north
    of it.

    Args:
        lon: Longitudes in degrees; any turn of the globe.
        lat: Latitudes in degrees.

    Returns:
        The UTM zone on WGS 84 of each place (EPSG:326xx north, 327xx south); UPS
        (EPSG:32661, EPSG:32761) from 84 degrees north and beyond 80 degrees south.
    """
    # A place on a border is there in whatever CRS it was written: to a tenth of a
    # millimetre, so that rounding does not move it across.
    lon = np.round((np.asarray(lon, dtype=np.float64) + 180) % 360, 9) % 360 - 180
    lat = np.round(np.asarray(lat, dtype=np.float64), 9)
    zone = np.floor((lon + 180) / 6).astype(np.int64) + 1
    norway = (lat >= 56) & (lat < 64) & (lon >= 3) & (lon < 12)
    svalbard = (lat >= 72) & (lon >= 0) & (lon < 42)
    zone = np.where(norway, 32, zone)
    zone = np.where(svalbard, 31 + 2 * np.floor((lon + 3) / 12).astype(np.int64), zone)
    codes = np.where(lat >= 0, 32600, 32700) + zone
    codes = np.where(lat >= 84, 32661, codes)
    polar: NDArray[np.int64] = np.where(lat < -80, 32761, codes)
    return polar


def utm_zone(lon: float, lat: float) -> int:
    """UTM zone number of a place.

    Args:
        lon: Longitude in degrees; any turn of the globe.
        lat: Latitude in degrees, -80 to 84.

    Returns:
        The zone, 1 to 60: see :func:`utm_codes`.
    """
    return int(utm_codes(lon, lat)) % 100


def utm_crs(lon: float, lat: float) -> CRS:
    """The projection in metres that suits a place best.

    Args:
        lon: Longitude in degrees.
        lat: Latitude in degrees.

    Returns:
        The place's UTM zone, or UPS: see :func:`utm_codes`.
    """
    return CRS.from_epsg(int(utm_codes(lon, lat)))


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


def crs_name(crs: CRS) -> str:
    """Authority and code of a CRS, such as EPSG:32618, or its WKT if it has none.

    Args:
        crs: The CRS.
    """
    authority = crs.to_authority(min_confidence=100)
    return ':'.join(authority) if authority else crs.to_wkt()
