"""The vocabulary of requests: where, when, from what, and what comes out.

Plain frozen values, checked when made: a value that exists can be used.
"""

import dataclasses
import math
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Literal, Self

import geopandas as gpd
import pandas as pd
import shapely

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.projections import utm_crs
from dynamicvis_geo.time_window import TimeWindow, utc

__all__ = ('BBox', 'OutputSpec', 'PointBuffer', 'SensorSpec', 'TemporalSpec')


def _number(name: str, value: Any, low: float, high: float, unit: str = '') -> float:
    """Check that *value* is a finite number within [low, high]; zero has no sign."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SpecError(f'{name}={value!r} is not a number.')
    if not (math.isfinite(value) and low <= value <= high):
        raise SpecError(f'{name}={value!r} is not within {low:g} to {high:g}{unit}.')
    return float(value) + 0.0


def _choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise SpecError(
            f'{name}={value!r} is not one of {", ".join(map(repr, choices))}.'
        )


@dataclass(frozen=True)
class BBox:
    """A rectangle of longitudes and latitudes.

    Args:
        minlon: Western edge in degrees, -180 to 180. West of ``maxlon``, unless the
            rectangle crosses the antimeridian: ``BBox(179, -18, -179, -16)`` is Fiji.
        minlat: Southern edge in degrees.
        maxlon: Eastern edge in degrees.
        maxlat: Northern edge in degrees.

    Raises:
        SpecError: If the values are not a rectangle on the globe.
    """

    minlon: float
    minlat: float
    maxlon: float
    maxlat: float

    def __post_init__(self) -> None:
        for name in ('minlon', 'maxlon'):
            _number(name, getattr(self, name), -180, 180, ' degrees')
        for name in ('minlat', 'maxlat'):
            _number(name, getattr(self, name), -90, 90, ' degrees')
        if self.minlat >= self.maxlat:
            raise SpecError(
                f'minlat={self.minlat} is not south of maxlat={self.maxlat}. The order '
                'is minlon, minlat, maxlon, maxlat.'
            )
        # Across the antimeridian only where that is the short way round: otherwise
        # the two longitudes were far more likely swapped.
        crosses = self.minlon > self.maxlon
        if self.minlon == self.maxlon or (
            crosses and self.maxlon + 360 - self.minlon >= 180
        ):
            raise SpecError(
                f'minlon={self.minlon} is not west of maxlon={self.maxlon}. The order '
                'is minlon, minlat, maxlon, maxlat.'
            )

    @property
    def crosses_antimeridian(self) -> bool:
        """True if the rectangle reaches over 180 degrees east."""
        return self.minlon > self.maxlon

    @property
    def geometry(self) -> gpd.GeoSeries:
        """The rectangle in EPSG:4326, in two parts if it crosses the antimeridian."""
        boxes = [(self.minlon, self.maxlon)]
        if self.crosses_antimeridian:
            boxes = [(self.minlon, 180.0), (-180.0, self.maxlon)]
        parts = [shapely.box(w, self.minlat, e, self.maxlat) for w, e in boxes if w < e]
        polygon = parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)
        return gpd.GeoSeries([polygon], crs='EPSG:4326')


@dataclass(frozen=True)
class PointBuffer:
    """A square around a point, measured on the ground.

    The square lies in the point's own UTM zone (UPS at the poles), whose axes it
    follows; in EPSG:3857, the same number of metres would shrink with the latitude.

    Args:
        lon: Longitude of the centre in degrees.
        lat: Latitude of the centre in degrees.
        buffer_m: Half the side of the square, in metres on the ground.

    Raises:
        SpecError: If the point is not on the globe or the square has no size.
    """

    lon: float
    lat: float
    buffer_m: float

    def __post_init__(self) -> None:
        _number('lon', self.lon, -180, 180, ' degrees')
        _number('lat', self.lat, -90, 90, ' degrees')
        _number('buffer_m', self.buffer_m, 0, 500_000, ' metres')
        if self.buffer_m == 0:
            raise SpecError('buffer_m=0 is a square without size.')

    @property
    def geometry(self) -> gpd.GeoSeries:
        """The square, in the CRS of the point's UTM zone."""
        crs = utm_crs(self.lon, self.lat)
        point = gpd.GeoSeries([shapely.Point(self.lon, self.lat)], crs='EPSG:4326')
        centre = point.to_crs(crs)[0]
        r = self.buffer_m
        square = shapely.box(
            centre.x - r, centre.y - r, centre.x + r, centre.y + r, ccw=True
        )
        return gpd.GeoSeries([square], crs=crs)


