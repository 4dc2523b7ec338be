from pathlib import Path

import numpy as np
import rasterio

from dynamicvis_geo.demo import synthetic_scene, write_scene


def test_scene_is_deterministic_and_looks_like_reflectance(tmp_path: Path) -> None:
    scene = synthetic_scene(256)
    assert np.array_equal(scene, synthetic_scene(256))
    assert not np.array_equal(scene, synthetic_scene(256, seed=8))
    assert scene.dtype == np.uint16
    assert scene.shape == (3, 256, 256)
    assert scene.min() > 0
    assert 500 < scene.mean() < 2500
    write_scene(tmp_path / 'scene.tif', scene)
    with rasterio.open(tmp_path / 'scene.tif') as file:
        assert np.array_equal(file.read(), scene)
        assert file.crs.to_epsg() == 32633
        assert file.res == (10, 10)
