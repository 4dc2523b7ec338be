"""``dynamicvis-geo demo``: the main job on a synthetic scene."""

import warnings
from argparse import Namespace

import numpy as np
import rasterio
from rasterio.merge import merge

from dynamicvis_geo.callbacks import EmbeddingWriter
from dynamicvis_geo.commands.prediction import predict
from dynamicvis_geo.datamodules import ScenesDataModule
from dynamicvis_geo.demo import synthetic_scene, write_scene
from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.models.config import BackboneConfig
from dynamicvis_geo.plotting import plot_features
from dynamicvis_geo.provenance import carries_provenance, refuse_others
from dynamicvis_geo.tasks import FeatureExtraction
from dynamicvis_geo.tasks.features import Output

CHIP = 256
# Random weights see little in the dark image that the full range of reflectance gives.
STRETCH = (0.0, 3000.0)


def run(arguments: Namespace) -> None:
    """Make the scene, embed it, and print what was written."""
    folder = arguments.output
    scene = folder / 'scene.tif'
    outputs: dict[str, Output] = {
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
  {folder / 'features.png'}: the scene beside its features

For features with a meaning, use the published weights (a download of about 150 MB):
  dynamicvis-geo embed {folder / 'scene.tif'} --output embeddings.parquet"""
    )