def _timestamp(name: str, value: Any) -> pd.Timestamp:
    """Read an ISO date or time, or an object that is one; the result is UTC."""
    try:
        time = datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        time = None
    # pd.NaT calls itself a date, but is none.
    if not isinstance(time, date) or pd.isna(time):
        raise SpecError(f'{name}={value!r} is not a date; write it as 2024-06-01.')
    stamp = utc(time)
    # What comes after counts nanoseconds.
    if not 1678 <= stamp.year <= 2261:
        raise SpecError(f'{name}={value!r} is not within the years 1678 to 2261.')
    return stamp


@dataclass(frozen=True)
class TemporalSpec:
    """A time window: from the start on, up to but without the end.

    Args:
        start: First moment, an ISO date or time in UTC.
        end: First moment after the window.

    Raises:
        SpecError: If either is no date, or the window is empty.
    """

    start: str
    end: str

    def __post_init__(self) -> None:
        start, end = _timestamp('start', self.start), _timestamp('end', self.end)
        if start >= end:
            raise SpecError(
                f'start={self.start!r} is not before end={self.end!r}; the end is not '
                'part of the window.'
            )
        object.__setattr__(self, 'start', _iso(start))
        object.__setattr__(self, 'end', _iso(end))

    @classmethod
    def range(cls, start: str, end: str) -> Self:
        """Make the window from *start* to before *end*.

        Args:
            start: First moment, an ISO date or time in UTC.
            end: First moment after the window.

        Raises:
            SpecError: If either is no date, or the window is empty.
        """
        return cls(start, end)

    @classmethod
    def year(cls, year: int) -> Self:
        """Make the window of a calendar year.

        Args:
            year: The year.

        Raises:
            SpecError: If it is no whole number from 1950 to 2200.
        """
        if isinstance(year, bool) or not isinstance(year, int):
            raise SpecError(f'year={year!r} is not a whole number.')
        _number('year', year, 1950, 2200)
        return cls(f'{year:04d}-01-01', f'{year + 1:04d}-01-01')

    @classmethod
    def years(cls, first: int, last: int) -> list[Self]:
        """Make the windows of successive calendar years.

        Args:
            first: The first year.
            last: The last year, which is one of them.

        Returns:
            A window a year.

        Raises:
            SpecError: If either is no whole number from 1950 to 2200, or *last* comes
                before *first*.
        """
        cls.year(first), cls.year(last)
        if last < first:
            raise SpecError(f'first={first} is after last={last}: swap them.')
        return [cls.year(year) for year in range(first, last + 1)]

    @property
    def window(self) -> TimeWindow:
        """The window as timestamps."""
        return TimeWindow(pd.Timestamp(self.start), pd.Timestamp(self.end))

    @property
    def interval(self) -> 'pd.Interval[pd.Timestamp]':
        """The window as TorchGeo indexes time: closed, up to 1 µs before the end."""
        return self.window.interval


def _iso(time: pd.Timestamp) -> str:
    """Shortest ISO form: a date alone where it is midnight."""
    return str(time.date()) if time == time.normalize() else time.isoformat()


