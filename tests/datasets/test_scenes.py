import os
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
import rasterio
import torch
from rasterio.enums import ColorInterp
from rasterio.transform import Affine
from torch.utils.data import DataLoader, Dataset
from torchgeo.datasets import RasterDataset

from dynamicvis_geo.datasets import (
    ChipDataset,
    FeatureMaps,
    Scenes,
    collate,
    open_scenes,
)
from dynamicvis_geo.errors import SourceError, SpecError
from dynamicvis_geo.models import DynamicVis_B_Weights
from dynamicvis_geo.samplers import GridSampler
from tests.stores import Upload

from .rasters import pattern, write_geotiff


def chips_of(scenes: list[Scenes], size: int = 32) -> ChipDataset:
    return ChipDataset([(scene, GridSampler(scene, size)) for scene in scenes])


@pytest.mark.parametrize(
    ('place', 'crs'),
    [
        ((400_000.0, 4_300_000.0, 10.0), 'EPSG:32618'),
        ((400_000 + 10 / 3, 4_300_000 - 10 / 3, 10.0), 'EPSG:32618'),
        ((-71.123456789, 44.987654321, 0.0001), 'EPSG:4326'),
        ((-71.25, 44.5, (1 / 3600, 1 / 7200)), 'EPSG:4326'),
    ],
)
def test_chips_are_the_pixels_of_the_file(
    tmp_path: Path, place: tuple[float, float, Any], crs: str
) -> None:
    pixels = pattern(75, 90)
    write_geotiff(tmp_path / 'a.tif', pixels, *place, crs)
    (scene,) = open_scenes(tmp_path)
    chips = chips_of([scene])
    inside = 0
    for row, chip in chips.chips.iterrows():
        col = round((chip.minx - place[0]) / chip.xres)
        top = round((place[1] - chip.maxy) / chip.yres)
        padded = np.pad(pixels, [(0, 0), (32, 32), (32, 32)]).astype(np.float32)
        expected = padded[:, top + 32 : top + 64, col + 32 : col + 64]
        sample = chips[row]
        assert sample['image'].dtype == sample['valid_fraction'].dtype == torch.float32
        np.testing.assert_array_equal(sample['image'].numpy(), expected)
        share = (expected[0] > 0).mean()
        assert sample['valid_fraction'].tolist() == pytest.approx([share])
        inside += int((expected[0] > 0).sum())
    assert inside == 75 * 90


def test_bands_are_chosen_in_order(tmp_path: Path) -> None:
    pixels = np.concatenate([pattern(8, 8), pattern(8, 8, 1)])
    (scene,) = open_scenes(write_geotiff(tmp_path / 'a.tif', pixels), bands=(5, 1, 5))
    image = chips_of([scene], 8)[0]['image'].numpy()
    np.testing.assert_array_equal(image, pixels[[4, 0, 4]].astype(np.float32))


def masked_file(path: Path, kind: str) -> np.ndarray[Any, Any]:
    """Write a file of 8 x 8 whose first two rows are no data; return what is."""
    pixels = pattern(8, 8).astype('float32' if kind in ('nan', 'both') else 'uint16')
    hidden = np.zeros((8, 8), dtype=bool)
    hidden[:2] = True
    if kind == 'nodata':
        pixels[:, hidden] = 65535
        write_geotiff(path, pixels, nodata=65535)
    elif kind == 'nan':
        pixels[:, hidden] = np.nan
        write_geotiff(path, pixels)
    elif kind == 'both':
        pixels[:, 0], pixels[:, 1] = np.nan, -9999
        write_geotiff(path, pixels, nodata=-9999)
    elif kind == 'alpha':
        alpha = np.where(hidden, 0, 65535).astype('uint16')
        write_geotiff(path, np.concatenate([pixels, alpha[None]]))
        with rasterio.open(path, 'r+') as file:
            file.colorinterp = [
                ColorInterp.red,
                ColorInterp.green,
                ColorInterp.blue,
                ColorInterp.alpha,
            ]
    elif kind == 'mask':
        write_geotiff(path, pixels)
        with rasterio.open(path, 'r+') as file:
            file.write_mask(~hidden)
    return np.where(hidden, 0, pixels).astype(np.float32)


