import os
import pickle
import shutil
from pathlib import Path

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pytest
import torch
from geopandas.testing import assert_geodataframe_equal
from torch.utils.data import DataLoader
from torchgeo.datasets import NonGeoDataset

from dynamicvis_geo import PooledEmbeddings
from dynamicvis_geo.errors import SourceError, SpecError
from tests.datasets.embedding_parts import vectors, write_part
from tests.stores import Upload


def test_samples_are_vectors_labels_and_row_numbers(tmp_path: Path) -> None:
    path = write_part(
        tmp_path / 'a.parquet', vectors(3), cover=['water', 'forest', 'water']
    )
    dataset = PooledEmbeddings(path, 'cover')
    assert isinstance(dataset, NonGeoDataset)
    assert (len(dataset), dataset.dim) == (3, 6)
    assert dataset.classes == ('forest', 'water')
    sample = dataset[-1]
    torch.testing.assert_close(sample['embedding'], torch.from_numpy(vectors(3)[2]))
    assert sample['index'].tolist() == [2]
    assert sample['index'].dtype == sample['label'].dtype == torch.int64
    assert [int(dataset[i]['label']) for i in range(3)] == [1, 0, 1]
    with pytest.raises(IndexError, match='sample 3 of 3'):
        dataset[3]


def test_labels_of_quantities_and_of_several_classes(tmp_path: Path) -> None:
    path = write_part(
        tmp_path / 'a.parquet',
        vectors(3),
        height=[1.5, 2.25, 40.0],
        tags=[['b', 'a'], [], ['c']],
    )
    height = PooledEmbeddings(path, 'height')
    assert (height[2]['label'].dtype, height[2]['label'].item()) == (torch.float32, 40)
    tags = PooledEmbeddings(path, 'tags')
    assert tags.classes == ('a', 'b', 'c')
    assert [tags[i]['label'].tolist() for i in range(3)] == [
        [1, 1, 0],
        [0, 0, 0],
        [0, 0, 1],
    ]


def test_rows_without_a_label_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write_part(tmp_path / 'a.parquet', vectors(4), cover=['x', None, 'y', None])
    with pytest.warns(UserWarning, match='2 of 4 rows have no value'):
        dataset = PooledEmbeddings(path, 'cover')
    assert len(dataset) == 2
    assert dataset.rows.tolist() == [0, 2]
    assert dataset[1]['index'].item() == 2
    np.testing.assert_array_equal(dataset[1]['embedding'], vectors(4)[2])
    assert dataset.embeddings.shape == (4, 6)


def test_embeddings_are_mapped_and_decoded_once(tmp_path: Path) -> None:
    path = write_part(tmp_path / 'a.parquet', vectors(5))
    first = PooledEmbeddings(path)
    assert isinstance(first.embeddings, np.memmap)
    np.testing.assert_array_equal(first.embeddings, vectors(5))
    with pytest.raises(ValueError, match='read-only'):
        first.embeddings[0] = 0
    (mapped,) = tmp_path.glob('.a.parquet.*.npy')
    made = mapped.stat().st_mtime_ns
    PooledEmbeddings(path)
    assert mapped.stat().st_mtime_ns == made


def test_embeddings_are_decoded_anew_when_the_file_changes(tmp_path: Path) -> None:
    path = write_part(tmp_path / 'a.parquet', vectors(5))
    PooledEmbeddings(path)
    write_part(path, vectors(7, seed=1))
    os.utime(path, ns=(1, 1))
    np.testing.assert_array_equal(PooledEmbeddings(path).embeddings, vectors(7, seed=1))
    assert len(list(tmp_path.glob('.*'))) == 1


def test_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    folder = tmp_path / 'read-only'
    folder.mkdir()
    path = write_part(folder / 'a.parquet', vectors(5))
    folder.chmod(0o500)
    try:
        np.testing.assert_array_equal(PooledEmbeddings(path).embeddings, vectors(5))
    finally:
        folder.chmod(0o700)
    if os.getuid():
        assert [file.name for file in folder.iterdir()] == ['a.parquet']


