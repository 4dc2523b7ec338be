import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from torchgeo.datasets import RasterDataset

from dynamicvis_geo import ChipDataset, FeatureMaps, GridSampler, collate
from dynamicvis_geo.errors import SourceError, SpecError
from tests.datasets.rasters import write_geotiff
from tests.stores import Upload

#: Cells of 160 m: chips of 640 m.
RES, CELLS, BANDS = 160.0, 4, 5
WEST, NORTH = 400_000.0, 4_300_000.0
SIDE = RES * CELLS


def features(seed: int, bands: int = BANDS) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(bands, CELLS, CELLS)).astype(np.float32)


def write_map(
    folder: Path,
    column: int = 0,
    tags: dict[str, str] | None = None,
    name: str | None = None,
    crs: str = 'EPSG:32618',
    bands: int = BANDS,
) -> Path:
    """Write the map of one of the chips that stand side by side."""
    folder.mkdir(exist_ok=True)
    path = write_geotiff(
        folder / (name or f'chip-{column}.tif'),
        features(column, bands),
        WEST + column * SIDE,
        NORTH,
        RES,
        crs,
    )
    with rasterio.open(path, 'r+') as file:
        file.update_tags(**(tags or {}))
    return path


def query(dataset: FeatureMaps, column: int = 0) -> torch.Tensor:
    west = WEST + column * SIDE
    image: torch.Tensor = dataset[west : west + SIDE, NORTH - SIDE : NORTH]['image']
    return image


def test_cells_are_those_of_the_files(tmp_path: Path) -> None:
    for column in range(3):
        write_map(tmp_path, column)
    (tmp_path / 'metadata.json').write_text('{}')
    (tmp_path / '.chip-9.tif.123.partial').write_bytes(b'')
    dataset = FeatureMaps(tmp_path)
    assert isinstance(dataset, RasterDataset)
    assert len(dataset) == 3
    assert dataset.res == (RES, RES)
    image = query(dataset, 1)
    assert image.dtype == torch.float32
    np.testing.assert_array_equal(image, features(1))
    # Half of one chip and half of the next.
    west = WEST + SIDE / 2
    both = dataset[west : west + SIDE, NORTH - SIDE : NORTH]['image']
    expected = np.concatenate([features(0)[..., 2:], features(1)[..., :2]], axis=2)
    np.testing.assert_array_equal(both, expected)


def test_time_windows_come_from_tags_then_names(tmp_path: Path) -> None:
    window = {'start': '2024-06-01T00:00:00', 'end': '2024-08-31T23:59:59.999999'}
    write_map(tmp_path, 0, window)
    write_map(tmp_path, 1, name='map_20160112_b.tif')
    write_map(tmp_path, 2, {'chip_id': 'x'}, name='EPSG3857_x20011231_y0.tif')
    write_map(
        tmp_path, 3, {'start': '2024-06-01T02:00+02:00', 'end': '2024-06-02T00:00Z'}
    )
    index = FeatureMaps(tmp_path).index
    windows = {
        Path(path).name: interval
        for path, interval in zip(index['filepath'], index.index, strict=True)
    }
    dated = windows['chip-0.tif']
    assert (dated.left, dated.right) == (
        pd.Timestamp('2024-06-01'),
        pd.Timestamp('2024-08-31T23:59:59.999999'),
    )
    assert windows['map_20160112_b.tif'].left == pd.Timestamp('2016-01-12')
    assert windows['EPSG3857_x20011231_y0.tif'].left == pd.Timestamp.min
    assert windows['chip-3.tif'].left == pd.Timestamp('2024-06-01')
    assert windows['chip-3.tif'].right == pd.Timestamp('2024-06-02')


class Cover(RasterDataset):
    is_image = False
    filename_glob = 'cover*'


def test_maps_and_labels(tmp_path: Path) -> None:
    window = {'start': '2024-06-01', 'end': '2024-08-31'}
    for column in range(2):
        write_map(tmp_path / 'maps', column, window)
    cover = np.zeros((1, 64, 128), np.uint8)
    cover[:, :, 64:] = 7
    write_geotiff(tmp_path / 'cover.tif', cover, WEST, NORTH, 10.0)
    pair = FeatureMaps(tmp_path / 'maps') & Cover(str(tmp_path))
    chips = ChipDataset([(pair, GridSampler(pair, CELLS))])
    (batch,) = DataLoader(chips, len(chips), collate_fn=collate)
    assert batch['image'].shape == (len(chips), BANDS, CELLS, CELLS)
    assert batch['mask'].shape == (len(chips), CELLS, CELLS)
    assert set(batch['mask'].flatten().tolist()) == {0, 7}
    sample = pair[WEST + SIDE : WEST + 2 * SIDE, NORTH - SIDE : NORTH]
    assert (sample['mask'] == 7).all()
    np.testing.assert_array_equal(sample['image'], features(1))


