"""Searching feature maps, a cell a row."""

from pathlib import Path

import numpy as np
import pytest
from pyproj import Transformer

from dynamicvis_geo.datasets.chips import ChipDataset
from dynamicvis_geo.samplers import GridSampler
from dynamicvis_geo.similarity import find_similar
from tests.formats.conftest import DatedImages
from tests.outputs import write_grid

pytestmark = pytest.mark.once

K = 12


def units(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_cells_of_geotiffs_are_named_by_chip_row_and_column(tmp_path: Path) -> None:
    maps = write_grid(tmp_path / 'maps', count=3, cells=4)
    cells = units(np.moveaxis(maps, 1, -1).reshape(-1, 6))
    found = find_similar(tmp_path / 'maps', cells[21], k=K).table
    values = cells @ cells[21]
    rows = np.argsort(-values)[:K]
    assert found['row'].tolist() == rows.tolist()
    np.testing.assert_allclose(found['similarity'], values[rows], atol=1e-6)
    first = found.iloc[0]
    assert (first['id'], first['cell_row'], first['cell_column']) == ('chip-1', 1, 1)
    # Cells of 80 m of the chip beside the first, 320 m wide.
    assert (first['minx'], first['maxy']) == (500400.0, 4500240.0)
    to_utm = Transformer.from_crs('EPSG:4326', 'EPSG:32618', always_xy=True)
    place = to_utm.transform(first['lon'], first['lat'])
    assert place == pytest.approx((500440.0, 4500200.0), abs=0.01)
    assert first.geometry.centroid.x == pytest.approx(first['lon'], abs=1e-7)


def test_a_place_a_chip_and_cells_found_before_are_examples(tmp_path: Path) -> None:
    maps = write_grid(tmp_path / 'maps', count=3, cells=4)
    cells = units(np.moveaxis(maps, 1, -1).reshape(-1, 6))
    first = find_similar(tmp_path / 'maps', cells[21], k=3)
    place = first.table[['lon', 'lat']].iloc[0]
    by_place = find_similar(tmp_path / 'maps', tuple(place), k=K).table
    rows = [row for row in np.argsort(-(cells @ cells[21])) if row != 21]
    assert by_place['row'].tolist() == rows[:K]
    by_chip = find_similar(tmp_path / 'maps', 'chip-1', k=K).table
    values = (cells @ cells[16:32].T).mean(axis=1)
    rows = [row for row in np.argsort(-values) if not 16 <= row < 32]
    assert by_chip['row'].tolist() == rows[:K]
    first.write(tmp_path / 'found.parquet')
    again = find_similar(tmp_path / 'maps', tmp_path / 'found.parquet', k=100).table
    assert sorted(again['row']) == sorted({*range(48)} - {*first.table['row']})


def test_each_cell_of_a_mosaic_is_found_once_and_names_its_chip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip('zarr')
    pytest.importorskip('xarray')
    from dynamicvis_geo.formats import zarr_layout
    from tests.formats.mosaics import D, drive, feature_map, open_group, scene

    # Several shards for the little there is.
    monkeypatch.setattr(zarr_layout, 'CHUNK_BYTES', (1, 2**20))
    monkeypatch.setattr(zarr_layout, 'SHARD_BYTES', 500)
    scene(tmp_path / 'scenes')
    dataset = DatedImages(tmp_path / 'scenes')
    chips = ChipDataset([(dataset, GridSampler(dataset, 32, 16, edge='drop'))])
    target = drive(tmp_path / 'maps.zarr', chips, fails={0})
    array = open_group(target)['embeddings'].isel(time=0)
    there = array.values.reshape(D, -1).T
    there = there[np.isfinite(there).all(axis=1)]
    example = there[17]
    found = find_similar(target, example, k=10_000)
    table = found.table
    assert len(table) == len(there) < array[0].size
    values = np.sort(units(there) @ units(example))[::-1]
    np.testing.assert_allclose(table['similarity'], values, atol=1e-6)
    for i, row in table.iterrows():
        of_chip = feature_map(row['id'])[:, row['cell_row'], row['cell_column']]
        np.testing.assert_array_equal(found.vectors[i], of_chip)
        x, y = (row['minx'] + row['maxx']) / 2, (row['miny'] + row['maxy']) / 2
        np.testing.assert_array_equal(array.sel(x=x, y=y), of_chip)
    # A place and the chip around it.
    one = table.iloc[5]
    by_place = find_similar(target, (one['lon'], one['lat']), k=10_000).table
    assert {*table['row']} - {*by_place['row']} == {one['row']}
    name = chips.chips['chip_id'].iloc[3]
    outside = find_similar(target, name, k=10_000).table
    chip = chips.chips.iloc[3]
    x, y = (
        outside[['minx', 'maxx']].mean(axis=1),
        outside[['miny', 'maxy']].mean(axis=1),
    )
    inside = x.between(chip['minx'], chip['maxx']) & y.between(
        chip['miny'], chip['maxy']
    )
    assert not inside.any()
    assert len(outside) == len(table) - 16
