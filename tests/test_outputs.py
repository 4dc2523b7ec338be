from pathlib import Path

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from geopandas.testing import assert_geodataframe_equal
from upath import UPath

from dynamicvis_geo.errors import SourceError, SpecError
from dynamicvis_geo.formats.base import spread
from dynamicvis_geo.formats.geotiff import feature_map_files, read_feature_map
from dynamicvis_geo.outputs import find_chip, open_output, recorded_bands
from tests.outputs import PROVENANCE, write_grid, write_pooled
from tests.stores import Upload


def test_pooled_run_is_read_back(tmp_path: Path) -> None:
    embedding = write_pooled(tmp_path / 'e.parquet')
    run = open_output(tmp_path / 'e.parquet')
    assert (run.kind, run.total, run.dimensions) == ('pooled', 12, 6)
    assert run.chips['id'].tolist() == [f'chip-{i}' for i in range(12)]
    assert f'{run.chips["start"].iloc[0]:%Y-%m-%d}' == '2024-06-01'
    assert run.provenance['model'] == PROVENANCE['model']
    assert np.array_equal(run.embeddings(), embedding)


def test_integers_are_multiplied_by_their_scale(tmp_path: Path) -> None:
    path = tmp_path / 'e.parquet'
    embedding = write_pooled(path)
    scale = np.abs(embedding).max(axis=1) / 127
    table = pq.read_table(path).drop_columns('embedding')
    stored = np.round(embedding / scale[:, None]).astype(np.int8)
    vectors = pa.FixedSizeListArray.from_arrays(stored.ravel(), 6)
    for name, column in (('embedding', vectors), ('scale', scale)):
        table = table.append_column(name, pa.array(column))
    pq.write_table(table, path, row_group_size=5)
    assert np.allclose(open_output(path).embeddings(), embedding, atol=scale.max())
    pq.write_table(table.drop_columns('scale'), path)
    with pytest.raises(SourceError, match=r"'scale' must give"):
        open_output(path).embeddings()


def test_a_folder_of_files_is_one_output(tmp_path: Path) -> None:
    folder = tmp_path / 'pooled'
    folder.mkdir()
    parts = [write_pooled(folder / f'data-0000{i}.parquet', 3 + i) for i in range(2)]
    opened = open_output(folder)
    assert (opened.kind, opened.total, opened.dimensions) == ('pooled', 7, 6)
    assert opened.provenance['model'] == PROVENANCE['model']
    assert np.array_equal(opened.embeddings(), np.concatenate(parts))
    write_pooled(folder / 'data-00002.parquet', 3, dimensions=4)
    with pytest.raises(SourceError, match=r'numbers: keep'):
        open_output(folder).embeddings()


def test_grid_run_has_the_places_of_its_chips(tmp_path: Path) -> None:
    write_grid(tmp_path / 'maps')
    write_pooled(tmp_path / 'e.parquet', count=4)
    run, pooled = open_output(tmp_path / 'maps'), open_output(tmp_path / 'e.parquet')
    assert (run.kind, run.total, run.dimensions) == ('grid', 4, 6)
    assert run.provenance['run'] == PROVENANCE['run']
    assert run.chips['valid_fraction'].tolist() == [0.75] * 4
    one, other = (shapely.bounds(r.chips.geometry.to_numpy()) for r in (run, pooled))
    assert np.allclose(one, other, atol=1e-5)
    assert open_output(next((tmp_path / 'maps').glob('*.tif'))).total == 1


def test_a_file_of_other_software_may_lack_columns_and_embeddings(
    tmp_path: Path,
) -> None:
    table = gpd.GeoDataFrame(
        {'id': ['a', 'b'], 'embedding': [[1.0, 2.0], None]},
        geometry=gpd.points_from_xy([0, 1], [50, 51]).buffer(0.1),
        crs='EPSG:4326',
    )
    table.to_parquet(tmp_path / 'foreign.parquet')
    run = open_output(tmp_path / 'foreign.parquet')
    assert (run.total, run.dimensions, run.provenance) == (2, 2, {})
    assert run.chips['start'].isna().all()
    assert run.chips['centre_lon'].tolist() == pytest.approx([0, 1])
    embeddings = run.embeddings()
    assert embeddings[0].tolist() == [1, 2]
    assert np.isnan(embeddings[1]).all()


