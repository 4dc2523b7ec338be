"""A study from plots to sentences, on a landscape that is made up.

    python examples/study.py study

The folder ``study`` gets images of two summers, plots with labels, and what the
commands of this script make of them; then it prints a sentence about each result. No
account and no downloads: the landscape is drawn, and the weights are random, so that
the numbers say nothing about the Earth, nor about the model. ``docs/study.md`` goes
through it, and has the commands for a real one.
"""

import json
import os
import shlex
import sys
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import rasterio
from numpy.typing import NDArray
from rasterio.transform import from_origin
from scipy.ndimage import gaussian_filter, zoom

from dynamicvis_geo.cli import main as dynamicvis_geo

_EMBED = (
    '--points plots.csv --size 32 --stage 1 --input-range 0,3000 --weights random '
    '--img-size 64'
)
COMMANDS = (
    'plot rgb scenes --output scenes.png',
    f'embed scenes/S2_20220715.tif {_EMBED} --output 2022.parquet',
    f'embed scenes/S2_20230805.tif {_EMBED} --output 2023.parquet',
    'probe 2022.parquet --labels plots.csv --target cover --block 2000 '
    '--images scenes --output probe',
    'plot map 2022.parquet --output features.png',
    'plot map 2022.parquet --color cover --labels plots.csv --output cover.png',
    'plot map probe/predictions.parquet --color correct --output correct.png',
    'similar 2022.parquet --like plot-17 --k 20 --output forest.csv '
    '--sheet forest.png --images scenes',
    'similar 2022.parquet --like plot-14 --k 20 --output built.csv',
    'change 2022.parquet 2023.parquet --output change.parquet --sheet change.png '
    '--images scenes',
    'report 2022.parquet --images scenes --probe probe',
)

#: Pixels of 10 m on each side of the landscape, and its north-western corner.
SIZE, CRS, CORNER = 1600, 'EPSG:32633', (500_000, 5_340_000)
#: Plots on each side, and how many of all are cleared between the summers.
SIDE, CLEARED = 17, 10

#: Covers: name, red, green and blue reflectance, and their spread from pixel to pixel.
COVERS = (
    ('cropland', (450, 690, 380), 0.06),
    ('forest', (420, 640, 360), 0.15),
    ('water', (350, 520, 520), 0.03),
    ('built', (620, 760, 520), 0.15),  # its gardens
    ('built', (1900, 1600, 1350), 0.15),  # its roofs
    ('cleared', (1700, 1350, 1000), 0.15),
)
CROPLAND, FOREST, WATER, GARDEN, ROOF, CLEARING = range(len(COVERS))
#: Reflectance of ripe crops.
STRAW = np.array([1500, 1300, 850])

Random = np.random.Generator
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def main(folder: str) -> None:
    """Draw the landscape, run the commands, and print what one may write."""
    Path(folder).mkdir(parents=True)
    os.chdir(folder)
    Path('scenes').mkdir()
    draw_landscape()
    for line in COMMANDS:
        print(f'\n$ dynamicvis-geo {line}')
        if dynamicvis_geo(shlex.split(line)) != 0:
            raise SystemExit(f'failed: dynamicvis-geo {line}')
    print('\nOf this landscape, and of random weights, one may write:\n')
    for sentence in sentences():
        print(f'- {sentence}')


def sentences() -> list[str]:
    """Say what was found, each number with what it was counted or measured on."""
    labels = pd.read_csv('plots.csv').set_index('id')['cover']
    table = pd.read_csv('probe/results.csv')
    score = table[table['metric'] == 'accuracy_macro'].set_index('method')
    model, colour = score.loc['logistic'], score.loc['baseline'].iloc[1]
    results = json.loads(Path('probe/results.json').read_text(encoding='utf-8'))
    differences = pd.DataFrame(results['differences']).query(
        "metric == 'accuracy_macro' and baseline == 'mean colour'"
    )
    less = differences.set_index('method')
    plots = gpd.read_parquet('probe/predictions.parquet')
    tested = plots[plots['split'] == 'test']
    found = [
        f'Of the 20 plots that are most like {example} by cosine, {same} have its '
        f'label, {label}, as {(labels == label).sum()} of all {len(labels)} plots do.'
        for example, label in (('plot-17', 'forest'), ('plot-14', 'built'))
        for same in [(labels[pd.read_csv(f'{label}.csv')['point_id']] == label).sum()]
    ]
    change = gpd.read_parquet('change.parquet').sort_values('change', ascending=False)
    # In a study of the Earth, this is what looking at both images tells.
    cleared = change['point_id'].isin(pd.read_csv('cleared.csv')['id'])
    return [
        f'On {model["n_test"]:.0f} plots in {model["n_groups"]:.0f} blocks of 2 km, '
        'used neither to fit nor to choose it, a logistic regression on the '
        f'features had a balanced accuracy of {_interval(model)}, against '
        f'{1 / labels.nunique():.2f} for the largest class and {_interval(colour)} for '
        'the same model on the mean colour of the chip.',
        'The balanced accuracy of the logistic regression was higher than that of the '
        f'mean colour by {_interval(less.loc["logistic"])}.',
        'That the linear probe is better than the mean colour has not been shown: the '
        f'difference was {_interval(less.loc["linear probe"])}.',
        f'The linear probe was right on {tested["correct"].sum()} of the {len(tested)} '
        'test plots.',
        *found,
        f'Of the 20 plots ranked highest for change among {len(change)}, '
        f'{cleared[:20].sum()} are forest in the first image and bare in the second; '
        f'of the first five, {cleared[:5].sum()}.',
    ]