@pytest.mark.parametrize('kind', ['nodata', 'nan', 'both', 'alpha', 'mask'])
def test_masked_pixels_are_zero_and_counted(tmp_path: Path, kind: str) -> None:
    expected = masked_file(tmp_path / 'a.tif', kind)
    (scene,) = open_scenes(tmp_path / 'a.tif')
    sample = chips_of([scene], 8)[0]
    np.testing.assert_array_equal(sample['image'].numpy(), expected)
    assert sample['valid_fraction'].tolist() == [0.75]


@pytest.mark.parametrize('kind', ['nodata', 'nan', 'both', 'alpha', 'mask'])
def test_masks_hold_off_the_lattice_too(tmp_path: Path, kind: str) -> None:
    masked_file(tmp_path / 'a.tif', kind)
    (scene,) = open_scenes(tmp_path / 'a.tif')
    # Five metres pixels, from the centre of the image's fourth row to beyond its end.
    x, y = slice(400_000.0, 400_080.0, 5.0), slice(4_299_900.0, 4_300_020.0, 5.0)
    sample = scene[x, y]
    assert sample['image'].shape == (3, 24, 16)
    covered = (sample['image'] > 0).any(dim=0)
    assert sample['valid_fraction'].item() == pytest.approx(covered.float().mean())
    assert not covered[:6].any()  # 20 m of nothing, and some of the masked 20 m
    assert covered[9:20].all()
    assert not covered[21:].any()


def test_one_masked_band_is_zero_and_the_pixel_counts(tmp_path: Path) -> None:
    pixels = pattern(8, 8).astype('float32')
    pixels[1, 3, 4] = np.nan
    (scene,) = open_scenes(write_geotiff(tmp_path / 'a.tif', pixels))
    sample = chips_of([scene], 8)[0]
    assert sample['image'][:, 3, 4].tolist() == [pixels[0, 3, 4], 0, pixels[2, 3, 4]]
    assert sample['valid_fraction'].tolist() == [1.0]


def test_queries_off_the_lattice_are_resampled_in_place(tmp_path: Path) -> None:
    # A ramp eastwards: bilinear values are known exactly between pixel centres.
    ramp = np.broadcast_to(np.arange(40, dtype='uint16') * 100, (3, 40, 40))
    (scene,) = open_scenes(write_geotiff(tmp_path / 'a.tif', ramp))
    x, y = slice(400_105.0, 400_205.0, 10.0), slice(4_299_795.0, 4_299_895.0, 10.0)
    image = scene[x, y]['image']
    expected = 1050.0 + 100 * torch.arange(10)
    assert torch.equal(image, expected.expand(3, 10, 10))


def test_other_crs_is_warped_to(tmp_path: Path) -> None:
    pixels = np.full((3, 50, 50), 7, dtype='uint16')
    (scene,) = open_scenes(write_geotiff(tmp_path / 'a.tif', pixels))
    scene.crs = 'EPSG:32617'  # as an intersection with another dataset does
    x, y, _ = scene.bounds
    middle_x, middle_y = (x.start + x.stop) / 2, (y.start + y.stop) / 2
    sample = scene[
        slice(middle_x - 100, middle_x + 100, 10.0),
        slice(middle_y - 100, middle_y + 100, 10.0),
    ]
    assert sample['valid_fraction'].item() == 1
    assert (sample['image'] == 7).all()


def test_dates_in_names_keep_days_apart(tmp_path: Path) -> None:
    names = ['S2_T18SVG_20160112_20m', 'x_20160113T155022_20170101', 'no_99999999_date']
    for seed, name in enumerate(names):
        write_geotiff(tmp_path / f'{name}.tif', pattern(16, 16, seed))
    chips = chips_of(open_scenes(tmp_path), 16)
    table = chips.chips
    assert table['chip_id'].is_unique
    days = {
        '2016-01-12': (0, '_20160112'),
        '2016-01-13': (1, '_20160113'),
        'never': (2, 'px_10m'),
    }
    for day, (seed, ending) in days.items():
        rows = table.index[table['start'].dt.strftime('%F').fillna('never') == day]
        assert table['chip_id'][rows].str.endswith(ending).all()
        total = sum(chips[row]['image'].sum().item() for row in rows)
        assert total == pattern(16, 16, seed).sum()


