"""An area or points over several UTM zones, with chips that cover them once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TypeAlias

import geopandas as gpd
import numpy as np
import shapely
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from shapely.affinity import translate
from shapely.geometry.base import BaseGeometry
from torchgeo.datasets import GeoDataset

from dynamicvis_geo.datasets.chip_order import slabs
from dynamicvis_geo.datasets.footprints import lonlat_area, to_lonlat
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.grid import TOLERANCE
from dynamicvis_geo.projections import utm_codes
from dynamicvis_geo.samplers.coverage import areal
from dynamicvis_geo.samplers.grid import GridSampler
from dynamicvis_geo.samplers.point import PointSampler

#: Spacing in degrees at which the straight sides of zones are cut before they are
#: projected: the chords then keep within a few millimetres of the curves.
SPACING = 0.01
#: Parts into which the side of a chip is cut before it is drawn in another zone.
_SIDE_PARTS = 16

#: Latitudes at which zones change: the poles, Norway, Svalbard and the equator.
_PARALLELS = (-90, -80, 0, 56, 64, 72, 84, 90)
#: Every meridian at which a zone begins or ends is a multiple of this.
_MERIDIANS = 3
#: Parts of an area that are thinner, in degrees, are what rounding leaves of a side
#: that lies on the border of a zone.
_THIN = 1e-9

#: Makes the dataset of an area (EPSG:4326 or *crs*) in the CRS of a zone.
MakeDataset: TypeAlias = Callable[[gpd.GeoSeries, CRS], GeoDataset]
Pairs: TypeAlias = Sequence[tuple[GeoDataset, GridSampler | PointSampler]]

Geometries = NDArray[np.object_]


def grid_pairs(
    zones: Sequence[tuple[CRS, gpd.GeoSeries]],
    make: MakeDataset,
    size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
) -> Pairs:
    """Cover an area with the chips of grids, once.

    Where zones meet, :func:`cover_once` leaves neither gaps nor doubles.

    Args:
        zones: The area, as :func:`split_area` gives it.
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


def split_area(area: gpd.GeoSeries) -> list[tuple[CRS, gpd.GeoSeries]]:
    """Divide an area among UTM zones, and UPS at the poles.

    Args:
        area: Geometries in any CRS, as :func:`~.requests.read_area` gives them.

    Returns:
        Pairs of a projection and the part of *area* in its zone, in EPSG:4326, sorted
        by EPSG code. Zones that a polygon or line only touches are left out.

    Raises:
        SpecError: If the area cannot be drawn in longitude and latitude.
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
        points: Points in any CRS.

    Returns:
        Pairs of a projection and the points of its zone, in the order of *points*;
        sorted by EPSG code.
    """
    lonlat = points.geometry.to_crs('EPSG:4326')
    groups = points.groupby(utm_codes(lonlat.x, lonlat.y), sort=True)
    return [(CRS.from_epsg(int(code)), part) for code, part in groups]