def test_workers_read_what_this_process_reads(tmp_path: Path) -> None:
    for column in range(4):
        write_map(tmp_path, column)
    dataset = FeatureMaps(tmp_path)
    chips = ChipDataset([(dataset, GridSampler(dataset, CELLS))])
    here = torch.stack([chips[i]['image'] for i in range(len(chips))])
    loader = DataLoader(chips, 1, num_workers=2, collate_fn=collate)
    there = torch.cat([batch['image'] for batch in loader])
    torch.testing.assert_close(there, here, rtol=0, atol=0)
    np.testing.assert_array_equal(
        query(pickle.loads(pickle.dumps(dataset))), features(0)
    )


def test_maps_can_be_warped_to_a_named_crs(tmp_path: Path) -> None:
    write_map(tmp_path, 0)
    write_map(tmp_path, 1, crs='EPSG:32619')
    with pytest.raises(SpecError, match=r'EPSG:32619.*EPSG:32618.*crs='):
        FeatureMaps(tmp_path)
    dataset = FeatureMaps(tmp_path, crs='EPSG:32618')
    assert len(dataset) == 2
    assert dataset.crs == 'EPSG:32618'
    np.testing.assert_array_equal(query(dataset), features(0))


def test_provenance(tmp_path: Path) -> None:
    path = write_map(tmp_path, 0, {'dynamicvis_geo': '{"model": "m"}'})
    assert FeatureMaps(path).provenance == {'model': 'm'}
    assert FeatureMaps(write_map(tmp_path, 1)).provenance == {}


def test_plot(tmp_path: Path) -> None:
    dataset = FeatureMaps(write_map(tmp_path))
    sample = dataset[WEST : WEST + SIDE, NORTH - SIDE : NORTH]
    figure = dataset.plot(sample, suptitle='a chip')
    (axes,) = figure.axes
    first, shares = axes.get_title().splitlines()
    assert first == '4 x 4 cells, 5 channels'
    assert shares.startswith('PCA: ')
    assert axes.images[0].get_array().shape == (4, 4, 3)
    assert dataset.plot(sample, show_titles=False).axes[0].get_title() == ''


def test_unusable_files(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match='no such file or folder'):
        FeatureMaps(tmp_path / 'none')
    with pytest.raises(SourceError, match='paths names no file'):
        FeatureMaps([])
    write_map(tmp_path, 0)
    write_map(tmp_path, 1, bands=6)
    with pytest.raises(SourceError, match=r'chip-1.tif has 6 bands'):
        FeatureMaps(tmp_path)
    (tmp_path / 'chip-1.tif').write_bytes(b'cut off')
    with pytest.raises(SourceError, match=r'chip-1.tif: rasterio cannot open it'):
        FeatureMaps(tmp_path)
    write_map(tmp_path, 1, {'start': 'soon', 'end': 'later'})
    with pytest.raises(SourceError, match="start='soon'"):
        FeatureMaps(tmp_path)


def test_maps_are_read_from_stores(tmp_path: Path, upload: Upload, web: str) -> None:
    tags = {'start': '2024-06-01T00:00:00', 'end': '2024-09-01T00:00:00'}
    for column in range(2):
        write_map(tmp_path / 'maps', column, tags)
    local = FeatureMaps(tmp_path / 'maps')
    x, y, t = local.bounds
    expected = local[x, y, t]['image']
    url = upload(tmp_path / 'maps')
    pages = [f'{web}/maps/chip-{i}.tif' for i in range(2)]
    for paths in (url, str(url), pages, [url / 'chip-1.tif', url / 'chip-0.tif']):
        maps = FeatureMaps(paths)
        assert (len(maps), maps.bounds) == (2, local.bounds)
        torch.testing.assert_close(maps[x, y, t]['image'], expected)
    with pytest.raises(SourceError, match=f'^{url}/none: no such file'):
        FeatureMaps(url / 'none')
    with pytest.raises(SourceError, match=f'^{url}/none.tif: rasterio cannot open'):
        FeatureMaps(url / 'none.tif')
