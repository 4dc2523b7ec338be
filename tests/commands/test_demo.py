from collections.abc import Callable
from pathlib import Path

import geopandas as gpd
import numpy as np
import rasterio
from PIL import Image

from dynamicvis_geo.commands.demo import synthetic_scene, write_scene


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


def test_demo_writes_what_it_names_and_can_be_repeated(
    run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    folder = tmp_path / 'demo'
    for _ in range(2):
        code, out, _ = run_cli('demo', '--output', folder, '--device', 'cpu')
        assert code == 0
    assert 'weights are random' in out
    assert 'dynamicvis-geo embed' in out
    for name in ('scene.tif', 'embeddings.parquet', 'feature-maps', 'features.png'):
        assert str(folder / name) in out
    assert len(gpd.read_parquet(folder / 'embeddings.parquet')) == 16
    assert len(list((folder / 'feature-maps').glob('*.tif'))) == 16
    with rasterio.open(folder / 'scene.tif') as scene:
        assert scene.count == 3
        assert scene.dtypes[0] == 'uint16'
    picture = Image.open(folder / 'features.png')
    assert picture.width > 800
    assert len(picture.convert('RGB').getcolors(1 << 24) or []) > 1000
