"""Change between files of pooled embeddings."""

from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from dynamicvis_geo import read_provenance
from dynamicvis_geo.change import THRESHOLD, find_change, pairs
from dynamicvis_geo.errors import SpecError
from tests.datasets.embedding_parts import vectors, write_part
from tests.outputs import PROVENANCE

pytestmark = pytest.mark.once

COUNT = 40


def write(
    path: Path, embedding: Any, year: int = 2022, order: Any = None, **columns: Any
) -> Path:
    """Write embeddings of plots in a row, in any order."""
    rows = np.arange(len(embedding)) if order is None else np.asarray(order)
    if isinstance(embedding, np.ndarray):
        embedding = embedding[rows]
    end = pd.Timestamp(f'{year}-09-01', tz='UTC') - pd.Timedelta(microseconds=1)
    described: dict[str, Any] = {
        'point_id': [f'plot {i}' for i in rows],
        'crs': 'EPSG:32633',
        'minx': 500000.0 + 320 * rows,
        'miny': 5300000.0,
        'maxx': 500320.0 + 320 * rows,
        'maxy': 5300320.0,
        'start': pd.Timestamp(f'{year}-06-01', tz='UTC'),
        'end': end,
        'valid_fraction': np.float32(0.75),
    }
    return write_part(
        path,
        embedding,
        lon=13 + 0.02 * rows,
        ids=[f'chip-{i}_{year}' for i in rows],
        provenance=PROVENANCE,
        **(described | columns),
    )


def two_dates(folder: Path, count: int = COUNT) -> tuple[Path, Path, np.ndarray]:
    """Write two files, and give the cosine distances."""
    one, noise = vectors(count, 12), vectors(count, 12, seed=1)
    other = (one + 0.2 * noise).astype(np.float32)
    exact = np.asarray(one, np.float64), np.asarray(other, np.float64)
    lengths = np.linalg.norm(exact[0], axis=1) * np.linalg.norm(exact[1], axis=1)
    distance = 1 - (exact[0] * exact[1]).sum(axis=1) / lengths
    return (
        write(folder / 'one.parquet', one),
        write(folder / 'other.parquet', other, 2023),
        distance,
    )


@pytest.mark.parametrize('shift', [0.0, 1.0])
def test_planted_change_comes_first_and_the_rest_is_standard_normal(
    shift: float, tmp_path: Path
) -> None:
    random = np.random.default_rng(5)
    count, dimensions, changed = 800, 48, np.arange(0, 800, 40)
    covers = random.normal(size=(5, dimensions)) + 2
    of = random.integers(5, size=count)
    # A few places get another cover; all have noise, some more, and a season.
    later = of.copy()
    later[changed] = (of[changed] + 1 + random.integers(4, size=20)) % 5
    noise = 0.1 * np.exp(0.3 * random.normal(size=(count, 1)))
    one, other = (
        (covers[cover] + noise * random.normal(size=(count, dimensions)) + season)
        for cover, season in ((of, 0), (later, shift * random.normal(size=dimensions)))
    )
    change = find_change(
        write(tmp_path / 'one.parquet', one.astype(np.float32)),
        write(tmp_path / 'other.parquet', other.astype(np.float32), 2023),
    )
    assert {*change.order(20)} == {*changed}
    assert (change.change[changed] > THRESHOLD).all()
    rest = np.delete(change.change, changed)
    assert abs(np.median(rest)) < 0.1
    assert np.percentile(rest, [16, 84]) == pytest.approx([-1, 1], abs=0.25)
    assert (rest > THRESHOLD).mean() < 0.01


