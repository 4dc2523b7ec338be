"""Chips around points."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray
from torch.utils.data import Sampler
from torchgeo.datasets import GeoDataset

from dynamicvis_geo.datasets.chip_table import ChipTable
from dynamicvis_geo.datasets.requests import (
    describe_outside,
    point_ids,
    problem_with,
)
from dynamicvis_geo.datasets.source import GeoSlice
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.samplers.coverage import (
    Ints,
    areal,
    as_pair,
    pixel_grid,
    time_windows,
)


class PointSampler(Sampler[GeoSlice]):
    """One chip around each point, for every time window whose data shows the point.

    Chips are cut along the pixels of the dataset, so the point lies within half a pixel
    of the centre of its chip. They come point by point in the order given, those of one
    point in the order of time.
    """

    def __init__(
        self,
        dataset: GeoDataset,
        points: gpd.GeoDataFrame | gpd.GeoSeries,
        size: int | tuple[int, int],
    ) -> None:
        """Lay out the chips.

        Args:
            dataset: The dataset to sample from.
            points: Points, with a CRS. Points given twice get two chips.
            size: Size of a chip in pixels, or (height, width).

        Raises:
            SpecError: If an argument has a value that cannot be used, or a point lies
                outside the dataset.
        """
        self.size = as_pair('size', size)
        if not isinstance(points, gpd.GeoDataFrame | gpd.GeoSeries):
            raise SpecError(
                f'points={type(points).__name__} must be a GeoDataFrame or GeoSeries: '
                'see geopandas.points_from_xy and read_points'
            )
        problem = problem_with(points)
        if problem is not None:
            raise SpecError(f'points: {problem}')

        self._grid = pixel_grid(dataset)
        windows, position = time_windows(dataset)
        places = points.geometry.to_crs(dataset.crs)
        shown = self._shown(dataset, places, position, len(windows))
        outside = np.logical_not(shown.any(axis=1))
        if outside.any():
            raise SpecError(
                f'points: {describe_outside(points, outside, dataset.index.geometry)}'
            )
        point, window = np.nonzero(shown)
        rows, cols = self._corners(places.x, places.y)[:, point]
        # A list of as many strings would take several times the memory.
        self._point_ids = pa.array(point_ids(points), pa.string()).take(pa.array(point))
        self._chips = ChipTable.parts_of(
            self._grid,
            rows,
            cols,
            self.size,
            windows[window],
            point_ids=self._point_ids,
        )

    def __len__(self) -> int:
        """Return the number of chips."""
        return len(self._chips)

    def __iter__(self) -> Iterator[GeoSlice]:
        """Yield the slices (x, y, t) of each chip, with steps (xres, yres, 1)."""
        return self._chips.queries()

    def table(self) -> ChipTable:
        """Return all chips at once."""
        return self._chips

    @property
    def point_ids(self) -> list[str]:
        """For every chip the id of its point.

        That is column ``id`` of the points where there is one, else their index.
        """
        ids: list[str] = self._point_ids.to_pylist()
        return ids

    @property
    def provenance(self) -> dict[str, Any]:
        """The size of the chips and the number of points."""
        return {'size': list(self.size), 'points': len(self._point_ids.unique())}

    def _shown(
        self, dataset: GeoDataset, places: gpd.GeoSeries, position: Ints, windows: int
    ) -> NDArray[np.bool_]:
        """Find the points that each time window shows: bool ``[points, windows]``."""
        geometries = np.asarray(dataset.index.geometry.values, dtype=object)
        points = np.asarray(places.values, dtype=object)
        pixel = min(self._grid.res)
        shown = np.zeros((len(points), windows), dtype=bool)
        for window in range(windows):
            area = areal(geometries[position == window], pixel)
            shapely.prepare(area)
            shown[:, window] = shapely.covers(area, points)
        return shown

    def _corners(self, x: gpd.GeoSeries, y: gpd.GeoSeries) -> Ints:
        """Return upper rows and left columns of chips around points, ``[2, n]``."""
        height, width = self.size
        cols = (x.to_numpy() - self._grid.x) / self._grid.xres - width / 2
        tops = (y.to_numpy() - self._grid.y) / self._grid.yres + height / 2
        cols, tops = np.floor(np.stack([cols, tops]) + 0.5).astype(np.int64)
        return np.stack([-tops, cols])