def test_files_of_one_time_are_a_mosaic(tmp_path: Path) -> None:
    left, right = pattern(16, 16), pattern(16, 16, 1)
    left[:, :, 8:] = 0
    write_geotiff(tmp_path / 'a.tif', left, nodata=0)
    write_geotiff(tmp_path / 'b.tif', right, west=400_040.0)
    (scene,) = open_scenes(tmp_path)
    x, y = slice(400_000.0, 400_200.0, 10.0), slice(4_299_840.0, 4_300_000.0, 10.0)
    image = scene[x, y]['image'].numpy()
    np.testing.assert_array_equal(image[:, :, :8], left[:, :, :8].astype(np.float32))
    np.testing.assert_array_equal(image[:, :, 8:], right[:, :, 4:].astype(np.float32))


def test_files_are_grouped_so_that_nothing_is_resampled(tmp_path: Path) -> None:
    deep = tmp_path / 'deep' / 'er'
    deep.mkdir(parents=True)
    write_geotiff(tmp_path / 'a.tif', pattern(20, 20))
    write_geotiff(deep / 'b.TIFF', pattern(20, 20, 1), west=400_200.0)
    write_geotiff(tmp_path / 'c.tif', pattern(20, 20, 2), west=400_000 + 10 / 3)
    write_geotiff(tmp_path / 'd.Tif', pattern(20, 20, 3), res=20.0)
    write_geotiff(tmp_path / 'e.tif', pattern(20, 20, 4), crs='EPSG:32619')
    (tmp_path / 'notes.txt').write_text('no image')
    scenes = open_scenes(tmp_path)
    assert sorted(len(scene) for scene in scenes) == [1, 1, 1, 2]
    found = {Path(path).name for scene in scenes for path in scene.index['filepath']}
    assert found == {'a.tif', 'b.TIFF', 'c.tif', 'd.Tif', 'e.tif'}
    with pytest.raises(SourceError, match=r'c\.tif: its CRS, resolution or pixel'):
        Scenes([tmp_path / 'a.tif', tmp_path / 'c.tif'])


@pytest.mark.parametrize('kind', [Scenes, RasterDataset])
def test_forked_workers_do_not_share_open_files(
    tmp_path: Path, kind: type[Scenes] | type[RasterDataset]
) -> None:
    pixels = pattern(1000, 1000)
    tiles = {'compress': 'deflate', 'tiled': True, 'blockxsize': 64, 'blockysize': 64}
    path = write_geotiff(tmp_path / 'a.tif', pixels, **tiles)
    dataset = kind(path)
    chips = ChipDataset([(dataset, GridSampler(dataset, 100, edge='drop'))])
    chips[0]  # opens the file; more would only fill the cache that workers inherit
    loader = DataLoader(
        chips,
        batch_size=4,
        num_workers=2,
        collate_fn=collate,
        multiprocessing_context='fork',
    )
    images = torch.cat([batch['image'] for batch in loader]).numpy()
    for image, chip in zip(images, chips.chips.itertuples(), strict=True):
        col, row = round((chip.minx - 4e5) / 10), round((4.3e6 - chip.maxy) / 10)
        expected = pixels[:, row : row + 100, col : col + 100]
        np.testing.assert_array_equal(image, expected.astype(np.float32))


def test_what_joins_with_it_and_what_torchgeo_gives(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / 'a.tif', pattern(40, 40))
    (scene,) = open_scenes(path)
    plain = RasterDataset(path)
    query = next(iter(GridSampler(scene, 16, edge='drop')))
    ours, theirs = scene[query], plain[query]
    assert ours.keys() == theirs.keys() | {'valid_fraction'}
    assert torch.equal(ours['image'], theirs['image'])
    joined = scene & plain
    assert joined[query]['image'].shape == (6, 16, 16)


def test_transforms_see_the_whole_sample(tmp_path: Path) -> None:
    def halve(sample: dict[str, Any]) -> dict[str, Any]:
        return {**sample, 'image': sample['image'] / 2, 'seen': sorted(sample)}

    path = write_geotiff(tmp_path / 'a.tif', pattern(16, 16))
    scene = Scenes(path, transforms=halve)
    sample = chips_of([scene], 16)[0]
    assert {'bounds', 'image', 'valid_fraction'} <= set(sample['seen'])