@pytest.mark.parametrize('piece', [2**24, 1000])
def test_places_are_matched_whatever_their_order(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ('_PIECE_BYTES', '_LARGE_PIECE_BYTES'):
        monkeypatch.setattr(pairs, name, piece)
    one, other, distance = two_dates(tmp_path)
    whole = find_change(one, other)
    np.testing.assert_allclose(whole.distance, distance, atol=1e-7)
    order = np.random.default_rng(0).permutation(COUNT)[: COUNT - 3]
    noise = vectors(COUNT, 12, seed=1)
    again = vectors(COUNT, 12) + np.float32(0.2) * noise
    some = write(tmp_path / 'some.parquet', again, 2023, order)
    change = find_change(one, some)
    assert change.unmatched == (3, 0)
    assert '3 chips of one.parquet are not in the other' in change.summary()
    kept = np.sort(order)
    assert change.table['point_id'].tolist() == [f'plot {i}' for i in kept]
    assert change.table['before_id'].tolist() == [f'chip-{i}_2022' for i in kept]
    assert change.table['id'].tolist() == [f'chip-{i}_2023' for i in kept]
    np.testing.assert_allclose(change.distance, distance[kept], atol=1e-6)


def test_one_file_of_several_dates_is_divided(tmp_path: Path) -> None:
    one, other, distance = two_dates(tmp_path)
    parts = tmp_path / 'years'
    parts.mkdir()
    for name, year, path in (('b', 2022, one), ('a', 2023, other)):
        path.rename(parts / f'{name}.parquet')
        assert year
    change = find_change(parts)
    np.testing.assert_allclose(change.distance, distance, atol=1e-7)
    assert repr(change).splitlines() == [
        'Change of years, from 2022-06-01/2022-09-01 to 2023-06-01/2023-09-01',
        f'{COUNT} chips, none stands out (change above 3.5)',
    ]
    write(parts / 'c.parquet', vectors(COUNT, 12, seed=3), 2024)
    with pytest.raises(SpecError, match='3 time windows: 2022-06-01/2022-09-01, 2023'):
        find_change(parts)
    chosen = find_change(
        parts, before='2022-01-01/2023-01-01', after='2023-06-01/2023-09-01'
    )
    np.testing.assert_array_equal(chosen.change, change.change)
    with pytest.raises(SpecError, match='several dates of the same place'):
        find_change(
            parts, before='2022-01-01/2023-01-01', after='2023-01-01/2025-01-01'
        )
    with pytest.raises(SpecError, match='is later than'):
        find_change(
            parts, before='2023-01-01/2024-01-01', after='2022-01-01/2023-01-01'
        )
    with pytest.raises(SpecError, match='the same time windows'):
        find_change(
            parts, before='2023-01-01/2024-01-01', after='2023-06-01/2023-09-01'
        )


def test_a_point_that_moved_is_no_match(tmp_path: Path) -> None:
    one, _, _ = two_dates(tmp_path)
    moved = 500000.0 + 320 * np.arange(COUNT) + 10 * (np.arange(COUNT) == 7)
    other = write(
        tmp_path / 'moved.parquet',
        vectors(COUNT, 12, seed=4),
        2023,
        minx=moved,
        maxx=moved + 320,
    )
    change = find_change(one, other)
    assert change.unmatched == (1, 1)
    assert 'plot 7' not in set(change.table['point_id'])


def test_chips_without_bounds_are_matched_by_their_points(tmp_path: Path) -> None:
    none = dict.fromkeys(('minx', 'miny', 'maxx', 'maxy'), np.nan)
    one, _, distance = two_dates(tmp_path)
    other = vectors(COUNT, 12) + np.float32(0.2) * vectors(COUNT, 12, seed=1)
    path = write(tmp_path / 'x.parquet', other, 2023, **none)
    np.testing.assert_allclose(find_change(one, path).distance, distance, atol=1e-6)


def test_the_cloudier_date_and_places_without_a_vector_are_told(tmp_path: Path) -> None:
    vector = vectors(COUNT, 12)
    rows = [None if i == 3 else row for i, row in enumerate(vector.tolist())]
    missing = pa.array(rows, pa.list_(pa.float32(), 12))
    valid = np.linspace(0, 1, COUNT)
    one = write(tmp_path / 'one.parquet', missing, valid_fraction=valid)
    later = vector + 0.05 * vectors(COUNT, 12, seed=1)
    later[[5, 30]] *= -1
    later[8] = 0
    other = write(tmp_path / 'other.parquet', later.astype(np.float32), 2023)
    change = find_change(one, other)
    assert np.flatnonzero(np.isnan(change.distance)).tolist() == [3, 8]
    assert np.flatnonzero(np.isnan(change.change)).tolist() == [3, 8]
    np.testing.assert_allclose(
        change.table['valid_fraction'], np.minimum(valid, 0.75), atol=1e-6
    )
    assert sorted(change.order(2)) == [5, 30]
    words = change.summary()
    assert '2 chips without a vector: no distance.' in words
    assert '2 stand out (change above 3.5).' in words
    assert '1 of these lies in chips with less than half of their pixels' in words
    assert 'not a test of significance' in words


def test_without_a_measure_of_what_is_usual_there_are_distances_only(
    tmp_path: Path,
) -> None:
    one, other, distance = two_dates(tmp_path, 9)
    few = find_change(one, other)
    assert np.isnan(few.change).all()
    assert 'Only 9 places have a vector' in few.summary()
    alone = [write(tmp_path / f'{y}', vectors(1, 12), y) for y in (2022, 2023)]
    assert 'Only 1 place has a vector' in find_change(*alone).summary()
    assert few.order(9).tolist() == np.argsort(-distance).tolist()
    vector = vectors(COUNT, 12)
    twice = [write(tmp_path / f'{year}.parquet', vector, year) for year in (2022, 2023)]
    same = find_change(*twice)
    assert (same.distance == 0).all()
    assert np.isnan(same.change).all()
    assert 'the distances of most places are equal' in same.summary().lower()
    assert repr(same).endswith('no scores')


def test_files_hold_all_places_and_say_how_they_were_made(tmp_path: Path) -> None:
    one, other, distance = two_dates(tmp_path)
    change = find_change(one, other)
    change.write(tmp_path / 'change.parquet')
    change.write(tmp_path / 'change.csv')
    for table in (
        gpd.read_parquet(tmp_path / 'change.parquet'),
        pd.read_csv(tmp_path / 'change.csv'),
    ):
        np.testing.assert_allclose(table['distance'], distance, atol=1e-7)
        np.testing.assert_allclose(table['change'], change.change)
        assert table['point_id'].tolist() == [f'plot {i}' for i in range(COUNT)]
    made = read_provenance(tmp_path / 'change.parquet')
    assert made['model'] == PROVENANCE['model']
    before = made['change']['before']
    assert (before['file'], before['windows']) == (
        'one.parquet',
        ['2022-06-01/2022-09-01'],
    )
    assert before['provenance']['model'] == PROVENANCE['model']
    assert 'MAD' in made['change']['method']


def test_later_dates_are_refused_as_the_earlier_ones_place_by_place(
    tmp_path: Path,
) -> None:
    outputs = []
    for first in (2022, 2021):
        start = pd.to_datetime(
            [f'{first + i % 2}-06-01' for i in range(COUNT)], utc=True
        )
        path, end = tmp_path / f'{first}.parquet', start + pd.Timedelta('90D')
        outputs.append(write(path, vectors(COUNT, 12, first), start=start, end=end))
    with pytest.raises(SpecError, match='give the earlier one first'):
        find_change(*outputs)
    assert len(find_change(*outputs[::-1]).chip) == COUNT


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    one, other, _ = two_dates(tmp_path)
    with pytest.raises(SpecError, match='is named twice'):
        find_change(one, tmp_path / 'one.parquet')
    with pytest.raises(SpecError, match='has one time window'):
        find_change(one)
    with pytest.raises(SpecError, match='is later than'):
        find_change(other, one)
    with pytest.raises(SpecError, match="before='2022' is no time window"):
        find_change(one, other, before='2022')
    with pytest.raises(SpecError, match=r"after='2030.* contains none of"):
        find_change(one, other, after='2030-01-01/2031-01-01')
    with pytest.raises(SpecError, match='before= and after= choose'):
        find_change(one, before='2022-01-01/2023-01-01')
    short = write(tmp_path / 'short.parquet', vectors(COUNT, 4), 2023)
    with pytest.raises(SpecError, match='features of 4 numbers'):
        find_change(one, short)
    names = [f'tree {i}' for i in range(COUNT)]
    away = write(tmp_path / 'a.parquet', vectors(COUNT, 12), 2023, point_id=names)
    with pytest.raises(SpecError, match='no place in common'):
        find_change(one, away)


@pytest.mark.parametrize('part', ['model', 'source'])
def test_other_settings_are_refused(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _, _ = two_dates(tmp_path)
    made = {
        'model': {'backbone': {**PROVENANCE['model']['backbone'], 'sha256': 'beef'}},
        'source': {'sources': [{'sensor': {'collection': 'LANDSAT'}}]},
    }
    changed = {**PROVENANCE, part: made[part]}
    monkeypatch.setattr(f'{__name__}.PROVENANCE', changed)
    other = write(tmp_path / 'other.parquet', vectors(COUNT, 12), 2023)
    with pytest.raises(SpecError, match=r'different settings(.|\n)*(beef|LANDSAT)'):
        find_change(one, other)


def test_repeated_places_are_compared_once_each(tmp_path: Path) -> None:
    one, other, distance = two_dates(tmp_path, 12)
    # Plot 3 is listed three times before, and twice after.
    for path, rows in ((one, [*range(12), 3, 3]), (other, [*range(12), 3])):
        year = 2022 if path == one else 2023
        table = np.stack(gpd.read_parquet(path)['embedding'])
        write(path, table, year, order=rows)
    found = find_change(one, other)
    np.testing.assert_allclose(found.distance, distance[[*range(12), 3]], atol=1e-6)
    assert found.unmatched == (1, 0)
