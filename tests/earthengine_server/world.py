"""The world that the server sees: scenes whose pixels are functions of place and time.

Scenes come in tiles of one degree, somewhat larger than that, so that they overlap;
each tile is visited every five days. Some tiles are never visited, a stripe of each
scene has no data, and clouds drift over it.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

import numpy as np
from pyproj import Transformer

SENTINEL2 = 'COPERNICUS/S2_SR_HARMONIZED'
CLOUD_SCORE = 'GOOGLE/CLOUD_SCORE_PLUS/V1/S2_HARMONIZED'
#: Bands of the collections and their data types.
BANDS = {
    SENTINEL2: {f'B{i}': 'uint16' for i in (2, 3, 4, 8)} | {'SCL': 'uint8'},
    CLOUD_SCORE: {'cs': 'float32'},
}
MARGIN = 0.05


@dataclass(frozen=True)
class Scene:
    """One visit of one tile."""

    collection: str
    tile: tuple[int, int]
    day: date

    @property
    def index(self) -> str:
        return f'{self.day:%Y%m%d}_{self.tile[0]}_{self.tile[1]}'

    @property
    def time(self) -> datetime:
        return datetime(self.day.year, self.day.month, self.day.day, 10, 30)

    @property
    def footprint(self) -> tuple[float, float, float, float]:
        west, south = self.tile
        return west - MARGIN, south - MARGIN, west + 1 + MARGIN, south + 1 + MARGIN

    @property
    def properties(self) -> dict[str, float]:
        return {'CLOUDY_PIXEL_PERCENTAGE': float(noise(self.index) % 101)}

    def pixels(self, band: str, lon: Any, lat: Any) -> Any:
        """Values and validity of a band at some places."""
        west, south, east, north = self.footprint
        # Tiles west of the antimeridian reach over it.
        lon = west + (lon - west) % 360
        inside = (lon <= east) & (lat >= south) & (lat <= north)
        phase = noise(self.index) % 1000 / 1000
        inside &= (lon + 0.3 * lat + phase) % 0.45 > 0.06
        clouds = np.sin(400 * lon + 6 * phase) + np.cos(350 * lat - 5 * phase)
        if band == 'cs':
            return np.float32(0.5 - clouds / 4), inside
        if band == 'SCL':
            classes = np.select(
                [clouds > 1.5, clouds > 1, clouds > 0.9, clouds > 0.8], [9, 8, 10, 3], 4
            )
            return classes, inside
        number = int(band[1:])
        ground = 2500 + 2000 * np.sin(700 * lon + number) * np.cos(500 * lat - number)
        season = 300 * np.sin(self.day.timetuple().tm_yday / 58)
        value = ground + season + 40 * phase + 4000 * np.clip(clouds - 0.8, 0, 1)
        return np.floor(np.clip(value, 0, 10000)), inside


def noise(text: str) -> int:
    return int(hashlib.sha1(text.encode()).hexdigest()[:8], 16)


def scenes(
    collection: str, box: tuple[float, float, float, float], start: datetime, end: Any
) -> Iterator[Scene]:
    """All scenes of a collection that touch a box within a window, in their order."""
    west, south, east, north = box
    tiles = [
        (lon, lat)
        for lon in range(int(np.floor(west)) - 1, int(np.floor(east)) + 2)
        for lat in range(int(np.floor(south)) - 1, int(np.floor(north)) + 2)
        if -180 <= lon < 180 and -90 <= lat < 90 and (lon + 3 * lat) % 13
    ]
    day = start.date()
    while day <= end.date():
        for tile in tiles:
            scene = Scene(collection, tile, day)
            w, s, e, n = scene.footprint
            # The world is round: a box at its edge touches tiles on the other side.
            near = any(w + turn <= east and e + turn >= west for turn in (-360, 0, 360))
            if (
                (day.toordinal() + noise(f'{tile}')) % 5 == 0
                and near
                and s <= north
                and n >= south
                and start <= scene.time < end
            ):
                yield scene
        day += timedelta(days=1)


def places(crs: str, affine: dict[str, float], height: int, width: int) -> Any:
    """Longitudes and latitudes of the middles of pixels."""
    x = affine['translateX'] + (np.arange(width) + 0.5) * affine['scaleX']
    y = affine['translateY'] + (np.arange(height) + 0.5) * affine['scaleY']
    # Free of rounding, so that a place is the same whatever the origin of its grid.
    x, y = np.meshgrid(np.round(x, 9), np.round(y, 9))
    transformer = Transformer.from_crs(crs, 'EPSG:4326', always_xy=True)
    lon, lat = transformer.transform(x, y)
    return (lon + 180) % 360 - 180, lat
