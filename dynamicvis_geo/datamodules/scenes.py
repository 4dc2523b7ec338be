"""Chips of GeoTIFFs for a prediction run."""

from __future__ import annotations

import math
import warnings
from functools import cached_property
from typing import Any

import numpy as np
from torchgeo.datasets import GeoDataset

from dynamicvis_geo.datamodules.chips import ChipDataModule, Pairs, points_of
from dynamicvis_geo.datamodules.earthengine import CHIP_SIZE
from dynamicvis_geo.datamodules.plan import Plan
from dynamicvis_geo.datasets import Scenes, assign_points, open_scenes
from dynamicvis_geo.datasets.chip_table import ChipSampler, bounds_of
from dynamicvis_geo.datasets.source import OnError
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.paths import AnyPath
from dynamicvis_geo.projections import crs_name
from dynamicvis_geo.samplers import GridSampler, PointSampler
from dynamicvis_geo.samplers.coverage import as_pair


class ScenesDataModule(ChipDataModule):
    """Chips of a GeoTIFF, or of all in a folder, each in its own CRS.

    Arguments are plain values, which a YAML file can hold, or Python objects.
    """

    def __init__(
        self,
        path: AnyPath,
        bands: tuple[int, int, int] = (1, 2, 3),
        size: int | None = None,
        stride: int | None = None,
        points: Any = None,
        on_error: OnError = 'raise',
        batch_size: int = 4,
        num_workers: int = 0,
        persistent_workers: bool = False,
        prefetch_factor: int | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        """Keep the arguments; nothing is read yet.

        Args:
            path: A GeoTIFF, or a folder of them; or a URL, or a path of GDAL's
                (``/vsi...``), of such.
            bands: Three band numbers, from 1: red, green and blue.
            size: Side of a chip in pixels; 512 by default.
            stride: Pixels from chip to chip; *size* by default.
            points: One chip around each point instead of a grid: the path of a CSV with
                columns lon and lat, or of a vector file; or a GeoDataFrame.
            on_error: As for :class:`ChipDataModule`.
            batch_size: As for :class:`ChipDataModule`.
            num_workers: As for :class:`ChipDataModule`.
            persistent_workers: As for :class:`ChipDataModule`.
            prefetch_factor: As for :class:`ChipDataModule`.
            pin_memory: As for :class:`ChipDataModule`.

        Raises:
            SpecError: If a number is out of range, or arguments contradict each other.
        """
        super().__init__(
            on_error=on_error,
            batch_size=batch_size,
            num_workers=num_workers,
            persistent_workers=persistent_workers,
            prefetch_factor=prefetch_factor,
            pin_memory=pin_memory,
        )
        if points is not None and stride is not None:
            raise SpecError(
                f'stride={stride!r} is for a grid: leave it out, or leave out points'
            )
        self.path = path
        self.bands = bands
        self.size = CHIP_SIZE if size is None else size
        self.stride = stride
        self.points = points

    @cached_property
    def scenes(self) -> list[Scenes]:
        """The images, those of one CRS and pixel lattice together.

        Raises:
            SourceError: If a file cannot be used.
        """
        return open_scenes(self.path, self.bands)

    def _outline(self, chip_bytes: int) -> Plan:
        height, width = as_pair('size', self.size)
        stride = self.size if self.stride is None else self.stride
        step = math.prod(as_pair('stride', stride))
        least = 0
        if self.points is None:
            for scene in self.scenes:
                pixel = math.prod(scene.res)
                for _, part in scene.index.groupby(level=0):
                    least += math.ceil(part.union_all().area / pixel / step)
        return Plan(
            chips=max(1, least),
            finished=0,
            zones=tuple(dict.fromkeys(crs_name(scene.crs) for scene in self.scenes)),
            side=max(height, width),
            requests=0,
            fetch_bytes=0,
            chip_bytes=chip_bytes,
            laid_out=False,
        )

    def _make_pairs(self) -> Pairs:
        pairs: list[tuple[GeoDataset, ChipSampler]]
        if self.points is None:
            pairs = [(s, GridSampler(s, self.size, self.stride)) for s in self.scenes]
        else:
            pairs = [
                (scene, PointSampler(scene, near, self.size))
                for scene, near in assign_points(self.scenes, points_of(self.points))
            ]
        for scene, sampler in pairs:
            _warn_of_padding(scene, sampler, self.size)
        return pairs


def _warn_of_padding(scene: GeoDataset, sampler: ChipSampler, size: int) -> None:
    """Warn of an image that is smaller than a chip."""
    x, y, _ = scene.bounds
    width, height = (round((s.stop - s.start) / s.step) for s in (x, y))
    if min(width, height) >= size:
        return
    west, south, east, north = bounds_of(sampler.table().columns).T
    across = np.minimum(east, x.stop) - np.maximum(west, x.start)
    down = np.minimum(north, y.stop) - np.maximum(south, y.start)
    covered = across.clip(0) * down.clip(0) / (x.step * y.step * size**2)
    warnings.warn(
        f'chips of {size} x {size} pixels are larger than the image of {width} x '
        f'{height} pixels: they are padded, and at most the fraction '
        f'{covered.max():.3f} of one is valid; a smaller size avoids it',
        stacklevel=2,
    )
