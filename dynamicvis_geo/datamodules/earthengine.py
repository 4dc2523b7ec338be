"""Any place, any dates: chips from Google Earth Engine for a prediction run."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import geopandas as gpd
import numpy as np
from pyproj import CRS

from dynamicvis_geo.datamodules.chips import COUNTED, ChipDataModule, Pairs, points_of
from dynamicvis_geo.datamodules.plan import Plan
from dynamicvis_geo.datasets import EarthEngineDataset
from dynamicvis_geo.datasets.batches import cut
from dynamicvis_geo.datasets.requests import read_area, read_windows
from dynamicvis_geo.datasets.source import OnError
from dynamicvis_geo.earthengine import EarthEngineClient
from dynamicvis_geo.earthengine.composite import max_pixels
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.projections import crs_name
from dynamicvis_geo.samplers import PointSampler
from dynamicvis_geo.samplers.coverage import as_pair
from dynamicvis_geo.samplers.zones import (
    grid_pairs,
    point_pairs,
    split_area,
    split_points,
)
from dynamicvis_geo.specs import SensorSpec, TemporalSpec

#: Side of a chip in pixels: that of the backbone's input.
CHIP_SIZE = 512
#: Chips that are planned together when many are fetched ahead.
SLAB = 1000
#: Largest half of the side of a chip in metres.
MAX_BUFFER = 500_000.0


class EarthEngineDataModule(ChipDataModule):
    """Chips of an area or around points, anywhere on Earth, from Earth Engine.

    Places are divided among UTM zones (UPS at the poles), and all zones are one
    :attr:`chips`. An area is covered with a grid of chips that is fixed to the CRS of
    each zone; where zones meet, a chip belongs to the zone in which its centre lies,
    and what is left bare between two grids is filled with chips of one of them, so that
    nothing is left out and no chip occurs twice.

    Arguments are plain values, which a YAML file can hold, or Python objects.
    """

    def __init__(
        self,
        roi: Any = None,
        points: Any = None,
        time: Any = None,
        size: int | None = None,
        stride: int | None = None,
        buffer_m: float | None = None,
        sensor: SensorSpec = SensorSpec(),  # noqa: B008 - frozen
        client: EarthEngineClient = EarthEngineClient(),  # noqa: B008 - frozen
        cache: str | os.PathLike[str] | None = None,
        on_missing: Literal['raise', 'fill', 'skip'] = 'raise',
        on_error: OnError = 'raise',
        batch_size: int = 4,
        num_workers: int = 0,
        persistent_workers: bool = False,
        prefetch_factor: int | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        """Keep the arguments; nothing is read or fetched yet.

        Args:
            roi: Area to cover with chips: the path of a vector file, WKT in EPSG:4326,
                ``'minlon,minlat,maxlon,maxlat'``, a shapely geometry, a GeoDataFrame,
                or a spec.
            points: Instead of *roi*, places that get one chip each: the path of a CSV
                with columns lon and lat, or of a vector file; or a GeoDataFrame.
            time: When: (start, end), the end exclusive, or a TemporalSpec; or a list of
                them, each for one composite.
            size: Side of a chip in pixels; 512 by default.
            stride: Pixels from chip to chip, for *roi*; *size* by default.
            buffer_m: Half the side of a chip in metres, instead of *size*.
            sensor: What imagery, and how it is composed.
            client: How to reach Earth Engine.
            cache: Folder that keeps what was fetched.
            on_missing: What happens to a chip without a single valid pixel, as
                :class:`~dynamicvis_geo.EarthEngineDataset` has it.
            on_error: As for :class:`ChipDataModule`.
            batch_size: As for :class:`ChipDataModule`.
            num_workers: As for :class:`ChipDataModule`.
            persistent_workers: As for :class:`ChipDataModule`.
            prefetch_factor: As for :class:`ChipDataModule`.
            pin_memory: As for :class:`ChipDataModule`.

        Raises:
            SpecError: If arguments are missing, contradict each other, or have values
                that cannot be used.
        """
        super().__init__(
            on_error=on_error,
            batch_size=batch_size,
            num_workers=num_workers,
            persistent_workers=persistent_workers,
            prefetch_factor=prefetch_factor,
            pin_memory=pin_memory,
        )
        if (roi is None) == (points is None):
            raise SpecError('give either roi or points: where the chips are')
        if points is not None and stride is not None:
            raise SpecError(
                f'stride={stride!r} is for a grid: leave it out, or give roi in place '
                'of points'
            )
        if time is None:
            raise SpecError(
                "time is missing: give (start, end), such as ('2024-06-01', "
                "'2024-09-01')"
            )
        self.roi, self.points = roi, points
        self.time: Sequence[TemporalSpec] = read_windows(time)
        self.size = _chip_size(size, buffer_m, sensor.scale_m)
        self.stride = stride
        self.sensor, self.client = sensor, client
        self.cache = cache
        self.on_missing = on_missing

    def plan_fetch(self) -> Plan:
        """Plan to fetch all chips ahead, into the cache.

        Returns:
            The plan.

        Raises:
            SpecError: If an argument has a value that cannot be used.
            SourceError: If a file cannot be used.
        """
        outline = self._outline(self._cache_bytes)
        if outline.excess:
            return outline
        self.setup('predict')
        rows = np.arange(len(self.chips))
        survey = self._survey(cut([rows], COUNTED if len(rows) <= COUNTED else SLAB))
        return self._plan(survey.cached, survey, self._cache_bytes)

    def count_scenes(self) -> int:
        """Ask Earth Engine, in one request, of how many scenes a chip is made.

        It is a chip in the middle of the list of UTM zones, in the first time window.
        Half a minute is tried at most.

        Returns:
            Number of scenes.

        Raises:
            SpecError: If an argument has a value that cannot be used.
            EarthEngineError: If Earth Engine does not tell.
        """
        crs, part = self._zones[len(self._zones) // 2]
        place = part.geometry.representative_point()[:1].to_crs(crs)
        dataset = self._dataset(place.buffer(1.0), crs)
        return dataset.count_scenes(next(iter(PointSampler(dataset, place, self.size))))

    @cached_property
    def _zones(self) -> list[tuple[CRS, gpd.GeoSeries | gpd.GeoDataFrame]]:
        """The area, or the points, of each UTM zone."""
        if self.points is None:
            return split_area(read_area(self.roi))
        return split_points(points_of(self.points))

    def _outline(self, chip_bytes: int) -> Plan:
        height, width = as_pair('size', self.size)
        down, across = as_pair(
            'stride', self.size if self.stride is None else self.stride
        )
        least: float
        if self.points is None:
            # Each chip takes the place of one step of the grid.
            square_metres = sum(
                part.segmentize(1).to_crs(crs).area.sum() for crs, part in self._zones
            )
            least = square_metres / (down * across * self.sensor.scale_m**2)
        else:
            least = sum(len(part) for _, part in self._zones)
        chips = max(1, math.ceil(least)) * len(self.time)
        return Plan(
            chips=chips,
            finished=0,
            zones=tuple(crs_name(crs) for crs, _ in self._zones),
            side=max(height, width),
            requests=chips * math.ceil(height * width / max_pixels(self.sensor)),
            fetch_bytes=chips * self._cache_bytes,
            chip_bytes=chip_bytes,
            laid_out=False,
        )

    @property
    def _cache_bytes(self) -> int:
        """Bytes of the pixels of a chip."""
        a_pixel = len(self.sensor.bands) * np.dtype(self.sensor.dtype).itemsize
        return math.prod(as_pair('size', self.size)) * a_pixel

    def _make_pairs(self) -> Pairs:
        if self.points is None:
            return grid_pairs(self._zones, self._dataset, self.size, self.stride)
        return point_pairs(points_of(self.points), self._dataset, self.size)

    def _dataset(self, area: gpd.GeoSeries, crs: CRS) -> EarthEngineDataset:
        return EarthEngineDataset(
            area,
            self.time,
            self.sensor,
            crs=crs,
            cache=self.cache,
            client=self.client,
            on_missing=self.on_missing,
        )


def _chip_size(size: int | None, buffer_m: float | None, scale_m: float) -> int:
    if buffer_m is None:
        return CHIP_SIZE if size is None else size
    if size is not None:
        raise SpecError(
            f'size={size!r} and buffer_m={buffer_m!r} both set the size of a chip: '
            'give either size or buffer_m'
        )
    if not 0 < buffer_m <= MAX_BUFFER:
        raise SpecError(
            f'buffer_m={buffer_m!r} is not above 0 and at most {MAX_BUFFER:g} metres'
        )
    pixels = round(2 * buffer_m / scale_m)
    if pixels < 1:
        raise SpecError(
            f'buffer_m={buffer_m:g} is less than half a pixel of {scale_m:g} m: give '
            'more metres'
        )
    return pixels
