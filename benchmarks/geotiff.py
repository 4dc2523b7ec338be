"""Cost and gain of the interleave of feature maps.

Maps of the last and the first stage of arch b (random weights) are written as GeoTIFFs
in several ways, and read again, all bands and one. Times are of the processor, the
least of some tries, in turn.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import rasterio
import torch
from rasterio.env import GDALVersion

from benchmarks.numerics import read_chips
from dynamicvis_geo.formats import geotiff
from dynamicvis_geo.models import DynamicVis
from dynamicvis_geo.transforms import Preprocess

#: Interleave and level of compression; the first is what was written before GDAL 3.11.
WAYS = ('pixel, level 9', 'pixel, level 3', 'band, level 3', 'tile, level 3')
CHIP = pd.Series(
    {
        'chip_id': 'chip',
        'crs': 'EPSG:32618',
        'minx': 500000,
        'miny': 4494880,
        'maxx': 505120,
        'maxy': 4500000,
        'start': pd.NaT,
        'end': pd.NaT,
    }
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--tries', type=int, default=7)
    options = parser.parse_args()
    ways = [way for way in WAYS if 'tile' not in way or by_tile()]
    print(f'GDAL {rasterio.__gdal_version__}; ratios to the first way\n')
    print('| map | way | size | write | read all | read a band |')
    print('|---|---|---|---|---|---|')
    for features in feature_maps():
        rows = measure(features, ways, options.tries)
        for way, row in zip(ways, rows, strict=True):
            ratios = ' | '.join(f'{value:.2f}' for value in row / rows[0])
            print(f'| {" x ".join(map(str, features.shape))} | {way} | {ratios} |')


def by_tile() -> bool:
    return GDALVersion.runtime().at_least('3.11')


def feature_maps() -> list[np.ndarray]:
    torch.manual_seed(0)
    model = DynamicVis(out_indices=(0, 3)).eval()
    with torch.inference_mode():
        maps = model(Preprocess(512, (0, 10000))(read_chips(None, 1)))
    return [one[0].numpy() for one in reversed(maps)]


def measure(features: np.ndarray, ways: list[str], tries: int) -> np.ndarray:
    """Bytes, and seconds of writing, reading all and reading a band, of each way."""
    rows = np.full((len(ways), 4), np.inf)
    with TemporaryDirectory() as folder:
        for _ in range(tries):
            for i, way in enumerate(ways):
                geotiff._INTERLEAVE, level = way.split(', level ')
                geotiff._ZSTD_LEVEL = int(level)
                path = Path(folder, f'{i}.tif')
                writing = seconds(lambda path=path: write(path, features))
                reading = [
                    seconds(lambda p=path, b=band: read(p, b)) for band in (None, 9)
                ]
                rows[i] = np.minimum(rows[i], [path.stat().st_size, writing, *reading])
    return rows


def write(path: Path, features: np.ndarray) -> None:
    path.write_bytes(geotiff.encode_feature_map(features, CHIP, {}))


def read(path: Path, band: int | None) -> None:
    with rasterio.open(path) as image:
        image.read(band)


def seconds(what: Callable[[], None]) -> float:
    start = time.process_time()
    what()
    return time.process_time() - start


if __name__ == '__main__':
    main()
