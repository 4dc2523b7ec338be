"""The files that the pages speak of: images, plots, and what commands made of them."""

from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely

from dynamicvis_geo.commands.demo import synthetic_scene, write_scene
from tests.models.checkpoints import make_checkpoint

COVERS = ('bare', 'forest', 'water')


def write_inputs(folder: Path) -> None:
    """Write what a user has before the first command."""
    scene = synthetic_scene(768)
    write_scene(folder / 'scene.tif', scene)
    (folder / 'folder-of-scenes').mkdir()
    for day in ('20220607', '20220712'):
        write_scene(folder / 'folder-of-scenes' / f'S2_{day}_T33UUP.tif', scene)
    corner = gpd.GeoSeries.from_xy([384_000], [5_401_600], crs='EPSG:32633')
    places = _lattice(5, corner.translate(1000, -1000), 1300)
    _write_plots(folder / 'sites.csv', places)
    # Far from each other, so that blocks of kilometres divide them.
    _write_plots(folder / 'plots.csv', _lattice(5, corner.translate(0, -60_000), 9000))
    region = gpd.GeoDataFrame({'name': ['lake']}, geometry=[shapely.box(*REGION)])
    region.set_crs('EPSG:4326').to_file(folder / 'region.geojson')
    make_checkpoint(folder / 'weights.pth')


#: A few chips of 512 pixels.
REGION = (13.2, 48.2, 13.26, 48.24)


def _lattice(count: int, corner: gpd.GeoSeries, step: float) -> gpd.GeoSeries:
    x, y = corner.x[0], corner.y[0]
    points = [(x + step * i, y - step * j) for j in range(count) for i in range(count)]
    return gpd.GeoSeries.from_xy(*zip(*points, strict=True), crs=corner.crs)


def _write_plots(path: Path, places: gpd.GeoSeries) -> None:
    lonlat = places.to_crs('EPSG:4326')
    number = np.arange(len(places))
    pd.DataFrame(
        {
            'id': [f'plot-{i}' for i in number],
            'lon': lonlat.x,
            'lat': lonlat.y,
            'cover': [COVERS[i % 3] for i in number],
            'height': 5 + number % 7 + 0.1 * number,
        }
    ).to_csv(path, index=False)


#: What the commands of earlier pages have made, and how.
MADE = {
    'embeddings.parquet': 'embed scene.tif --size 256 --output embeddings.parquet',
    'maps': 'embed scene.tif --size 256 --grid --output maps',
    'dates.parquet': 'embed folder-of-scenes --size 256 --output dates.parquet',
    'plots.parquet': (
        'embed --points plots.csv --start 2022-06-01 --end 2022-09-01 --buffer 320 '
        '--cache chips --output plots.parquet'
    ),
}
