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

from dynamicvis_geo.datasets.points import describe_outside, point_ids, problem_with
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.samplers.lattice import (
    GeoSlice,
    Ints,
    Lattice,
    areal,
    as_pair,
    time_slices,
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

        self._lattice = Lattice.of(dataset)
        windows, position = time_windows(dataset, toi=None)
        self._times = time_slices(windows)
        places = points.geometry.to_crs(dataset.crs)
        shown = self._shown(dataset, places, position, len(windows))
        outside = np.logical_not(shown.any(axis=1))
        if outside.any():
            raise SpecError(
                f'points: {describe_outside(points, outside, dataset.index.geometry)}'
            )
        point, self._windows = np.nonzero(shown)
        self._cols, self._tops = self._corners(places.x, places.y)[:, point]
        # A list of as many strings would take several times the memory.
        self._point_ids = pa.array(point_ids(points), pa.string()).take(pa.array(point))

    def __len__(self) -> int:
        """Return the number of chips."""
        return len(self._cols)

    def __iter__(self) -> Iterator[GeoSlice]:
        """Yield the slices (x, y, t) of each chip, with steps (xres, yres, 1)."""
        return self._lattice.slices(
            self._cols, self._tops, self.size, self._windows, self._times
        )

    def table(self) -> NDArray[np.void]:
        """Return all chips at once, as a ChipDataset keeps them."""
        return self._lattice.table(
            self._cols, self._tops, self.size, self._windows, self._times
        )

    @property
    def point_ids(self) -> list[str]:
        """For every chip the id of its point.

        That is column ``id`` of the points where there is one, else their index.
        """
        ids: list[str] = self._point_ids.to_pylist()
        return ids

    @property
    def provenance(self) -> dict[str, Any]:
        """What is needed, beside the points, to lay out the same chips again."""
        return {'size': list(self.size), 'points': len(self._point_ids.unique())}

    def _shown(
        self, dataset: GeoDataset, places: gpd.GeoSeries, position: Ints, windows: int
    ) -> NDArray[np.bool_]:
        """Say which points each time window shows: ``[points, windows]``."""
        geometries = np.asarray(dataset.index.geometry.values, dtype=object)
        points = np.asarray(places.values, dtype=object)
        pixel = min(self._lattice.xres, self._lattice.yres)
        shown = np.zeros((len(points), windows), dtype=bool)
        for window in range(windows):
            area = areal(geometries[position == window], pixel)
            shapely.prepare(area)
            shown[:, window] = shapely.covers(area, points)
        return shown

    def _corners(self, x: gpd.GeoSeries, y: gpd.GeoSeries) -> Ints:
        """Return the north-west corners of chips around points as lattice lines."""
        height, width = self.size
        cols = (x.to_numpy() - self._lattice.x) / self._lattice.xres - width / 2
        tops = (y.to_numpy() - self._lattice.y) / self._lattice.yres + height / 2
        return np.floor(np.stack([cols, tops]) + 0.5).astype(np.int64)
