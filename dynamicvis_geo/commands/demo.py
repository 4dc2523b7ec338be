"""``dynamicvis-geo demo``: the main job on a small synthetic scene.

Make a small synthetic scene that looks like Sentinel-2, embed it with random weights,
and write the scene, a GeoParquet file, feature maps as GeoTIFFs, and a picture. Needs
no network.
"""

from __future__ import annotations

import warnings
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dynamicvis_geo.commands.options import (
    add_examples,
    add_running,
    local_output_path,
)
from dynamicvis_geo.errors import OutputError

if TYPE_CHECKING:
    from dynamicvis_geo.tasks.features import OutputMode

Plane = NDArray[np.float32]

#: Red, green and blue surface reflectance (times 10000) of what the scene is made of.
_FIELDS = np.array(
    [
        [420, 720, 380],
        [560, 900, 420],
        [1900, 1500, 1100],
        [1450, 1250, 900],
        [800, 1050, 520],
        [2400, 2050, 1500],
        [330, 560, 300],
    ],
    dtype=np.float32,
)
_WATER = (250, 420, 520)
_ROAD = (1700, 1650, 1600)
_ROOFS = ((2900, 2500, 2300), (1500, 1400, 1350), (3600, 3500, 3400))
_YARD = (950, 1050, 750)

CHIP = 256
# Random weights see little in the dark image that the full range of reflectance gives.
STRETCH = (0.0, 3000.0)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_examples(
        parser,
        'dynamicvis-geo demo',
    )
    parser.add_argument(
        '--output',
        type=local_output_path,
        default=Path('demo-output'),
        metavar='FOLDER',
        help='folder for the files (default: demo-output); those of an earlier demo '
        'are replaced',
    )
    add_running(parser)


def run(arguments: Namespace) -> None:
    """Make the scene, embed it, and print what was written.

    Args:
        arguments: The options.

    Raises:
        OutputError: If the folder cannot be written, or another program's files are in
            the way.
    """
    import rasterio
    from rasterio.merge import merge

    from dynamicvis_geo.callbacks import EmbeddingWriter
    from dynamicvis_geo.commands.trainer import predict
    from dynamicvis_geo.datamodules import ScenesDataModule
    from dynamicvis_geo.models.config import BackboneConfig
    from dynamicvis_geo.plotting import plot_features
    from dynamicvis_geo.provenance import carries_provenance, refuse_others
    from dynamicvis_geo.tasks import FeatureExtraction

    folder = arguments.output
    scene = folder / 'scene.tif'
    outputs: dict[str, OutputMode] = {
        'embeddings.parquet': 'pooled',
        'feature-maps': 'grid',
    }
    writers = {
        output: EmbeddingWriter(folder / name, overwrite=True)
        for name, output in outputs.items()
    }
    for output, writer in writers.items():
        writer.check(output)
    existing = [path for path in (scene, folder / 'features.png') if path.exists()]
    if existing and not carries_provenance(scene):
        refuse_others(existing)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        image = synthetic_scene()
        write_scene(scene, image)
    except OSError as error:
        raise OutputError(
            f'cannot write {folder}: {error}; choose another --output'
        ) from error
    print(
        'The weights are random: the features show that everything works, and mean '
        'nothing.\n'
    )
    warnings.filterwarnings('ignore', message='.*random.*')
    chips = ScenesDataModule(
        folder / 'scene.tif',
        size=CHIP,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers or 0,
    )
    config = BackboneConfig.from_env(weights='random')
    for output, writer in writers.items():
        module = FeatureExtraction(config, output, input_range=STRETCH)
        predict(chips, module, writer, arguments)
    maps = [
        rasterio.open(path) for path in sorted((folder / 'feature-maps').glob('*.tif'))
    ]
    mosaic, _ = merge(maps)
    for file in maps:
        file.close()
    figure = plot_features(
        image, mosaic.astype(np.float32), 'Synthetic scene, random weights'
    )
    figure.savefig(folder / 'features.png', dpi=110)
    print(
        f"""
  {folder / 'scene.tif'}: the scene, 3 bands of uint16
  {folder / 'embeddings.parquet'}: one embedding a chip, with its footprint
  {folder / 'feature-maps'}: one GeoTIFF a chip, a band a feature
  {folder / '*.stac'}: a catalogue of each (STAC): where, when, by which model
  {folder / 'features.png'}: the scene beside its features

For features with a meaning, use the published weights (a download of about 150 MB):
  dynamicvis-geo embed {folder / 'scene.tif'} --output embeddings.parquet"""
    )


