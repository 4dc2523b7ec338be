from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from rasterio.transform import from_origin
from torchgeo.datasets import RasterDataset

from dynamicvis_geo.datasets.chips import ChipDataset

MakeChips = Callable[..., ChipDataset]


class DatedImages(RasterDataset):
    filename_glob = '*.tif'
    filename_regex = r'.*_(?P<date>\d{8})'


class UndatedImages(RasterDataset):
    filename_glob = '*.tif'


def assert_valid(file: Path) -> None:
    """Have a GeoParquet file checked by a program of others."""
    validator = pytest.importorskip('geoparquet_validator')
    report = validator.check(str(file))
    assert report['version'] == '1.1.0'
    assert validator.failed(report) == []
    # Files of tests are too small for good row groups, and for an order of these.
    levels = {advice['topic']: advice['level'] for advice in report['advice']}
    assert levels['compression'] == levels['bbox covering'] == 'good'


@pytest.fixture
def make_chips(tmp_path: Path) -> MakeChips:
    """Make a scene of 3 bands, 64 x 96 pixels of 10 m, and six chips of it."""

    def make(
        crs: str = 'EPSG:32618',
        west: float = 500000.0,
        north: float = 4500000.0,
        dated: bool = True,
    ) -> ChipDataset:
        folder = tmp_path / 'scene'
        folder.mkdir(exist_ok=True)
        generator = np.random.default_rng(0)
        with rasterio.open(
            folder / 'S2_20240601.tif',
            'w',
            driver='GTiff',
            dtype='uint16',
            count=3,
            height=64,
            width=96,
            crs=crs,
            transform=from_origin(west, north, 10, 10),
        ) as image:
            image.write(generator.integers(0, 10000, (3, 64, 96), np.uint16))
        dataset = (DatedImages if dated else UndatedImages)(folder)
        window = slice(pd.Timestamp('2024-06-01'), pd.Timestamp('2024-06-02'), 1)
        time = window if dated else dataset.bounds[2]
        queries = [
            (
                slice(west + 320 * i, west + 320 * (i + 1), 10),
                slice(north - 320 * (j + 1), north - 320 * j, 10),
                time,
            )
            for j in range(2)
            for i in range(3)
        ]
        return ChipDataset([(dataset, queries)])

    return make


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
