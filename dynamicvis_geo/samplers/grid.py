"""Chips on a regular grid."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal, Self

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry
from torch.utils.data import Sampler
from torchgeo.datasets import GeoDataset

from dynamicvis_geo.datasets.chip_table import ChipTable, bounds_of
from dynamicvis_geo.datasets.source import GeoSlice
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.grid import TOLERANCE
from dynamicvis_geo.samplers.coverage import (
    Ints,
    areal,
    as_pair,
    pixel_grid,
    polygons_only,
    rectangles,
    time_windows,
)


class GridSampler(Sampler[GeoSlice]):
    """Chips on a grid that is fixed to the CRS, for every time window of a dataset.

    The north-west corner of every chip lies at a multiple of the stride from the origin
    of the CRS, so neither the place of a chip nor its id depends on the region asked
    for. For a dataset of files whose pixels do not begin at whole pixels from that
    origin, the whole grid is shifted by that fraction of a pixel, so that every chip is
    cut from the file without resampling.

    Chips come time window by time window, each from north-west to south-east in rows.

    Attributes:
        size: Height and width of a chip in pixels.
        stride: Pixels from chip to chip, down and across.
        edge: ``'pad'`` or ``'drop'``.
        windows: Number of time windows.
    """

    def __init__(
        self,
        dataset: GeoDataset,
        size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        roi: BaseGeometry | gpd.GeoSeries | gpd.GeoDataFrame | None = None,
        toi: pd.Interval[Any] | tuple[Any, Any] | None = None,
        edge: Literal['pad', 'drop'] = 'pad',
    ) -> None:
        """Lay out the chips.

        Args:
            dataset: The dataset to sample from.
            size: Size of a chip in pixels, or (height, width).
            stride: Pixels from chip to chip, or (vertical, horizontal); defaults to
                *size*, which leaves neither gap nor overlap.
            roi: Region of interest: a geometry in the CRS of the dataset, or a
                GeoSeries or GeoDataFrame in its own. Chips that do not touch it are
                left out; to share an edge is not to touch. A point or line asks for the
                chips that it lies in.
            toi: Time of interest: an interval, or (start, end) with the end exclusive.
                Time windows that overlap it are kept, and kept whole.
            edge: ``'pad'`` keeps the chips that stick out over the border of the data
                or the region, ``'drop'`` only those wholly inside. With ``'pad'`` an
                area smaller than a chip still gives one.

        Raises:
            SpecError: If an argument has a value that cannot be used.
        """
        self.size = as_pair('size', size)
        self.stride = self.size if stride is None else as_pair('stride', stride)
        if edge not in ('pad', 'drop'):
            raise SpecError(
                f"edge={edge!r} must be 'pad' (keep chips that stick out) or 'drop'"
            )
        self.edge = edge
        self._grid = pixel_grid(dataset)
        pixel = min(self._grid.res)
        region = None if roi is None else areal(_in_crs(roi, dataset), pixel)

        windows, position = time_windows(dataset, toi)
        self.windows = len(windows)
        geometries = np.asarray(dataset.index.geometry.values, dtype=object)
        found = [np.empty((0, 3), np.int64)]
        for i in range(len(windows)):
            area = areal(geometries[position == i], pixel)
            if edge == 'drop':
                # Seams between files that meet within rounding are no border.
                area = shapely.buffer(area, TOLERANCE * pixel, join_style='mitre')
            if region is not None:
                area = polygons_only(shapely.intersection(area, region))
            cells = self._cells(area)
            found.append(np.insert(cells, 0, i, axis=1))
        window, rows, cols = np.concatenate(found).T
        self._chips = ChipTable.parts_of(
            self._grid, rows, cols, self.size, windows[window], stride=self.stride
        )

    def __len__(self) -> int:
        """Return the number of chips."""
        return len(self._chips)

    def __iter__(self) -> Iterator[GeoSlice]:
        """Yield the slices (x, y, t) of each chip, with steps (xres, yres, 1)."""
        return self._chips.queries()

    def boxes(self, rows: Ints) -> NDArray[np.object_]:
        """Return the squares of some chips in the CRS of the dataset.

        Args:
            rows: Positions of the chips in the order in which they come.
        """
        edges = bounds_of(self._chips.columns[rows])
        outlines: NDArray[np.object_] = shapely.box(*edges.T)
        return outlines

    def select(self, keep: NDArray[np.bool_]) -> Self:
        """Return a sampler that yields some of these chips only.

        Args:
            keep: For every chip whether it stays.
        """
        chosen = copy.copy(self)
        chosen._chips = self._chips.select(keep)
        return chosen

    def table(self) -> ChipTable:
        """Return all chips at once."""
        return self._chips

    @property
    def provenance(self) -> dict[str, Any]:
        """The arguments that lay out the same grid again."""
        return {
            'size': list(self.size),
            'stride': list(self.stride),
            'edge': self.edge,
        }

    def _cells(self, area: BaseGeometry) -> Ints:
        """Return upper row and left column of the chips of an area, ``[n, 2]``.

        Blocks of the grid that lie inside the area are taken whole, those outside are
        dropped, and those on the border are halved until they are single chips: the
        work grows with the border, not with the area.
        """
        if area.is_empty:
            return np.empty((0, 2), np.int64)
        parts = shapely.get_parts(area)
        shapely.prepare(parts)
        tree = shapely.STRtree(parts)
        blocks = self._extent(area)[None]
        taken = []
        while len(blocks):
            boxes = self._block_boxes(blocks)
            box, part = tree.query(boxes)
            near = shapely.intersects(parts[part], boxes[box])
            box, part = box[near], part[near]
            # Parts of a valid area meet in points at most, so one alone covers a box.
            within = box[shapely.covers(parts[part], boxes[box])]
            touching, inside = np.zeros((2, len(blocks)), dtype=bool)
            touching[box], inside[within] = True, True
            blocks, inside = blocks[touching], inside[touching]
            single = (blocks[:, 1] - blocks[:, 0] == 1) & (
                blocks[:, 3] - blocks[:, 2] == 1
            )
            taken.append(blocks[inside | (single & (self.edge == 'pad'))])
            blocks = _halve(blocks[~inside & ~single])

        cells = _expand(np.concatenate(taken))
        cells = cells[np.lexsort((cells[:, 0], cells[:, 1]))]
        corners: Ints = cells[:, ::-1] * np.array(self.stride)
        return corners

    def _extent(self, area: BaseGeometry) -> Ints:
        """Return the half-open range of grid cells around an area: (x0, x1, y0, y1)."""
        west, south, east, north = area.bounds
        grid = self._grid
        (height, width), (down, across) = self.size, self.stride
        return np.array(
            [
                np.floor(((west - grid.x) / grid.xres - width) / across),
                np.ceil((east - grid.x) / grid.xres / across) + 1,
                np.floor(((grid.y - north) / grid.yres - height) / down),
                np.ceil((grid.y - south) / grid.yres / down) + 1,
            ]
        ).astype(np.int64)

    def _block_boxes(self, blocks: Ints) -> NDArray[np.object_]:
        """Return the rectangles that blocks of chips fill, a trifle smaller."""
        (height, width), (down, across) = self.size, self.stride
        x0, x1, y0, y1 = blocks.T
        return rectangles(
            self._grid,
            y0 * down,
            x0 * across,
            (y1 - 1 - y0) * down + height,
            (x1 - 1 - x0) * across + width,
            shrink=TOLERANCE,
        )


def _halve(blocks: Ints) -> Ints:
    """Split blocks (x0, x1, y0, y1) in two along each side that is longer than one."""
    for low, high in ((0, 1), (2, 3)):
        middle = (blocks[:, low] + blocks[:, high]) // 2
        first, second = blocks.copy(), blocks.copy()
        first[:, high] = middle
        second[:, low] = middle
        blocks = np.concatenate([first, second])
        blocks = blocks[blocks[:, low] < blocks[:, high]]
    return blocks


def _expand(blocks: Ints) -> Ints:
    """List the cells (x, y) of blocks (x0, x1, y0, y1), as ``[n, 2]``."""
    x0, x1, y0, y1 = blocks.T
    width, count = x1 - x0, (x1 - x0) * (y1 - y0)
    block = np.repeat(np.arange(len(blocks)), count)
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.stack(
        [x0[block] + within % width[block], y0[block] + within // width[block]], axis=1
    )


def _in_crs(
    roi: BaseGeometry | gpd.GeoSeries | gpd.GeoDataFrame, dataset: GeoDataset
) -> NDArray[np.object_]:
    """Return the geometries of a region in the CRS of a dataset."""
    if isinstance(roi, BaseGeometry):
        series = gpd.GeoSeries([roi], crs=dataset.crs)
    elif isinstance(roi, gpd.GeoSeries | gpd.GeoDataFrame):
        series = roi.geometry
    else:
        raise SpecError(
            f'roi={roi!r} must be a shapely geometry in the CRS of the dataset, or a '
            'GeoSeries or GeoDataFrame with a CRS'
        )
    if series.crs is None:
        raise SpecError("roi has no CRS: name it, as in roi.set_crs('EPSG:4326')")
    series = series[~(series.is_empty | series.isna())]
    if series.empty:
        raise SpecError('roi is empty: leave it out to sample the whole dataset')
    if series.crs != dataset.crs:
        # Straight sides bend in another CRS; at this spacing by well under a metre.
        spacing = 0.01 if series.crs.is_geographic else 1000.0
        series = series.segmentize(spacing).to_crs(dataset.crs)
    return _defined(np.asarray(series.values, dtype=object), dataset)


def _defined(
    geometries: NDArray[np.object_], dataset: GeoDataset
) -> NDArray[np.object_]:
    """Drop geometries outside the reach of a CRS; refuse those that lie across it."""
    coords, owner = shapely.get_coordinates(geometries, return_index=True)
    finite = np.isfinite(coords).all(axis=1)
    inside = np.zeros(len(geometries), dtype=bool)
    inside[owner[finite]] = True
    outside = np.zeros(len(geometries), dtype=bool)
    outside[owner[~finite]] = True
    if (inside & outside).any():
        raise SpecError(
            f'roi reaches beyond the part of the Earth that {dataset.crs.name!r} '
            'covers: cut it to the bounds of the dataset'
        )
    return geometries[inside]