def _interval(score: pd.Series) -> str:
    low, high = score['low'], score['high']
    return f'{score["value"]:.2f} (95 % interval {low:.2f} to {high:.2f})'


def draw_landscape(seed: int = 0) -> None:
    """Write images of two summers, the plots, and which of these were cleared.

    The second summer is later in the year and hazier, its crops are riper, and around
    some of the forest plots the forest is gone.
    """
    generator = np.random.default_rng(seed)
    cover = draw_covers(generator)
    plots = draw_plots(generator)
    ripe = generator.beta(1, 2, (SIZE // 14 + 1, SIZE // 25 + 1))
    write_image('scenes/S2_20220715.tif', summer(generator, cover, ripe, haze=1))

    forest = np.flatnonzero(cover[tuple(plots.T)] == FOREST)
    cleared = np.sort(generator.choice(forest, CLEARED, replace=False))
    row, column = np.mgrid[:SIZE, :SIZE]
    later = cover.copy()
    for plot in plots[cleared]:
        near = np.hypot(row - plot[0], column - plot[1]) < generator.uniform(8, 20)
        later[near & (cover == FOREST)] = CLEARING
    write_image(
        'scenes/S2_20230805.tif', summer(generator, later, 0.2 + 0.8 * ripe, haze=1.5)
    )

    y, x = np.reshape(CORNER[::-1], (2, 1)) + (10 * plots.T + 5) * [[-1], [1]]
    places = gpd.GeoSeries.from_xy(x, y, crs=CRS).to_crs('EPSG:4326')
    table = pd.DataFrame(
        {
            'id': [f'plot-{number}' for number in range(len(plots))],
            'lon': places.x.round(6),
            'lat': places.y.round(6),
            'cover': [COVERS[kind][0] for kind in cover[tuple(plots.T)]],
        }
    )
    table.to_csv('plots.csv', index=False)
    table.loc[cleared, ['id']].to_csv('cleared.csv', index=False)


def draw_covers(generator: Random) -> Ints:
    """Draw what covers the ground: patches of some hundred metres to kilometres."""
    cover = np.full((SIZE, SIZE), CROPLAND)
    cover[noise(generator, 280) > 0.2] = FOREST
    town = noise(generator, 300) > 0.9
    roofs = (generator.random((SIZE // 2, SIZE // 2)) < 0.3).repeat(2, 0).repeat(2, 1)
    cover[town] = np.where(roofs, ROOF, GARDEN)[town]
    cover[noise(generator, 450) > 1.1] = WATER
    return cover


def draw_plots(generator: Random) -> Ints:
    """Draw rows and columns of plots, one in each square of a lattice."""
    step = SIZE // SIDE
    corners = step * np.stack(np.mgrid[:SIDE, :SIDE], axis=-1).reshape(-1, 2)
    return corners + generator.integers(16, step - 16, corners.shape)


def noise(generator: Random, metres: float) -> Floats:
    """Draw noise of mean 0 and variance 1 that is alike over some distance."""
    knots = generator.normal(size=(SIZE // 8 + 1, SIZE // 8 + 1))
    field = zoom(gaussian_filter(knots, metres / 80), 8, order=1)[:SIZE, :SIZE]
    return (field - field.mean()) / field.std()


def summer(
    generator: Random, cover: Ints, ripe: Floats, haze: float
) -> NDArray[np.uint16]:
    """Draw what Sentinel-2 might see: red, green and blue reflectance times 10,000."""
    image = np.array([colour for _, colour, _ in COVERS], float)[cover]
    # Fields of 140 by 250 m, each as ripe as it is.
    row, column = np.nonzero(cover == CROPLAND)
    share = ripe[row // 14, column // 25][:, None]
    image[row, column] += share * (STRAW - image[row, column])
    spread = np.array([spread for _, _, spread in COVERS])[cover]
    image *= np.exp(spread * generator.normal(size=cover.shape))[..., None]
    thick = haze * np.maximum(0, 1 + 0.5 * noise(generator, 1500))
    image += thick[..., None] * [50, 70, 100] + generator.normal(0, 15, image.shape)
    return np.moveaxis(image.clip(1, 10_000), -1, 0).astype(np.uint16)


def write_image(path: str, image: NDArray[np.uint16]) -> None:
    """Write a GeoTIFF of 10 m pixels."""
    shape = {'count': len(image), 'height': SIZE, 'width': SIZE, 'dtype': image.dtype}
    place = {'crs': CRS, 'transform': from_origin(*CORNER, 10, 10)}
    with rasterio.open(path, 'w', compress='deflate', **shape, **place) as file:
        file.write(image)


if __name__ == '__main__':
    main(*sys.argv[1:])