def synthetic_scene(size: int = 1024, seed: int = 7) -> NDArray[np.uint16]:
    """Paint fields, a river, a lake, roads and a town.

    Args:
        size: pixels of a side.
        seed: of everything that is random; the same seed gives the same scene.

    Returns:
        uint16 ``[3, size, size]``, bands B4, B3, B2 as surface reflectance 0..10000.
    """
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    scene = _fields(generator, x, y)
    _paint(scene, _town_mask(x, y), _town(generator, size))
    for slope, start in ((0.18, 0.3), (-2.2, 1.55), (1.1, -0.35)):
        distance = np.abs(y - slope * x - start) / np.hypot(1, slope)
        _paint(scene, distance < 0.0022, _ROAD)
    river = np.abs(x - 0.28 - 0.09 * np.sin(5 * y) - 0.03 * np.sin(17 * y))
    lake = np.hypot((x - 0.8) / 1.6, y - 0.82) + 0.01 * np.sin(30 * x)
    _paint(scene, (river < 0.014 + 0.006 * y) | (lake < 0.085), _WATER)
    haze = 1 + 0.05 * _smooth_noise(generator, size, 4)
    grain = generator.normal(0, 35, scene.shape)
    return np.clip(scene * haze + grain, 1, 10000).astype(np.uint16)


def write_scene(path: Path, image: NDArray[np.uint16]) -> None:
    """Write a scene as a GeoTIFF of 10 m pixels in UTM zone 33N.

    Args:
        path: the file.
        image: uint16 ``[3, H, W]``.
    """
    import rasterio
    from rasterio.transform import from_origin

    from dynamicvis_geo.provenance import PROVENANCE_KEY, software_versions, to_json

    bands, height, width = image.shape
    made = {'processing:software': software_versions(), 'source': 'synthetic'}
    with rasterio.open(
        path,
        'w',
        driver='GTiff',
        width=width,
        height=height,
        count=bands,
        dtype=image.dtype,
        crs='EPSG:32633',
        # A corner on the grid of 256-pixel chips, which starts at the CRS's origin.
        transform=from_origin(2560 * 150, 2560 * 2110, 10, 10),
        tiled=True,
        compress='deflate',
    ) as dataset:
        dataset.write(image)
        dataset.update_tags(**{PROVENANCE_KEY: to_json(made)})
        dataset.descriptions = ('B4', 'B3', 'B2')


def _fields(generator: np.random.Generator, x: Plane, y: Plane) -> Plane:
    """Parcels of a tilted, uneven grid, each with a crop and its rows."""
    u, v = x + 0.25 * y, y - 0.2 * x + 0.3
    columns = np.cumsum(generator.uniform(0.03, 0.1, 40)) - 0.05
    rows = np.cumsum(generator.uniform(0.02, 0.07, 60)) - 0.05
    column, row = np.searchsorted(columns, u), np.searchsorted(rows, v)
    crops = generator.integers(0, len(_FIELDS), (61, 41))
    shade = generator.uniform(0.8, 1.2, (61, 41)).astype(np.float32)
    turned = generator.random((61, 41)) < 0.5
    phase = np.where(turned[row, column], u, v)
    furrows = (
        1 + 0.06 * np.sin(phase * 900) + 0.05 * _smooth_noise(generator, len(x), 64)
    )
    colours = np.moveaxis(_FIELDS[crops], -1, 0)[:, row, column]
    fields: Plane = colours * (shade[row, column] * furrows)
    return fields


def _town_mask(x: Plane, y: Plane) -> NDArray[np.bool_]:
    edge = 0.16 + 0.02 * np.sin(9 * np.arctan2(y - 0.3, x - 0.62))
    inside: NDArray[np.bool_] = np.hypot(x - 0.62, y - 0.3) < edge
    return inside


def _town(generator: np.random.Generator, size: int) -> Plane:
    """Blocks of roofs among yards, with streets every 16 pixels."""
    lots = -(-size // 4)
    kind = generator.integers(0, 5, (lots, lots)).repeat(4, 0).repeat(4, 1)
    town = np.empty((3, size, size), np.float32)
    town[:] = np.reshape(_YARD, (3, 1, 1))
    for number, roof in enumerate(_ROOFS):
        _paint(town, kind[:size, :size] == number, roof)
    street = np.arange(size) % 16 < 2
    _paint(town, street[:, None] | street[None, :], _ROAD)
    return town


def _paint(
    scene: Plane, where: NDArray[np.bool_], colour: tuple[int, int, int] | Plane
) -> None:
    values = np.asarray(colour, np.float32)
    if values.ndim == 1:
        values = np.broadcast_to(values[:, None, None], scene.shape)
    scene[:, where] = values[:, where]


def _smooth_noise(generator: np.random.Generator, size: int, cells: int) -> Plane:
    """Bilinear noise in about -1..1 whose features are *size* / *cells* pixels wide."""
    knots = generator.uniform(-1, 1, (cells + 1, cells + 1))
    at = np.linspace(0, cells, size, endpoint=False)
    low, part = at.astype(int), at % 1
    rows = knots[low] * (1 - part[:, None]) + knots[low + 1] * part[:, None]
    noise: Plane = (rows[:, low] * (1 - part) + rows[:, low + 1] * part).astype(
        np.float32
    )
    return noise
