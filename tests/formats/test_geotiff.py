"""Feature maps of the writer, over real images, opened by others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import torch
from rasterio.env import GDALVersion
from torchgeo.datasets import RasterDataset

from dynamicvis_geo.callbacks import EmbeddingWriter
from dynamicvis_geo.datasets import FeatureMaps
from dynamicvis_geo.formats.geotiff import encode_feature_map
from dynamicvis_geo.provenance import read_provenance
from tests.callbacks.standins import Chips, Task
from tests.callbacks.test_writer import predict
from tests.formats.conftest import MakeChips


class CellMeans(Task):
    """A feature map whose first three features are means of the pixels of a cell."""

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        means = torch.nn.functional.avg_pool2d(batch['image'].float(), 8)
        embedding = torch.cat([means, means[:, :2] * 0], 1)
        return {'embedding': embedding, 'chip': batch['chip']}


def test_every_cell_covers_its_pixels(tmp_path: Path, make_chips: MakeChips) -> None:
    chips = make_chips()
    predict(EmbeddingWriter(tmp_path / 'maps'), chips, CellMeans('grid'))
    with rasterio.open(tmp_path / 'scene' / 'S2_20240601.tif') as scene:
        pixels, transform = scene.read().astype(float), scene.transform
    files = sorted((tmp_path / 'maps').glob('*.tif'))
    assert len(files) == 6
    for file in files:
        with rasterio.open(file) as image:
            assert image.crs == 'EPSG:32618'
            assert image.res == (80, 80)
            assert image.transform.e < 0
            features = image.read()
            for i, j in np.ndindex(4, 4):
                left, top = image.xy(i, j, offset='ul')
                column, row = (round(v) for v in ~transform @ (left, top))
                pixel = pixels[:, row : row + 8, column : column + 8].mean((1, 2))
                np.testing.assert_allclose(features[:3, i, j], pixel, rtol=1e-5)


def test_raster_dataset_of_torchgeo_opens_the_folder(
    tmp_path: Path, make_chips: MakeChips
) -> None:
    chips = make_chips()
    predict(EmbeddingWriter(tmp_path / 'maps'), chips, CellMeans('grid'))
    dataset = RasterDataset(tmp_path / 'maps')
    assert len(dataset) == 6
    x, y, t = dataset.bounds
    assert (x.start, x.stop, x.step) == (500000, 500960, 80)
    assert (y.start, y.stop, y.step) == (4499360, 4500000, 80)
    image = dataset[x, y, t]['image']
    assert image.shape == (5, 8, 12)
    pixels = torch.stack([chips[i]['image'] for i in (0, 1, 2)]).float().mean((2, 3))
    found = image[:3, :4].reshape(3, 4, 3, 4).mean((1, 3)).T
    torch.testing.assert_close(found, pixels)


def test_tags_say_what_it_is(tmp_path: Path, make_chips: MakeChips) -> None:
    chips = make_chips()
    predict(EmbeddingWriter(tmp_path / 'maps'), chips, Task('grid'))
    chip_id = chips.chips['chip_id'].iloc[3]
    path = tmp_path / 'maps' / f'{chip_id}.tif'
    with rasterio.open(path) as image:
        tags = image.tags()
        assert image.dtypes == ('float32',) * 5
        assert image.descriptions[1] == 'embedding_1'
        assert image.compression.name == 'zstd'
        structure = image.tags(ns='IMAGE_STRUCTURE')
    assert structure['LAYOUT'] == 'COG'
    by_tile = GDALVersion.runtime().at_least('3.11')
    assert structure['INTERLEAVE'] == ('TILE' if by_tile else 'PIXEL')
    assert tags['chip_id'] == chip_id
    assert tags['start'] == '2024-06-01T00:00:00'
    assert tags['end'] == '2024-06-02T00:00:00'
    assert tags['TIFFTAG_DATETIME'] == '2024:06:01 00:00:00'
    assert float(tags['valid_fraction']) == 0.5
    provenance = read_provenance(path)
    assert provenance == read_provenance(tmp_path / 'maps')
    assert provenance['model']['weights'] == 'random'
    assert provenance['source']['chips'] == 6
    assert provenance['emb:type'] == 'pixel'


def test_undated_chip_has_no_date(tmp_path: Path) -> None:
    predict(EmbeddingWriter(tmp_path / 'maps'), Chips(1, dated=False), Task('grid'))
    with rasterio.open(tmp_path / 'maps' / 'chip-0.tif') as image:
        assert not {'start', 'end', 'TIFFTAG_DATETIME'} & set(image.tags())


def test_files_of_other_interleaves_in_one_folder(
    tmp_path: Path, make_chips: MakeChips
) -> None:
    chips, folder = make_chips(), tmp_path / 'maps'
    predict(EmbeddingWriter(folder), chips, CellMeans('grid'))
    before = FeatureMaps(folder)
    x, y, t = before.bounds
    expected = before[x, y, t]['image']
    # As older versions wrote them, and GDAL before 3.11.
    first, second, *_, last = sorted(folder.glob('*.tif'))
    for file, interleave in ((first, 'pixel'), (second, 'band')):
        file.rename(tmp_path / 'moved.tif')
        options = {'driver': 'COG', 'interleave': interleave}
        rasterio.shutil.copy(tmp_path / 'moved.tif', file, **options)
    old = first.read_bytes()
    last.unlink()
    predict(EmbeddingWriter(folder), chips, CellMeans('grid'))
    assert last.exists()
    assert first.read_bytes() == old
    torch.testing.assert_close(FeatureMaps(folder)[x, y, t]['image'], expected)


@pytest.mark.parametrize('shape', [(1, 1, 1), (3, 7, 20), (2, 600, 17)])
def test_maps_of_any_shape(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    features = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    chip = Chips(1).rows([0]).iloc[0]
    (tmp_path / 'map.tif').write_bytes(encode_feature_map(features, chip, {}))
    with rasterio.open(tmp_path / 'map.tif') as image:
        np.testing.assert_array_equal(image.read(), features)
        assert tuple(image.bounds) == (500000, 4500000, 500320, 4500320)


def test_the_validator_finds_nothing_wrong(
    tmp_path: Path, make_chips: MakeChips
) -> None:
    validator = pytest.importorskip('rio_cogeo.cogeo')
    predict(EmbeddingWriter(tmp_path / 'maps'), make_chips(), CellMeans('grid'))
    large = np.zeros((2, 600, 17), np.float32)
    content = encode_feature_map(large, Chips(1).rows([0]).iloc[0], {})
    (tmp_path / 'maps' / 'large.tif').write_bytes(content)
    files = sorted((tmp_path / 'maps').glob('*.tif'))
    assert len(files) == 7
    for file in files:
        assert validator.cog_validate(file, strict=True) == (True, [], [])