def cover_once(
    pairs: Sequence[tuple[GeoDataset, GridSampler]],
) -> list[tuple[GeoDataset, GridSampler]]:
    """Leave out chips along the borders of zones that cover what others cover already.

    A chip belongs to the zone in which its centre lies, so each grid ends at the border
    of its zone with a rim of whole chips. Between the rims of two zones, whose grids
    are turned against each other, wedges of the area stay bare. They are filled with
    chips of the first of the zones (by EPSG code) that has one there, whose centre lies
    beyond the border. So no part of the area is left out, no chip occurs twice, and
    the overlap along a border is less than a chip wide. An area smaller than a chip
    that lies across a border gets the chips that it takes to cover it.

    Args:
        pairs: For each zone its dataset, whose CRS is that of the zone and whose area
            ends at the border of the zone and is the same in all time windows, and a
            sampler that pads.

    Returns:
        The datasets, with samplers that yield fewer chips, or as many.

    Raises:
        SpecError: If a CRS is no UTM zone, nor UPS.
    """
    borders = [_border(dataset, sampler) for dataset, sampler in pairs]
    for i, border in enumerate(borders):
        near = _neighbours(border.code)
        for other in borders[:i] + borders[i + 1 :]:
            if other.code in near and not border.bare.is_empty:
                border.bare = _uncovered(border.bare, border.code, other)
        pixel = min(abs(res) for res in pairs[i][0].res)
        # What is thinner than rounding can make it is no gap.
        gaps = shapely.buffer(border.bare, -2 * TOLERANCE * pixel, join_style='mitre')
        shapely.prepare(gaps)
        border.kept |= shapely.intersects(gaps, border.boxes)
    found = []
    for (dataset, sampler), border in zip(pairs, borders, strict=True):
        keep = np.ones(len(sampler) // max(sampler.windows, 1), dtype=bool)
        keep[border.rows[~border.kept]] = False
        found.append((dataset, sampler.select(np.tile(keep, sampler.windows))))
    return found


@dataclass
class _Border:
    """The chips of one zone that reach over its border.

    Attributes:
        code: EPSG code of the zone.
        rows: Their rows in one time window of the sampler.
        boxes: Their outlines, in the CRS of the zone.
        kept: bool, True for those that are kept.
        bare: The part of the area that no kept chip covers, in the CRS of the zone.
    """

    code: int
    rows: NDArray[np.int64]
    boxes: Geometries
    kept: NDArray[np.bool_]
    bare: BaseGeometry


def _border(dataset: GeoDataset, sampler: GridSampler) -> _Border:
    crs = CRS.from_user_input(dataset.crs)
    code = crs.to_epsg()
    if code not in zones():
        raise SpecError(f'pairs: {crs.name!r} is no UTM zone, nor UPS, on WGS 84')
    count = len(sampler) // max(sampler.windows, 1)
    rows = _touching(sampler, count, _outline(code, dataset, sampler))
    boxes = sampler.boxes(rows)
    west, south, east, north = shapely.bounds(boxes).reshape(-1, 4).T
    lon, lat = to_lonlat(crs, (west + east) / 2, (south + north) / 2)
    known = np.isfinite(lon)
    kept = known & (utm_codes(np.where(known, lon, 0), np.where(known, lat, 0)) == code)
    beyond = boxes[~kept]
    if not len(beyond):
        return _Border(code, rows, boxes, kept, shapely.Polygon())
    shapes = dataset.index.geometry.drop_duplicates().to_numpy()
    area = areal(shapes, min(abs(res) for res in dataset.res))
    bare = shapely.intersection(area, shapely.union_all(beyond))
    if any(np.less(sampler.stride, sampler.size)):
        # The chips of one zone overlap.
        around = _touching(sampler, count, beyond)
        inner = np.setdiff1d(around, rows[~kept], assume_unique=True)
        bare = shapely.difference(bare, shapely.union_all(sampler.boxes(inner)))
    return _Border(code, rows, boxes, kept, bare)


def _touching(
    sampler: GridSampler, count: int, others: Geometries
) -> NDArray[np.int64]:
    """Return which of the first chips touch any of some geometries."""
    found = [np.empty(0, np.int64)]
    if not len(others):
        return found[0]
    tree = shapely.STRtree(others)
    for part in slabs(np.arange(count)):
        hits, _ = tree.query(sampler.boxes(part), predicate='intersects')
        found.append(part[np.unique(hits)])
    return np.concatenate(found)


def _outline(code: int, dataset: GeoDataset, sampler: GridSampler) -> Geometries:
    """Return the border of a zone near a dataset as short lines in its CRS."""
    west, south, east, north = dataset.index.total_bounds
    xres, yres = dataset.res
    # Chips reach beyond the area by their size at most.
    reach = 2 * sampler.size[1] * xres, 2 * sampler.size[0] * yres
    lines = [np.empty((0, 2, 2))]
    rings = shapely.get_parts(shapely.boundary(zones()[code]))
    for ring in shapely.segmentize(rings, SPACING):
        x, y = _transformer(4326, code).transform(*shapely.get_coordinates(ring).T)
        near = (x >= west - reach[0]) & (x <= east + reach[0])
        near &= (y >= south - reach[1]) & (y <= north + reach[1])
        near = near[:-1] | near[1:]
        xy = np.stack([x, y], axis=1)
        lines.append(np.stack([xy[:-1], xy[1:]], axis=1)[near])
    found: Geometries = shapely.linestrings(np.concatenate(lines))
    return found


@lru_cache(maxsize=128)
def _neighbours(code: int) -> frozenset[int]:
    """Return the zones that touch a zone, also across the antimeridian."""
    zone = zones()[code]
    turns = [translate(zone, turn) for turn in (-360, 0, 360)]
    return frozenset(
        other
        for other, outline in zones().items()
        if other != code and any(shapely.intersects(turns, outline))
    )


def _uncovered(bare: BaseGeometry, code: int, other: _Border) -> BaseGeometry:
    """Return what of an area in one zone no chip along the border of another covers."""
    boxes = other.boxes[other.kept]
    if not len(boxes):
        return bare
    west, south, east, north = shapely.bounds(boxes[0])
    fine = shapely.segmentize(boxes, max(east - west, north - south) / _SIDE_PARTS)
    transformer = _transformer(other.code, code)

    def project(xy: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack(transformer.transform(*xy.T), axis=1)

    drawn = shapely.transform(fine, project)
    drawn = drawn[np.isfinite(shapely.bounds(drawn)).all(axis=1)]
    shapely.prepare(bare)
    return shapely.difference(
        bare, shapely.union_all(drawn[shapely.intersects(bare, drawn)])
    )


@lru_cache(maxsize=256)
def _transformer(source: int, target: int) -> Transformer:
    return Transformer.from_crs(source, target, always_xy=True)


@lru_cache(maxsize=1)
def zones() -> dict[int, shapely.Geometry]:
    """Areas in EPSG:4326 of each UTM zone, and of UPS, by EPSG code, sorted."""
    edges = np.arange(-180, 181, _MERIDIANS)
    cells: dict[int, list[shapely.Geometry]] = {}
    for south, north in pairwise(_PARALLELS):
        middle = edges[:-1] + _MERIDIANS / 2
        codes = utm_codes(middle, np.full(len(middle), (south + north) / 2))
        for code, (west, east) in zip(codes.tolist(), pairwise(edges), strict=True):
            cells.setdefault(code, []).append(shapely.box(west, south, east, north))
    return {code: shapely.union_all(cells[code]) for code in sorted(cells)}
