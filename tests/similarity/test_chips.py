"""Searching files of pooled embeddings."""

from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from dynamicvis_geo import PooledEmbeddings, read_provenance
from dynamicvis_geo.errors import SourceError, SpecError
from dynamicvis_geo.outputs import open_output
from dynamicvis_geo.similarity import Similar, find_similar
from tests.datasets.embedding_parts import HALF, vectors, write_part
from tests.outputs import PROVENANCE, write_pooled

pytestmark = pytest.mark.once

COUNT = 30


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_part(
        tmp_path / 'e.parquet',
        vectors(COUNT),
        provenance=PROVENANCE,
        point_id=[f'plot {i}' for i in range(COUNT)],
        cover=['wood'] * COUNT,
    )


def cosines(examples: list[int], all_vectors: Any = None) -> np.ndarray:
    units = vectors(COUNT) if all_vectors is None else all_vectors
    units = units / np.linalg.norm(units, axis=1, keepdims=True)
    return (units @ units[examples].T).mean(axis=1)


def rows(found: Similar) -> list[int]:
    return found.table['row'].tolist()


def best(values: np.ndarray, without: list[int], k: int) -> list[int]:
    values = values.copy()
    values[without] = -9
    return np.argsort(-values)[:k].tolist()


def test_examples_are_named_in_many_ways(path: Path) -> None:
    expected = best(cosines([4]), [4], 6)
    lon = 13 + 2 * HALF * 4
    for like in (
        'chip-4',
        'plot 4',
        4,
        '4',
        (lon, 48.0),
        f'{lon + 0.7 * HALF},{48 - 0.9 * HALF}',
        (lon - 360, 48.0),
    ):
        assert rows(find_similar(path, like, k=6)) == expected
    assert rows(find_similar(path, vectors(COUNT)[4], k=7)) == [4, *expected]
    assert rows(find_similar(path, 4, k=7, keep_examples=True)) == [4, *expected]
    assert len(find_similar(path, 4, k=500).table) == COUNT - 1


def test_several_examples_and_counter_examples_are_means_of_cosines(path: Path) -> None:
    # Named twice, an example counts once.
    found = find_similar(path, [4, 'chip-7', 4, 9], [11, (13.0, 48.0)], k=5)
    values = cosines([4, 7, 9]) - cosines([11, 0])
    assert rows(found) == best(values, [4, 7, 9, 11, 0], 5)
    np.testing.assert_allclose(
        found.table['similarity'], values[rows(found)], atol=1e-6
    )


def test_the_table_tells_all_that_the_file_does(path: Path) -> None:
    dataset = PooledEmbeddings(path)
    table = dataset.similar(['chip-4'], k=3)
    pd.testing.assert_frame_equal(
        table, find_similar(path, 'chip-4', k=3).table, check_like=True
    )
    assert table.columns[:3].tolist() == ['similarity', 'file', 'row']
    there = dataset.table.iloc[table['row']]
    assert table['id'].tolist() == there['id'].tolist()
    assert table['cover'].tolist() == ['wood'] * 3
    assert table['lon'].tolist() == there['centre_lon'].tolist()
    assert table.geometry.tolist() == there.geometry.tolist()
    assert table.crs == 'EPSG:4326'


def test_several_files_are_searched_as_one(path: Path, tmp_path: Path) -> None:
    other = write_part(
        tmp_path / 'next.parquet',
        np.concatenate([vectors(5, seed=1), vectors(COUNT)[:2]]),
        lat=np.full(7, 50.0),
        ids=[f'next-{i}' for i in range(7)],
        provenance=PROVENANCE,
    )
    both = np.concatenate([vectors(COUNT), vectors(5, seed=1), vectors(COUNT)[:2]])
    found = find_similar([path, other], ['next-0', COUNT + 1], k=8)
    assert rows(found) == [
        row if row < COUNT else row - COUNT
        for row in best(cosines([COUNT, COUNT + 1], both), [COUNT, COUNT + 1], 8)
    ]
    # The same vectors in both: the first file comes first.
    twins = find_similar([other, path], vectors(COUNT)[0], k=2).table
    assert twins['file'].tolist() == [str(other), str(path)]
    assert twins['row'].tolist() == [5, 0]


def test_all_dates_of_an_id_and_of_a_place_are_examples(tmp_path: Path) -> None:
    path = write_part(
        tmp_path / 'years.parquet',
        vectors(6),
        lon=[13, 13, 14, 14, 15, 15],
        ids=['a', 'a', 'b', 'b', 'c', 'c'],
    )
    for like in ('b', (14.0, 48.0)):
        found = find_similar(path, like)
        assert sorted(rows(found)) == [0, 1, 4, 5]
        assert rows(found)[0] == best(cosines([2, 3], vectors(6)), [2, 3], 1)[0]