def test_transforms_of_the_weights_keep_the_place(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / 'a.tif', pattern(64, 64))
    transforms = DynamicVis_B_Weights.FMOW_EPOCH_170.transforms
    plain, scene = Scenes(path), Scenes(path, transforms=transforms)
    raw, sample = (dataset[dataset.bounds] for dataset in (plain, scene))
    assert torch.equal(sample['image'], transforms(raw['image']))
    assert sample['valid_fraction'].tolist() == [1]
    if 'transform' in raw:  # TorchGeo 0.9
        corner = Affine(*sample['transform'].tolist()) * (512, 512)
        assert corner == Affine(*raw['transform'].tolist()) * (64, 64)


def test_outside_there_is_nothing(tmp_path: Path) -> None:
    (scene,) = open_scenes(write_geotiff(tmp_path / 'a.tif', pattern(16, 16)))
    with pytest.raises(IndexError, match='not found'):
        scene[slice(0.0, 10.0, 10.0), slice(0.0, 10.0, 10.0)]


def test_no_such_place(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r'nowhere: no such file or folder'):
        open_scenes(tmp_path / 'nowhere')
    with pytest.raises(SourceError, match=r'no \*\.tif or \*\.tiff file'):
        open_scenes(tmp_path)


@pytest.mark.parametrize(
    ('profile', 'message'),
    [
        ({'crs': None}, r'bad\.tif: the file has no CRS'),
        ({'transform': Affine(7, 7, 4e5, 7, -7, 4e6)}, r'rows do not run from west'),
        ({'transform': Affine(10, 0, 4e5, 0, 10, 4e6)}, r'rows do not run from west'),
        ({'dtype': 'complex64'}, 'values are complex64'),
    ],
)
@pytest.mark.filterwarnings('ignore::rasterio.errors.NotGeoreferencedWarning')
def test_files_that_cannot_be_used(
    tmp_path: Path, profile: dict[str, Any], message: str
) -> None:
    write_geotiff(tmp_path / 'a.tif', pattern(8, 8))
    write_geotiff(tmp_path / 'bad.tif', pattern(8, 8), **profile)
    with pytest.raises(SourceError, match=message) as error:
        open_scenes(tmp_path)
    assert '\n' not in str(error.value)


def test_a_file_that_is_no_image_is_not_skipped(tmp_path: Path) -> None:
    write_geotiff(tmp_path / 'a.tif', pattern(8, 8))
    (tmp_path / 'b.tif').write_bytes(b'not a GeoTIFF')
    with pytest.raises(SourceError, match=r'b\.tif: rasterio cannot open it'):
        open_scenes(tmp_path)


