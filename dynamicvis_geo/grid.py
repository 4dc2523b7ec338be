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

#: Decimals of a pixel to which origins are rounded where lattices are compared: far
#: below what any resampling could notice, far above the noise of sums of floats.
DECIMALS = 6

#: Deviations below this share of a pixel are rounding, not geometry.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Grid:
    """A rectangle of pixels of one size, rows from north to south, in one CRS.

    Attributes:
        crs: EPSG code (``'EPSG:32632'``) or WKT.
        x: West edge in units of the CRS.
        y: North edge.
        width: Number of columns.
        height: Number of rows.
        xres: Width of a pixel in units of the CRS.
        yres: Height of a pixel.
    """

    crs: str
    x: float
    y: float
    width: int
    height: int
    xres: float
    yres: float

    @classmethod
    def from_slices(cls, crs: str, x: slice, y: slice) -> 'Grid':
        """The grid of a query: its steps are the resolution.

        Args:
            crs: EPSG code or WKT.
            x: West edge, east edge, width of a pixel.
            y: South edge, north edge, height of a pixel.

        Raises:
            ValueError: If the query is smaller than half a pixel.
        """
        width = round((x.stop - x.start) / x.step)
        height = round((y.stop - y.start) / y.step)
        if width < 1 or height < 1:
            raise ValueError(
                f'x={x}, y={y} has no pixel: {width} columns, {height} rows.'
            )
        return cls(crs, x.start, y.stop, width, height, float(x.step), float(y.step))

    @property
    def col(self) -> float:
        """West edge in pixels east of the origin of the CRS, without noise."""
        # Plus zero, which takes the sign off a zero.
        return round(self.x / self.xres, DECIMALS) + 0.0

    @property
    def row(self) -> float:
        """North edge in pixels south of the origin of the CRS, without noise."""
        return round(-self.y / self.yres, DECIMALS) + 0.0

    def rounded(self) -> 'Grid':
        """This grid without the noise of its origin, so that equal ones are equal."""
        return replace(self, x=self.col * self.xres, y=-self.row * self.yres)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.height, self.width

    @property
    def size(self) -> int:
        """Number of pixels."""
        return self.height * self.width

    @property
    def res(self) -> tuple[float, float]:
        """Width and height of a pixel in units of the CRS."""
        return self.xres, self.yres

    @property
    def transform(self) -> Affine:
        """From column and row to the CRS."""
        return Affine(self.xres, 0.0, self.x, 0.0, -self.yres, self.y)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east and north edge in the CRS."""
        return (
            self.x,
            self.y - self.height * self.yres,
            self.x + self.width * self.xres,
            self.y,
        )

    @property
    def slices(self) -> tuple[slice, slice]:
        """The edges as TorchGeo's datasets are asked for them, x and y."""
        west, south, east, north = self.bounds
        return slice(west, east, self.xres), slice(south, north, self.yres)

    @property
    def lattice(self) -> tuple[str, float, float, float, float]:
        """Equal for grids whose pixels coincide where they overlap."""
        return (
            self.crs,
            self.xres,
            self.yres,
            round(self.col - math.floor(self.col), DECIMALS) % 1,
            round(self.row - math.floor(self.row), DECIMALS) % 1,
        )

    @property
    def lonlat_boxes(self) -> list[tuple[float, float, float, float]]:
        """West, south, east, north of boxes in EPSG:4326 that hold the grid.

        Two of them if it crosses the antimeridian.

        Raises:
            ValueError: If the CRS cannot describe the grid.
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
        """Return a rectangle of this grid's pixels; it may reach beyond its edges.

        Args:
            row: Upper row, from 0; may be negative.
            col: Left column.
            height: Number of rows.
            width: Number of columns.
        """
        x, y = self.x + col * self.xres, self.y - row * self.yres
        return replace(self, x=x, y=y, width=width, height=height)

    def offset(self, other: 'Grid') -> tuple[int, int]:
        """Count rows and columns from the corner of this grid to that of another.

        Args:
            other: A grid on the same lattice.

        Returns:
            Rows southwards and columns eastwards.
        """
        down, across = self._offset(other)
        return round(down), round(across)

    def aligned(self, other: 'Grid', tolerance: float = TOLERANCE) -> bool:
        """Tell if pixels of *other* coincide with pixels of this grid's lattice.

        Args:
            other: A grid in any CRS.
            tolerance: Share of a pixel by which they may miss each other at its origin,
                and, for its resolution, over the whole of it.
        """
        if not _same_crs(self.crs, other.crs):
            return False
        for own, theirs, size in (
            (self.xres, other.xres, other.width),
            (self.yres, other.yres, other.height),
        ):
            if not math.isclose(own, theirs, rel_tol=min(1e-6, tolerance / size)):
                return False
        return all(
            abs(steps - round(steps)) <= tolerance for steps in self._offset(other)
        )

    def _offset(self, other: 'Grid') -> tuple[float, float]:
        return (self.y - other.y) / self.yres, (other.x - self.x) / self.xres

    def holds(self, other: 'Grid') -> bool:
        """Tell if a grid lies within this one.

        Args:
            other: A grid on the same lattice.
        """
        row, col = self.offset(other)
        return (
            row >= 0
            and col >= 0
            and row + other.height <= self.height
            and col + other.width <= self.width
        )

    def tiles(self, height: int, width: int) -> Iterator['Grid']:
        """Cut into parts of nearly equal size, row by row.

        Args:
            height: Most rows of a part.
            width: Most columns of a part.
        """
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
        target_grid: The grid of *target*.
        source: Pixels ``[bands, height, width]`` of *source_grid*.
        source_grid: The grid of *source*.
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
    """Name a CRS as Earth Engine does: its EPSG code, or WKT 1 if it has none.

    Args:
        crs: The CRS.
    """
    code = crs.to_epsg(min_confidence=100)
    if code is not None:
        return f'EPSG:{code}'
    wkt: str = crs.to_wkt(WktVersion.WKT1_GDAL)
    return wkt


@lru_cache(maxsize=256)
def _same_crs(one: str, other: str) -> bool:
    return one == other or CRS.from_user_input(one) == CRS.from_user_input(other)


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