@pytest.mark.parametrize('dtype', ['float16', 'int8'])
def test_short_numbers_are_what_they_stand_for(dtype: str, tmp_path: Path) -> None:
    exact, scale = vectors(COUNT, 16), {}
    stored = exact.astype(dtype)
    if dtype == 'int8':
        scales = np.abs(exact).max(axis=1) / 127
        stored = np.round(exact / scales[:, None]).astype(np.int8)
        scale = {'scale': scales.astype(np.float32)}
    path = write_part(tmp_path / 'e.parquet', stored, **scale)
    found = find_similar(path, 3, k=4)
    read = open_output(path).embeddings()
    assert rows(found) == best(cosines([3], read), [3], 4)


def test_what_was_found_is_an_example_again(path: Path, tmp_path: Path) -> None:
    first = find_similar(path, 4, k=5)
    first.write(tmp_path / 'found.parquet')
    first.write(tmp_path / 'found.csv')
    np.testing.assert_array_equal(
        open_output(tmp_path / 'found.parquet').embeddings(),
        vectors(COUNT)[rows(first)],
    )
    assert read_provenance(tmp_path / 'found.parquet')['model'] == PROVENANCE['model']
    expected = best(cosines(rows(first)), rows(first), 6)
    for name in ('found.parquet', 'found.csv'):
        assert rows(find_similar(path, tmp_path / name, k=6)) == expected
        assert rows(find_similar(path, str(tmp_path / name), k=6)) == expected
    # What was found can itself be searched.
    again = find_similar(tmp_path / 'found.parquet', 0).table
    assert sorted(again['row']) == [1, 2, 3, 4]


def test_points_beyond_all_footprints_are_counted(path: Path, tmp_path: Path) -> None:
    points = gpd.GeoDataFrame(
        geometry=gpd.points_from_xy([13, 13 + 4 * HALF, 20], [48, 48, 0]),
        crs='EPSG:4326',
    )
    points.to_crs('EPSG:3035').to_file(tmp_path / 'points.gpkg')
    with pytest.warns(UserWarning, match='1 of 3 points lie in no footprint'):
        found = find_similar(path, tmp_path / 'points.gpkg', k=3)
    assert rows(found) == best(cosines([0, 2]), [0, 2], 3)
    points.to_crs(3035).buffer(1).to_file(tmp_path / 'areas.gpkg')
    with pytest.raises(SourceError, match='holds Polygon, not points'):
        find_similar(path, tmp_path / 'areas.gpkg')
    points[2:].to_file(tmp_path / 'away.gpkg')
    with pytest.raises(SpecError, match='1 of 1 points lie in no footprint'):
        find_similar(path, tmp_path / 'away.gpkg')


def test_features_made_otherwise_are_refused(path: Path, tmp_path: Path) -> None:
    weights = {**PROVENANCE['model']['backbone'], 'sha256': 'beef' * 16}
    other = tmp_path / 'other.parquet'
    write_pooled(other, provenance={**PROVENANCE, 'model': {'backbone': weights}})
    message = r'different settings(.|\n)*setting +e.parquet +other.parquet(.|\n)*beef'
    with pytest.raises(SpecError, match=message):
        find_similar([path, other], 0)
    with pytest.raises(SpecError, match=message):
        find_similar(path, other)
    short = write_part(tmp_path / 'short.parquet', vectors(3, 4), provenance=PROVENANCE)
    with pytest.raises(SpecError, match='of 4 numbers'):
        find_similar([path, short], 0)
    with pytest.raises(SpecError, match='of 4 numbers'):
        find_similar(path, short)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'like': 'nothing'}, "like='nothing' is no chip"),
        ({'like': 30}, 'none of the 30 chips'),
        ({'like': -1}, 'none of the 30 chips'),
        ({'like': (48.0, 13.0)}, "like='48,13': no chip of .* contains this place"),
        ({'like': np.zeros(6)}, 'like=.* zero or not finite'),
        ({'like': np.ones(5)}, 'an example of 5 numbers'),
        ({'like': []}, 'like= names no example'),
        ({'like': 3, 'unlike': 'chip-3'}, 'same direction'),
        ({'like': 3, 'k': 0}, 'k=0'),
        ({'like': list(range(30))}, 'names all there is'),
    ],
)
def test_searches_without_an_answer_are_refused(
    path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        find_similar(path, **arguments)


def test_a_row_without_an_embedding_is_told(tmp_path: Path) -> None:
    missing = pa.array([None, [1.0, 2.0]], pa.list_(pa.float32(), 2))
    path = write_part(tmp_path / 'e.parquet', missing)
    with pytest.raises(SourceError, match='row 1 has no embedding'):
        find_similar(path, 1)