@dataclass(frozen=True)
class SensorSpec:
    """Imagery, and the way in which the scenes of a time window become one image.

    Args:
        collection: Id of an Earth Engine image collection.
        bands: Names of its bands, in the order wanted.
        scale_m: Size of a pixel in metres.
        cloudy_pct: Scenes with a ``CLOUDY_PIXEL_PERCENTAGE`` up to and including this
            are used; None uses all (and suits collections without that property).
        composite: ``'median'`` of the scenes, pixel by pixel, or ``'mosaic'``: the
            last scene that has the pixel.
        fill_value: What masked pixels are set to.
        cloud_mask: Masks clouds pixel by pixel before the composite: ``'scl'`` drops
            cloud shadow, cloud of medium and high probability, and cirrus (classes 3,
            8, 9, 10 of Sentinel-2's scene classification), ``'cs+'`` what Cloud
            Score+ finds less clear than ``cloud_threshold``. Both need Sentinel-2.
        cloud_threshold: Least usable Cloud Score+ (band ``cs``), 0 to 1; 0.60 is what
            its documentation proposes.
        dtype: ``'uint16'``, 2 bytes a pixel and enough for scaled reflectance (0 to
            65534), or ``'float32'`` for anything else.

    Raises:
        SpecError: If a value cannot be used.
    """

    collection: str = 'COPERNICUS/S2_SR_HARMONIZED'
    bands: tuple[str, ...] = ('B4', 'B3', 'B2')
    scale_m: float = 10
    cloudy_pct: float | None = 30
    composite: Literal['median', 'mosaic'] = 'median'
    fill_value: float = 0
    cloud_mask: Literal['scl', 'cs+'] | None = None
    cloud_threshold: float = 0.6
    dtype: Literal['uint16', 'float32'] = 'uint16'

    def __post_init__(self) -> None:
        if not isinstance(self.collection, str) or not self.collection.strip():
            raise SpecError(
                f'collection={self.collection!r} is not the id of a collection, such '
                "as 'COPERNICUS/S2_SR_HARMONIZED'."
            )
        given: object = self.bands
        if not isinstance(given, tuple | list):
            raise SpecError(
                f"bands={self.bands!r} is not a sequence of names, such as ('B4', "
                "'B3', 'B2')."
            )
        object.__setattr__(self, 'bands', tuple(self.bands))
        if not self.bands or not all(isinstance(b, str) and b for b in self.bands):
            raise SpecError(f'bands={self.bands!r} has to be names of bands.')
        if len(set(self.bands)) != len(self.bands):
            raise SpecError(f'bands={self.bands!r} names a band twice.')
        _number('scale_m', self.scale_m, 1e-3, 1e6, ' metres')
        # Floats, so that equal requests are equal however they were written.
        if self.cloudy_pct is not None:
            cloudy_pct = _number('cloudy_pct', self.cloudy_pct, 0, 100, ' percent')
            object.__setattr__(self, 'cloudy_pct', cloudy_pct)
        _choice('composite', self.composite, ('median', 'mosaic'))
        _number('fill_value', self.fill_value, -math.inf, math.inf)
        _choice('cloud_mask', self.cloud_mask, (None, 'scl', 'cs+'))
        threshold = _number('cloud_threshold', self.cloud_threshold, 0, 1)
        object.__setattr__(self, 'cloud_threshold', threshold)
        _choice('dtype', self.dtype, ('uint16', 'float32'))

    def pixels(self) -> dict[str, Any]:
        """Fields that decide the pixels that are fetched, as plain values."""
        values = dataclasses.asdict(self)
        # The size of a pixel is the grid's, and masked pixels are filled afterwards.
        del values['scale_m'], values['fill_value']
        if self.cloud_mask != 'cs+':
            del values['cloud_threshold']
        return values


@dataclass(frozen=True)
class OutputSpec:
    """The features to give: an embedding, or the feature map.

    Args:
        mode: ``'pooled'`` or ``'grid'``.
        pooling: How a map becomes a vector: ``'mean'`` or ``'max'``.

    Raises:
        SpecError: If either is anything else.
    """

    mode: Literal['pooled', 'grid'] = 'pooled'
    pooling: Literal['mean', 'max'] = 'mean'

    def __post_init__(self) -> None:
        _choice('mode', self.mode, ('pooled', 'grid'))
        _choice('pooling', self.pooling, ('mean', 'max'))

    @classmethod
    def pooled(cls, pooling: Literal['mean', 'max'] = 'mean') -> Self:
        """Ask for one vector a chip.

        Args:
            pooling: ``'mean'`` or ``'max'`` over the cells.

        Raises:
            SpecError: If it is anything else.
        """
        return cls('pooled', pooling)

    @classmethod
    def grid(cls) -> Self:
        """Ask for the feature map of a chip."""
        return cls('grid')