def test_parts_of_a_folder_are_one_table(tmp_path: Path) -> None:
    folder = tmp_path / 'out'
    folder.mkdir()
    write_part(folder / 'part-1.parquet', vectors(2, seed=1), ids=['c', 'd'])
    write_part(folder / 'part-0.parquet', vectors(2, seed=0), ids=['a', 'b'])
    (folder / '_unfinished.parquet').write_bytes(b'')
    (folder / '.hidden.parquet').write_bytes(b'')
    dataset = PooledEmbeddings(folder)
    assert dataset.table['id'].tolist() == ['a', 'b', 'c', 'd']
    np.testing.assert_array_equal(dataset.embeddings[2:], vectors(2, seed=1))


def test_table_has_all_other_columns(tmp_path: Path) -> None:
    path = write_part(tmp_path / 'a.parquet', vectors(3), provenance={'model': 'm'})
    table = PooledEmbeddings(path).table
    expected = gpd.read_parquet(path).drop(columns='embedding')
    assert table.crs == 'EPSG:4326'
    # Bounds to filter by are left out, as GeoPandas does.
    assert 'bbox' not in table
    assert_geodataframe_equal(table, expected)
    assert PooledEmbeddings(path).provenance == {'model': 'm'}


@pytest.mark.parametrize('kind', [pa.list_, pa.large_list])
def test_lists_of_any_kind_and_float16(tmp_path: Path, kind: object) -> None:
    half = vectors(3).astype(np.float16)
    column = pa.array(list(half), kind(pa.float16()))  # type: ignore[operator]
    dataset = PooledEmbeddings(write_part(tmp_path / 'a.parquet', column))
    assert dataset.embeddings.dtype == np.float32
    np.testing.assert_array_equal(dataset.embeddings, half.astype(np.float32))


def test_int8_is_scaled(tmp_path: Path) -> None:
    stored = np.array([[1, -2], [127, 0]], np.int8)
    scale = np.array([0.5, 0.25], np.float32)
    dataset = PooledEmbeddings(write_part(tmp_path / 'a.parquet', stored, scale=scale))
    assert dataset.embeddings.tolist() == [[0.5, -1.0], [31.75, 0.0]]
    assert 'scale' not in dataset.table
    with pytest.raises(SourceError, match="column 'scale'"):
        PooledEmbeddings(write_part(tmp_path / 'b.parquet', stored))


@pytest.mark.parametrize('workers', [0, 2])
def test_default_collate_and_workers(tmp_path: Path, workers: int) -> None:
    path = write_part(tmp_path / 'a.parquet', vectors(10), cover=list('ababababab'))
    loader = DataLoader(PooledEmbeddings(path, 'cover'), 4, num_workers=workers)
    batches = list(loader)
    assert [len(batch['label']) for batch in batches] == [4, 4, 2]
    assert batches[0]['index'].shape == (4, 1)
    np.testing.assert_array_equal(
        torch.cat([batch['embedding'] for batch in batches]), vectors(10)
    )


def test_pickle_is_small(tmp_path: Path) -> None:
    path = write_part(tmp_path / 'a.parquet', vectors(50, 2000))
    dataset = PooledEmbeddings(path)
    assert len(dataset.table) == 50
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 20_000
    np.testing.assert_array_equal(pickle.loads(pickled).embeddings, vectors(50, 2000))


def test_transforms_apply_to_samples(tmp_path: Path) -> None:
    path = write_part(tmp_path / 'a.parquet', vectors(2))
    dataset = PooledEmbeddings(
        path, transforms=lambda sample: {'twice': 2 * sample['embedding']}
    )
    np.testing.assert_array_equal(dataset[1]['twice'], 2 * vectors(2)[1])


def test_unusable_files(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match='no such file or folder'):
        PooledEmbeddings(tmp_path / 'none.parquet')
    with pytest.raises(SourceError, match=r'no \*.parquet file'):
        PooledEmbeddings(tmp_path)
    text = tmp_path / 'text.parquet'
    text.write_text('not Parquet')
    with pytest.raises(SourceError, match='not a readable Parquet file'):
        PooledEmbeddings(text)
    with pytest.raises(SourceError, match='holds no embeddings'):
        PooledEmbeddings(write_part(tmp_path / 'empty.parquet', vectors(0)))
    other = tmp_path / 'other.parquet'
    gpd.GeoDataFrame({'id': [1]}, geometry=gpd.points_from_xy([1], [2])).to_parquet(
        other
    )
    with pytest.raises(SourceError, match="no column 'embedding'; its columns are id"):
        PooledEmbeddings(other)