def test_a_file_that_ends_too_early(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / 'a.tif', pattern(400, 400))
    os.truncate(path, path.stat().st_size // 2)
    chips = chips_of(open_scenes(path), 1600)
    with pytest.raises(SourceError, match=r'a\.tif: its pixels cannot be read'):
        chips.__getitems__(range(len(chips)))


def test_a_file_made_anew_is_read_anew(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / 'a.tif', pattern(16, 16))
    chips = chips_of(open_scenes(path), 16)
    chips.__getitems__(range(len(chips)))
    write_geotiff(path, pattern(16, 16, 1))
    os.utime(path, ns=(1, 1))
    total = sum(chips[row]['image'].sum().item() for row in range(len(chips)))
    assert total == pattern(16, 16, 1).sum()


def test_too_few_bands(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / 'a.tif', pattern(8, 8)[:1])
    with pytest.raises(SourceError, match=r'has 1 band, but bands \(1, 2, 3\)'):
        open_scenes(path)
    assert len(open_scenes(path, bands=(1, 1, 1))) == 1


@pytest.mark.parametrize('bands', [(1, 2), (0, 1, 2), ('1', '2', '3'), 3, (1, 2.5, 3)])
def test_wrong_bands(tmp_path: Path, bands: Any) -> None:
    path = write_geotiff(tmp_path / 'a.tif', pattern(8, 8))
    with pytest.raises(SpecError, match='bands='):
        open_scenes(path, bands=bands)


SCENES = ('a_20240601.tif', 'b_20240601.tif', 'more/c_20240601.TIF')


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """A folder of three images side by side, one of them in a folder of its own."""
    folder = tmp_path / 'scenes'
    (folder / 'more').mkdir(parents=True)
    for i, name in enumerate(SCENES):
        write_geotiff(folder / name, pattern(64, 64, i), 400_000 + 640.0 * i)
    (folder / 'notes.txt').write_text('no image')
    return folder


def samples(found: list[Scenes]) -> list[Any]:
    chips = chips_of(found)
    return [chips[i]['image'].tolist() for i in range(len(chips))]


def test_images_of_stores_are_those_of_disks(
    scenes: Path, upload: Upload, web: str, tmp_path: Path
) -> None:
    local = open_scenes(scenes)
    url = upload(scenes)
    for folder in (url, str(url), f'/vsis3/{url.path}'):
        (found,) = open_scenes(folder)
        assert [os.path.basename(path) for path in found.paths] == [
            os.path.basename(path) for path in local[0].paths
        ]
        assert found.bounds == local[0].bounds
        assert samples([found]) == samples(local)
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as archive:
        archive.write(scenes / 'a_20240601.tif', 'a_20240601.tif')
    one = open_scenes(scenes / 'a_20240601.tif')
    for path in (
        url / 'a_20240601.tif',
        f'/vsis3/{url.path}/a_20240601.tif',
        f'{web}/scenes/a_20240601.tif',
        f'/vsicurl/{web}/scenes/a_20240601.tif',
        f'/vsizip/{tmp_path}/a.zip/a_20240601.tif',
    ):
        found = open_scenes(path)
        assert found[0].bounds == one[0].bounds
        assert samples(found) == samples(one)


def test_worker_processes_read_from_stores(
    scenes: Path, upload: Upload, web: str
) -> None:
    expected = samples(open_scenes(scenes))
    for found in (
        open_scenes(upload(scenes)),
        [Scenes([f'{web}/scenes/{name}' for name in SCENES])],
    ):
        chips = chips_of(found)
        # What this process has open must not be shared with the workers.
        chips[0]
        loader = DataLoader(chips, num_workers=2, collate_fn=collate)
        assert [batch['image'][0].tolist() for batch in loader] == expected


class Connections(Dataset[set[int]]):
    """Gives the ports on which a server was asked for chips, as those were read."""

    def __init__(self, chips: Dataset[Any], server: str) -> None:
        self.chips = chips
        self.port = urlsplit(server).port

    def __getitem__(self, index: int) -> set[int]:
        self.chips[index]
        return {
            one.laddr.port
            for one in psutil.Process().net_connections('tcp')
            if one.raddr and one.raddr.port == self.port
        }


@pytest.mark.parametrize('kind', [Scenes, FeatureMaps])
def test_forked_workers_have_connections_of_their_own(
    tmp_path: Path, web: str, kind: type[Scenes | FeatureMaps]
) -> None:
    """Two processes that ask on one connection get the answers of each other."""
    write_geotiff(tmp_path / 'a.tif', pattern(512, 512))
    images = kind(f'{web}/a.tif')
    chips = ChipDataset([(images, GridSampler(images, 32))])
    connections = Connections(chips, web)
    mine = connections[0]
    assert mine
    loader = DataLoader(
        connections,
        sampler=[len(chips) // 2, len(chips) - 1],
        batch_size=None,
        num_workers=1,
        multiprocessing_context='fork',
    )
    for theirs in loader:
        assert theirs - mine


def test_missing_images_of_stores_are_named(bucket: str, web: str) -> None:
    name = bucket.removeprefix('s3://')
    for path in (
        f'{bucket}/none.tif',
        f'{bucket}/none',
        f'/vsis3/{name}/none.tif',
        f'{web}/none.tif',
        f'/vsicurl/{web}/none.tif',
        '/vsizip/none.zip/none.tif',
    ):
        with pytest.raises(SourceError, match=f'^{path}: ') as caught:
            open_scenes(path)
        assert '\n' not in str(caught.value)
    with pytest.raises(SourceError, match=f'^{bucket}/none: no such file or folder'):
        open_scenes(f'/vsis3/{name}/none')
