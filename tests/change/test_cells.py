"""Change between feature maps, a cell a place."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_bounds

from dynamicvis_geo import read_provenance
from dynamicvis_geo.change import Change, find_change
from dynamicvis_geo.datasets.chips import ChipDataset
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.plotting import plot_change_sheet
from dynamicvis_geo.samplers import GridSampler
from tests.formats.conftest import DatedImages
from tests.outputs import PROVENANCE, write_grid

pytestmark = pytest.mark.once

CELLS, D = 4, 6


def write_map(
    folder: Path, west: float, values: np.ndarray, year: int = 2023, res: float = 80.0
) -> None:
    """Write a feature map."""
    folder.mkdir(exist_ok=True)
    _, height, width = values.shape
    name = f'x{west:.0f}_{year}'
    bounds = west, 4.5e6, west + res * width, 4.5e6 + res * height
    with rasterio.open(
        folder / f'{name}.tif',
        'w',
        driver='GTiff',
        count=len(values),
        height=height,
        width=width,
        dtype='float32',
        crs='EPSG:32618',
        transform=from_bounds(*bounds, width, height),
    ) as file:
        file.write(values)
        file.update_tags(
            chip_id=name, start=f'{year}-06-01', end=f'{year}-08-31T23:59:59.999999'
        )


def cosine_distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(one, axis=0) * np.linalg.norm(other, axis=0)
    return 1 - (one * other).sum(axis=0) / lengths


@pytest.fixture
def overlapping(tmp_path: Path) -> tuple[Change, np.ndarray]:
    """Three maps that share half of their cells, and the distances of each."""
    random = np.random.default_rng(0)
    maps = random.normal(size=(2, 3, D, CELLS, CELLS)).astype(np.float32)
    for year, some in zip((2022, 2023), maps, strict=True):
        for i, values in enumerate(some):
            write_map(tmp_path / str(year), 5e5 + 160.0 * i, values, year)
    change = find_change(tmp_path / '2022', tmp_path / '2023')
    distance = np.array([cosine_distance(*pair) for pair in maps.swapaxes(0, 1)])
    return change, distance


def test_a_cell_is_that_of_the_chip_with_the_nearest_centre(
    overlapping: tuple[Change, np.ndarray], tmp_path: Path
) -> None:
    change, distance = overlapping
    captions = [axes.get_xlabel() for axes in plot_change_sheet(change, 2).axes]
    for number, caption in zip(change.order(2), captions[::2], strict=True):
        row, column = divmod(change.cell[number], CELLS)
        assert caption.endswith(f'\ncell row {row}, column {column}')
    # Of the three maps: the first three, the middle two, the last three columns.
    expected = np.concatenate(
        [distance[0][:, :3], distance[1][:, 1:3], distance[2][:, 1:]], axis=1
    )
    change.write(tmp_path / 'change.tif')
    with rasterio.open(tmp_path / 'change.tif') as file:
        assert file.descriptions == ('change', 'distance', 'valid_fraction')
        assert tuple(file.bounds) == (5e5, 4.5e6, 500640.0, 4500320.0)
        assert file.tags()['before'] == '2022-06-01/2022-09-01'
        np.testing.assert_allclose(file.read(2), expected, atol=1e-6)
        score = file.read(1)
    made = read_provenance(tmp_path / 'change.tif')
    assert made['change']['after']['file'] == '2023'
    table = change.table
    assert len(table) == len(change.chip) == expected.size == 32
    columns = ((table['minx'] - 5e5) / 80).round().astype(int)
    rows = ((4500320.0 - table['maxy']) / 80).round().astype(int)
    assert (table['maxx'] - table['minx']).to_numpy() == pytest.approx(80)
    np.testing.assert_allclose(expected[rows, columns], table['distance'], atol=1e-6)
    np.testing.assert_allclose(score[rows, columns], table['change'], rtol=1e-5)
    first = change.top(1).iloc[0]
    assert first['change'] == pytest.approx(np.nanmax(score))
    assert first.geometry.centroid.x == pytest.approx(first['lon'], abs=1e-7)


def test_a_folder_gets_a_file_each_chip(
    overlapping: tuple[Change, np.ndarray], tmp_path: Path
) -> None:
    change, distance = overlapping
    change.write(tmp_path / 'change')
    names = sorted(path.name for path in (tmp_path / 'change').iterdir())
    assert names[0] == 'metadata.json'
    assert names[1:] == [f'x{x}_2023.tif' for x in (500000, 500160, 500320)]
    with rasterio.open(tmp_path / 'change' / names[2]) as file:
        values = file.read(2)
    np.testing.assert_allclose(values[:, 1:3], distance[1][:, 1:3], atol=1e-6)
    assert np.isnan(values[:, [0, 3]]).all()


def test_maps_of_several_grids_need_a_folder(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for year in (2022, 2023):
        for west in (5e5, 500330.0):
            values = random.normal(size=(D, CELLS, CELLS)).astype(np.float32)
            write_map(tmp_path / str(year), west, values, year)
    change = find_change(tmp_path / '2022', tmp_path / '2023')
    with pytest.raises(SpecError, match='do not lie on one grid'):
        change.write(tmp_path / 'change.tif')
    change.write(tmp_path / 'change')
    assert len([*(tmp_path / 'change').glob('*.tif')]) == 2


def test_other_sizes_of_maps_are_refused(tmp_path: Path) -> None:
    for year, cells, res in ((2022, 4, 80.0), (2023, 8, 40.0)):
        values = np.ones((D, cells, cells), np.float32)
        write_map(tmp_path / str(year), 5e5, values, year, res)
    with pytest.raises(SpecError, match=r'\(6, 4, 4\) in .* and \(6, 8, 8\)'):
        find_change(tmp_path / '2022', tmp_path / '2023')


def test_a_mosaic_of_two_dates_is_compared_cell_by_cell(tmp_path: Path) -> None:
    pytest.importorskip('zarr')
    pytest.importorskip('xarray')
    from tests.formats.mosaics import drive, open_group, scene

    for year in (2024, 2025):
        scene(tmp_path / 'scenes', f'S2_{year}0601.tif')
    dataset = DatedImages(tmp_path / 'scenes')
    chips = ChipDataset([(dataset, GridSampler(dataset, 32, 16, edge='drop'))])
    target = drive(tmp_path / 'maps.zarr', chips)
    change = find_change(target)
    array = open_group(target)['embeddings']
    one, other = (array.isel(time=i).values for i in (0, 1))
    expected = cosine_distance(one, other)
    table = change.table
    assert len(table) == np.isfinite(expected).sum()
    x, y = table[['minx', 'maxx']].mean(axis=1), table[['miny', 'maxy']].mean(axis=1)
    rows = np.searchsorted(-array['y'].values, -y.to_numpy())
    columns = np.searchsorted(array['x'].values, x.to_numpy())
    rows -= array['y'].values[rows] < y.to_numpy() - 1
    np.testing.assert_allclose(table['distance'], expected[rows, columns], atol=1e-6)
    assert 'random' in change.summary()


def test_features_of_two_kinds_are_not_compared(tmp_path: Path) -> None:
    from tests.outputs import write_pooled

    write_pooled(tmp_path / 'e.parquet')
    write_grid(tmp_path / 'maps', provenance=PROVENANCE)
    with pytest.raises(SpecError, match='holds pooled features'):
        find_change(tmp_path / 'e.parquet', tmp_path / 'maps')