def test_empty_run_is_read(tmp_path: Path) -> None:
    write_pooled(tmp_path / 'e.parquet', count=0)
    run = open_output(tmp_path / 'e.parquet')
    assert (run.total, run.dimensions) == (0, 6)
    assert len(run.embeddings()) == 0


def test_what_is_no_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r'no such file.*interrupted'):
        open_output(tmp_path / 'none.parquet')
    with pytest.raises(SourceError, match='no feature map'):
        open_output(tmp_path)
    (tmp_path / 'text.parquet').write_text('text')
    with pytest.raises(SourceError, match='not a readable Parquet file'):
        open_output(tmp_path / 'text.parquet')
    (tmp_path / 'text.tif').write_text('text')
    with pytest.raises(SourceError, match='cannot be read'):
        open_output(tmp_path / 'text.tif')
    gpd.GeoDataFrame(
        {'id': ['a']}, geometry=[shapely.Point(0, 0)], crs=4326
    ).to_parquet(tmp_path / 'points.parquet')
    with pytest.raises(SourceError, match="no column 'embedding'"):
        open_output(tmp_path / 'points.parquet')


def test_chips_are_found_by_id_point_and_number() -> None:
    chips = gpd.GeoDataFrame({'id': ['a', 'b', 'b', '0'], 'point_id': [7, 8, 9, 1]})
    assert find_chip(chips, 'a') == 0
    assert find_chip(chips, '0') == 3
    assert find_chip(chips, '8') == 1
    assert find_chip(chips, '2') == 2
    for name, message in (
        ('b', 'id of 2 chips'),
        ('c', 'none of the 4'),
        ('4', 'to 3'),
    ):
        with pytest.raises(SpecError, match=message):
            find_chip(chips, name)


def test_rows_are_spread_over_all() -> None:
    assert spread(0, 5).tolist() == []
    assert spread(3, 5).tolist() == [0, 1, 2]
    assert spread(101, 3).tolist() == [0, 50, 100]


def test_recorded_bands_are_those_of_the_images() -> None:
    assert recorded_bands(PROVENANCE) == (3, 2, 1)
    for broken in ({}, {'source': 'x'}, {'source': {'sources': [{'bands': ['B4']}]}}):
        assert recorded_bands(broken) == (1, 2, 3)


def test_runs_are_read_back_from_stores(
    tmp_path: Path, upload: Upload, web: str
) -> None:
    embedding = write_pooled(tmp_path / 'e.parquet')
    features = write_grid(tmp_path / 'maps')
    local = open_output(tmp_path / 'e.parquet')
    in_memory = UPath('memory://test-runs/e.parquet')
    in_memory.write_bytes((tmp_path / 'e.parquet').read_bytes())
    for url in (upload(tmp_path / 'e.parquet'), f'{web}/e.parquet', in_memory):
        run = open_output(url)
        assert (run.kind, str(run.path)) == ('pooled', str(url))
        assert (run.total, run.dimensions) == (local.total, local.dimensions)
        assert_geodataframe_equal(run.chips, local.chips)
        assert run.provenance == local.provenance
        assert np.array_equal(run.embeddings(), embedding)
    run = open_output(str(upload(tmp_path / 'maps')))
    expected = open_output(tmp_path / 'maps')
    assert (run.kind, run.total, run.provenance) == ('grid', 4, expected.provenance)
    assert_geodataframe_equal(
        run.chips.drop(columns='file'), expected.chips.drop(columns='file')
    )
    for file, one in zip(feature_map_files(run.path), features, strict=True):
        assert np.array_equal(read_feature_map(file), one)


def test_what_is_not_in_a_store_is_told_in_one_line(bucket: str, web: str) -> None:
    for url in (f'{bucket}/none.parquet', f'{web}/none.parquet', 'memory://none'):
        with pytest.raises(SourceError, match=f'^{url}: no such file') as caught:
            open_output(url)
        assert '\n' not in str(caught.value)
