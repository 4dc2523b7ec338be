"""The chip of one place: a square around a point, or a box."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import geopandas as gpd
import numpy as np
import shapely
from pyproj import CRS
from torch.utils.data import Sampler
from torchgeo.datasets import GeoDataset

from dynamicvis_geo.datasets.chip_table import ChipTable
from dynamicvis_geo.datasets.footprints import project_area
from dynamicvis_geo.datasets.source import GeoSlice
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.grid import TOLERANCE
from dynamicvis_geo.samplers.coverage import areal, pixel_grid, time_windows
from dynamicvis_geo.samplers.point import PointSampler
from dynamicvis_geo.specs import BBox, PointBuffer, TemporalSpec

#: Longest side of a chip in pixels. Far more than the backbone sees; what is larger
#: was meant in other units, or should be covered with several chips.
LARGEST_SIDE = 4096


class PlaceSampler(Sampler[GeoSlice]):
    """The chip of one place, for every time window whose data shows it.

    Chips are cut along the pixels of the dataset. That of a point has
    ``2 * buffer_m`` metres on the ground a side, rounded to whole pixels, and the point
    within half a pixel of its centre; that of a box is the extent of the box in the CRS
    of the dataset, widened to whole pixels.
    """

    def __init__(
        self,
        dataset: GeoDataset,
        spatial: BBox | PointBuffer,
        temporal: TemporalSpec | None = None,
    ) -> None:
        """Lay out the chips.

        Args:
            dataset: The dataset to sample from.
            spatial: The place.
            temporal: Keep the time windows that overlap this one; None keeps all.

        Raises:
            SpecError: If the dataset does not show the place at that time, or the chip
                would have less than half a pixel or more than 4096 pixels a side.
        """
        self.spatial, self.temporal = spatial, temporal
        self._grid = pixel_grid(dataset)
        if isinstance(spatial, PointBuffer):
            shown = self._around_point(dataset, spatial)
        else:
            shown = self._over_box(dataset, spatial)
        self._chips = shown
        if temporal is not None:
            start, end = temporal.window.nanoseconds
            columns = shown.columns
            self._chips = shown.select(
                (columns['start'] < end) & (start < columns['end'])
            )
            if not len(self._chips):
                begins = [f'{t.start:%Y-%m-%d}' for _, _, t in shown.queries()]
                raise SpecError(
                    f'there are no data of {spatial} from {temporal.start} to before '
                    f'{temporal.end}, but such that begin on {", ".join(begins[:5])}: '
                    'change the dates'
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
    def provenance(self) -> dict[str, Any]:
        """The place, which lays out the same chip again."""
        return {type(self.spatial).__name__: asdict(self.spatial)}

    def _around_point(self, dataset: GeoDataset, spatial: PointBuffer) -> ChipTable:
        square = spatial.geometry
        west, south, east, north = square.total_bounds
        x, y = (west + east) / 2, (south + north) / 2
        # Axes, not bounds: in another CRS the square may be turned.
        across, down = shapely.linestrings(
            [[(west, y), (east, y)], [(x, south), (x, north)]]
        )
        axes = gpd.GeoSeries([across, down], crs=square.crs).to_crs(dataset.crs)
        steps = np.diff(shapely.get_coordinates(axes).reshape(2, 2, 2), axis=1)[:, 0]
        pixels = steps / self._grid.res
        width, height = self._checked(np.hypot(*pixels.T), spatial)
        centre = gpd.GeoSeries.from_xy([spatial.lon], [spatial.lat], crs='EPSG:4326')
        try:
            return PointSampler(dataset, centre, (height, width)).table()
        except SpecError as error:
            raise _outside(dataset, spatial) from error

    def _over_box(self, dataset: GeoDataset, spatial: BBox) -> ChipTable:
        grid = self._grid
        area = project_area(spatial.geometry, CRS.from_user_input(dataset.crs))
        edges = area.total_bounds.reshape(2, 2)
        lines = (edges - (grid.x, grid.y)) / grid.res
        # An edge that misses its line by rounding asks for no further pixel.
        first = np.floor(lines[0] + TOLERANCE)
        last = np.maximum(np.ceil(lines[1] - TOLERANCE), first + 1)
        width, height = self._checked(last - first, spatial)

        windows, position = time_windows(dataset)
        pixel = min(grid.res)
        geometries = np.asarray(dataset.index.geometry.values, dtype=object)
        box = shapely.box(*edges.ravel())
        shown = [
            window
            for window in range(len(windows))
            if areal(geometries[position == window], pixel).intersection(box).area > 0
        ]
        if not shown:
            raise _outside(dataset, spatial)
        count = len(shown)
        rows, cols = np.tile(np.array([[-last[1]], [first[0]]], np.int64), count)
        return ChipTable.parts_of(grid, rows, cols, (height, width), windows[shown])

    def _checked(self, size: Any, spatial: BBox | PointBuffer) -> tuple[int, int]:
        if not np.isfinite(size).all() or max(size) > LARGEST_SIDE:
            raise SpecError(
                f'{spatial} is {size[0]:.0f} x {size[1]:.0f} pixels, more than '
                f'{LARGEST_SIDE} a side: choose a smaller place, larger pixels '
                '(scale_m), or cover it with chips (GridSampler)'
            )
        width, height = (round(side) for side in size)
        if min(width, height) < 1:
            raise SpecError(
                f'{spatial} is less than half a pixel: choose a larger place, or '
                'smaller pixels (scale_m)'
            )
        return width, height


def _outside(dataset: GeoDataset, spatial: BBox | PointBuffer) -> SpecError:
    west, south, east, north = dataset.index.to_crs('EPSG:4326').total_bounds
    return SpecError(
        f'{spatial} lies outside the data, which reach from {west:.5f} to {east:.5f} '
        f'degrees east and from {south:.5f} to {north:.5f} degrees north: choose a '
        'place within, or another dataset'
    )