def test_unusable_vectors(tmp_path: Path) -> None:
    path = tmp_path / 'a.parquet'
    spoilt = vectors(4)
    spoilt[2, 1] = np.nan
    with pytest.raises(SourceError, match='row 3 has NaN'):
        PooledEmbeddings(write_part(path, spoilt))
    uneven = pa.array([[1.0, 2.0], [1.0]], pa.list_(pa.float32()))
    with pytest.raises(SourceError, match='1 to 2 numbers'):
        PooledEmbeddings(write_part(path, uneven))
    missing = pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2))
    with pytest.raises(SourceError, match='row 2 has no embedding'):
        PooledEmbeddings(write_part(path, missing))
    with pytest.raises(SourceError, match='not lists of numbers'):
        PooledEmbeddings(write_part(path, pa.array(['a', 'b'])))
    assert [file.name for file in tmp_path.iterdir()] == ['a.parquet']


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    write_part(tmp_path / 'a.parquet', vectors(2), provenance={'model': 'one'})
    write_part(tmp_path / 'b.parquet', vectors(2), provenance={'model': 'two'})
    with pytest.raises(SourceError, match='another model'):
        PooledEmbeddings(tmp_path)
    write_part(tmp_path / 'b.parquet', vectors(2, 7), provenance={'model': 'one'})
    with pytest.raises(SourceError, match='embeddings of 7 numbers'):
        PooledEmbeddings(tmp_path)


def test_unusable_targets(tmp_path: Path) -> None:
    path = write_part(tmp_path / 'a.parquet', vectors(2), none=[None, None])
    with pytest.raises(
        SpecError, match="no column 'cover'; name one of its columns: id"
    ):
        PooledEmbeddings(path, 'cover')
    with pytest.raises(SpecError, match='all are missing'):
        PooledEmbeddings(path, 'none')


def test_moved_file_is_decoded_anew(tmp_path: Path) -> None:
    path = write_part(tmp_path / 'a.parquet', vectors(2))
    PooledEmbeddings(path)
    other = tmp_path / 'elsewhere'
    other.mkdir()
    shutil.move(path, other / 'a.parquet')
    np.testing.assert_array_equal(
        PooledEmbeddings(other / 'a.parquet').embeddings, vectors(2)
    )


def test_embeddings_of_a_store_are_mapped_from_the_cache(
    tmp_path: Path, upload: Upload, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    folder = tmp_path / 'parts'
    folder.mkdir()
    cover = ['x', 'y', 'x']
    for i, name in enumerate(('a', 'b')):
        write_part(folder / f'{name}.parquet', vectors(3, seed=i), cover=cover)
    local = PooledEmbeddings(folder, 'cover')
    url = upload(folder)
    for place in (url, str(url)):
        dataset = PooledEmbeddings(place, 'cover')
        assert np.array_equal(dataset.embeddings, local.embeddings)
        assert dataset.classes == local.classes
        assert_geodataframe_equal(dataset.table, local.table)
        assert pickle.loads(pickle.dumps(dataset))[4]['index'].tolist() == [4]
    for one in (url / 'b.parquet', f'{web}/parts/b.parquet'):
        assert np.array_equal(PooledEmbeddings(one).embeddings, vectors(3, seed=1))
    # The same size, other vectors.
    write_part(folder / 'b.parquet', vectors(3, seed=2), cover=cover)
    upload(folder / 'b.parquet', 'parts/b.parquet')
    for one in (url / 'b.parquet', f'{web}/parts/b.parquet'):
        assert np.array_equal(PooledEmbeddings(one).embeddings, vectors(3, seed=2))
    assert not list(folder.glob('.b*'))
    with pytest.raises(SourceError, match=f'{url}/c.parquet: no such file'):
        PooledEmbeddings(url / 'c.parquet')
