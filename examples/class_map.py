"""From one scene and some labelled points to a map of classes, cell by cell.

    python examples/class_map.py scene.tif points.csv cover classes

``points.csv`` has columns lon and lat, and one of classes. The features are those of
the model's first stage, which has a cell for four pixels of its input: a map of their
classes is finer than one of the last stage, whose cells know more of what is around
them. The folder ``classes`` gets feature maps, the map as a GeoTIFF, and a picture.

``random`` as fifth argument tries it without the published weights.
"""

import sys
from pathlib import Path

import numpy as np
import rasterio
import rioxarray  # noqa: F401 (gives arrays their .rio)
import xarray
from lightning.pytorch import Trainer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dynamicvis_geo import (
    BackboneConfig,
    EmbeddingWriter,
    FeatureExtraction,
    ScenesDataModule,
)
from dynamicvis_geo.datasets import read_points
from dynamicvis_geo.evaluation.class_pictures import plot_class_maps
from dynamicvis_geo.plotting.marks import mark_random_weights

#: Chips overlap, and the nearest chip's cells are taken: no seams.
SIZE, STRIDE = 512, 448


def feature_maps(scene: str, store: Path, weights: str) -> xarray.DataArray:
    """Compute the feature maps of a scene, what is there already excepted."""
    data = ScenesDataModule(scene, size=SIZE, stride=STRIDE)
    backbone = BackboneConfig(weights=weights)
    model = FeatureExtraction(backbone, 'grid', input_range=(0, 5000), stage=0)
    trainer = Trainer(callbacks=[EmbeddingWriter(store)], logger=False, devices=1)
    trainer.predict(model, datamodule=data, return_predictions=False)
    with rasterio.open(scene) as image:
        group, bounds = f'EPSG_{image.crs.to_epsg()}', image.bounds
    maps = xarray.open_zarr(store, group=group)['embeddings'].isel(time=0)
    # Chips reach beyond the scene.
    return maps.sel(
        x=slice(bounds.left, bounds.right), y=slice(bounds.top, bounds.bottom)
    ).load()


def main(
    scene: str, points: str, target: str, folder: str, weights: str = 'pretrained'
) -> None:
    """Fit a logistic regression on the cells of the points; map and draw all cells."""
    Path(folder).mkdir(exist_ok=True)
    maps = feature_maps(scene, Path(folder) / 'maps.zarr', weights)
    table = read_points(points).to_crs(maps.rio.crs)
    at = {axis: xarray.DataArray(getattr(table.geometry, axis)) for axis in 'xy'}
    X = maps.sel(at, method='nearest').values.T
    names, y = np.unique(table[target].astype(str), return_inverse=True)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    hits = cross_val_predict(model, X, y, cv=5) == y
    print(
        f'{hits.mean():.0%} of {len(y)} points, in five parts at random. Points have '
        'neighbours: read "Splits, honestly" in the documentation before you report it.'
    )

    cells = maps.values.reshape(maps.sizes['embedding'], -1).T
    classes = model.fit(X, y).predict(cells).astype('uint8')
    classes = maps[0].copy(data=classes.reshape(maps.shape[1:]))
    # Names in tags, as dynamicvis-geo predict-map writes them.
    tags = {f'class_{number}': name for number, name in enumerate(names)}
    path = Path(folder) / 'classes.tif'
    classes.drop_encoding().rio.to_raster(path, tags=tags)
    figure, _ = plot_class_maps(path)
    mark_random_weights(figure, {'model': {'weights': weights}})
    figure.savefig(Path(folder) / 'classes.png', dpi=150)


if __name__ == '__main__':
    main(*sys.argv[1:])
