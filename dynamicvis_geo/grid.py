"""A grid of pixels: CRS, origin, resolution and shape as one value."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from affine import Affine
from pyproj import CRS, Transformer
from pyproj.enums import WktVersion

#: Decimals of a pixel to which origins are rounded: far below what any resampling
#: could notice, far above the noise of sums of floats.
DECIMALS = 6


@dataclass(frozen=True)
class Grid:
    """Pixels of one size in one CRS.

    The origin is counted in pixels from that of the CRS, so that grids on the same
    lattice are recognised, whatever the noise of their coordinates.

    Attributes:
        crs: EPSG code (``'EPSG:32632'``) or WKT.
        xres: Width of a pixel in units of the CRS.
        yres: Height of a pixel.
        col: Left edge, in pixels east of the origin of the CRS.
        row: Upper edge, in pixels south of the origin of the CRS.
        height: Number of rows.
        width: Number of columns.
    """

    crs: str
    xres: float
    yres: float
    col: float
    row: float
    height: int
    width: int

    @classmethod
    def from_bounds(cls, crs: str, x: slice, y: slice) -> 'Grid':
        """The grid of a query: its steps are the resolution.

        Args:
            crs: EPSG code or WKT.
            x: Left edge, right edge, width of a pixel.
            y: Lower edge, upper edge, height of a pixel.

        Raises:
            ValueError: If the query is smaller than half a pixel.
        """
        width = round((x.stop - x.start) / x.step)
        height = round((y.stop - y.start) / y.step)
        if width < 1 or height < 1:
            raise ValueError(
                f'x={x}, y={y} has no pixel: {width} columns, {height} rows.'
            )
        # Plus zero, which takes the sign off a zero.
        col = round(x.start / x.step, DECIMALS) + 0.0
        row = round(-y.stop / y.step, DECIMALS) + 0.0
        return cls(crs, float(x.step), float(y.step), col, row, height, width)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.height, self.width

    @property
    def size(self) -> int:
        """Number of pixels."""
        return self.height * self.width

    @property
    def transform(self) -> Affine:
        """From column and row to the CRS."""
        left, top = self.col * self.xres, -self.row * self.yres
        return Affine(self.xres, 0.0, left, 0.0, -self.yres, top)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Left, bottom, right and top edge in the CRS."""
        left, top = self.col * self.xres, -self.row * self.yres
        return (
            left,
            -(self.row + self.height) * self.yres,
            (self.col + self.width) * self.xres,
            top,
        )

    @property
    def lattice(self) -> tuple[str, float, float, float, float]:
        """What grids have in common whose pixels coincide where they overlap."""
        col, row = self.col - math.floor(self.col), self.row - math.floor(self.row)
        return (
            self.crs,
            self.xres,
            self.yres,
            round(col, DECIMALS) % 1,
            round(row, DECIMALS) % 1,
        )

    @property
    def lonlat_boxes(self) -> list[tuple[float, float, float, float]]:
        """West, south, east, north of boxes in EPSG:4326 that hold the grid.

        Two of them if it crosses the antimeridian.
        """
        west, south, east, north = _to_lonlat(self.crs).transform_bounds(
            *self.bounds, densify_pts=21
        )
        if not all(map(math.isfinite, (west, south, east, north))):
            raise ValueError(f'{self} reaches beyond what its CRS can describe.')
        south, north = max(south, -90.0), min(north, 90.0)
        if west > east:
            east += 360
        if east - west >= 360:
            return [(-180.0, south, 180.0, north)]
        # In geographic CRS, longitudes may count on beyond 180 degrees.
        turns = (-360.0, 0.0, 360.0)
        return [
            (max(west + turn, -180.0), south, min(east + turn, 180.0), north)
            for turn in turns
            if west + turn < 180 and east + turn > -180
        ]

    def part(self, row: int, col: int, height: int, width: int) -> 'Grid':
        """A rectangle of this grid's pixels; may reach beyond its edges."""
        return replace(
            self,
            row=round(self.row + row, DECIMALS),
            col=round(self.col + col, DECIMALS),
            height=height,
            width=width,
        )

    def offset(self, other: 'Grid') -> tuple[int, int]:
        """Rows and columns from the origin of this grid to that of *other*."""
        return round(other.row - self.row), round(other.col - self.col)

    def holds(self, other: 'Grid') -> bool:
        """Whether all of *other*, which is on the same lattice, lies within."""
        row, col = self.offset(other)
        return (
            row >= 0
            and col >= 0
            and row + other.height <= self.height
            and col + other.width <= self.width
        )

    def tiles(self, height: int, width: int) -> Iterator['Grid']:
        """Cut into parts of nearly equal size, none larger than the one given."""
        for row, rows in _shares(self.height, height):
            for col, cols in _shares(self.width, width):
                yield self.part(row, col, rows, cols)

    def to_ee(self) -> dict[str, Any]:
        """The grid as ``ee.data.computePixels`` wants it."""
        t = self.transform
        code = {'crsCode': self.crs} if _is_code(self.crs) else {'crsWkt': self.crs}
        return {
            'dimensions': {'width': self.width, 'height': self.height},
            'affineTransform': {
                'scaleX': t.a,
                'shearX': t.b,
                'translateX': t.c,
                'shearY': t.d,
                'scaleY': t.e,
                'translateY': t.f,
            },
            **code,
        }


def paste(
    target: np.ndarray[Any, Any],
    target_grid: Grid,
    source: np.ndarray[Any, Any],
    source_grid: Grid,
) -> None:
    """Copy the pixels that two grids of one lattice share.

    Args:
        target: Pixels ``[bands, height, width]`` of *target_grid*, written to.
        target_grid: Where they lie.
        source: Pixels ``[bands, height, width]`` of *source_grid*.
        source_grid: Where they lie.
    """
    row, col = target_grid.offset(source_grid)
    top, left = max(row, 0), max(col, 0)
    bottom = min(row + source_grid.height, target_grid.height)
    right = min(col + source_grid.width, target_grid.width)
    if top < bottom and left < right:
        target[:, top:bottom, left:right] = source[
            :, top - row : bottom - row, left - col : right - col
        ]


@lru_cache(maxsize=64)
def crs_text(crs: CRS) -> str:
    """The EPSG code of a CRS, or its WKT if it has none."""
    code = crs.to_epsg(min_confidence=100)
    if code is not None:
        return f'EPSG:{code}'
    wkt: str = crs.to_wkt(WktVersion.WKT1_GDAL)
    return wkt


def _is_code(crs: str) -> bool:
    return crs.startswith('EPSG:')


def _shares(length: int, largest: int) -> Iterator[tuple[int, int]]:
    """Start and length of the fewest nearly equal parts of at most *largest*."""
    count = -(-length // largest)
    edges = [i * length // count for i in range(count + 1)]
    yield from ((a, b - a) for a, b in pairwise(edges))


@lru_cache(maxsize=64)
def _to_lonlat(crs: str) -> Transformer:
    return Transformer.from_crs(crs, 'EPSG:4326', always_xy=True)
