"""GeoTIFFs and datasets that the tests of datasets and samplers are made on."""

from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import rasterio
import torch
from numpy.typing import NDArray
from rasterio.transform import from_origin
from shapely.geometry.base import BaseGeometry
from torchgeo.datasets import GeoDataset

UTM = 'EPSG:32618'


def pattern(height: int, width: int, seed: int = 0) -> NDArray[np.uint16]:
    """Three bands in which hardly two neighbourhoods are alike, none of them 0."""
    rng = np.random.default_rng(seed)
    return rng.integers(1, 10_000, (3, height, width), dtype=np.uint16)


def write_geotiff(
    path: Path,
    pixels: NDArray[Any],
    west: float = 400_000.0,
    north: float = 4_300_000.0,
    res: float | tuple[float, float] = 10.0,
    crs: str | None = UTM,
    **profile: Any,
) -> Path:
    xres, yres = (res, res) if isinstance(res, int | float) else res
    settings = {
        'driver': 'GTiff',
        'count': pixels.shape[0],
        'height': pixels.shape[1],
        'width': pixels.shape[2],
        'dtype': pixels.dtype,
        'crs': crs,
        'transform': from_origin(west, north, xres, yres),
        **profile,
    }
    with rasterio.open(path, 'w', **settings) as sink:
        sink.write(pixels)
    return path


class Areas(GeoDataset):
    """A dataset without files: areas, each with a time window."""

    def __init__(
        self,
        areas: list[BaseGeometry],
        times: list[tuple[str, str]] | None = None,
        crs: str = UTM,
        res: float = 10.0,
    ) -> None:
        times = times or [('2022-06-01', '2022-09-01')] * len(areas)
        intervals = [(pd.Timestamp(start), pd.Timestamp(end)) for start, end in times]
        self.index = gpd.GeoDataFrame(
            geometry=areas,
            index=pd.IntervalIndex.from_tuples(
                intervals, closed='both', name='datetime'
            ),
            crs=crs,
        )
        self._res = (res, res)

    def __getitem__(self, query: Any) -> dict[str, Any]:
        x, y, _ = query
        return {'image': torch.tensor([x.start, y.stop], dtype=torch.float64)}
