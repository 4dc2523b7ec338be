"""Places of chips, widths of blocks, and ground that splits share."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dynamicvis_geo import EmbeddingDataModule
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.evaluation import evaluate
from dynamicvis_geo.evaluation.ground import (
    choose_block,
    number_places,
    shared_ground,
    without_shared_ground,
)
from dynamicvis_geo.evaluation.splits import block_numbers
from tests.datasets.embedding_parts import footprint, vectors, write_part

pytestmark = pytest.mark.once

SPLITS = ('train', 'val', 'test')


def test_places_are_points_or_centres() -> None:
    chips = pd.DataFrame(
        {
            'point_id': ['a', None, 'a', None, 'b', 'c', None],
            'centre_lon': [1.0, 2, 1.1, 2, 5, 5 + 1e-9, np.nan],
            'centre_lat': [0.0, 0, 0, 1, 5, 5, np.nan],
        }
    )
    # Rows 0 and 2 are one point, 4 and 5 one centre; unknown ones are alone.
    assert number_places(chips).tolist() == [0, 1, 0, 2, 3, 3, 4]
    assert number_places(chips[[]]).tolist() == list(range(7))


def test_blocks_are_as_wide_as_enough_of_them_allow() -> None:
    rng = np.random.default_rng(0)
    lon, lat = rng.uniform(10, 12, 2000), rng.uniform(0, 2, 2000)
    side = choose_block(lon, lat)
    assert side == 20_000
    assert len(np.unique(block_numbers(lon, lat, side))) >= 100
    assert len(np.unique(block_numbers(lon, lat, 50_000.0))) < 100
    # Wide chips need wide blocks, though there are few of them then.
    assert choose_block(lon, lat, 20_000.0) == 50_000
    # Half as many blocks as places is enough, and none is wider than 100 km.
    assert choose_block([0, 1.5, 3, 4.5], [0.0] * 4) == 100_000
    assert choose_block(np.arange(8) * 1e-3, np.zeros(8)) == 200
    assert choose_block(np.zeros(8), np.zeros(8)) == 10


def test_shared_ground_is_area_in_common_across_splits() -> None:
    # Side by side, half over, elsewhere, and on both sides of the antimeridian.
    places = [(0.0, 0), (0.02, 0), (0.03, 0), (9, 9), (180, 5), (-179.99, 5)]
    shapes = np.array([footprint(*place) for place in places], dtype=object)
    splits = np.array(['train', 'val', 'test', 'test', 'train', 'test'])
    pairs = shared_ground(shapes, splits)
    assert sorted(map(tuple, pairs)) == [(1, 2), (2, 1), (4, 5), (5, 4)]
    apart = without_shared_ground(splits, pairs)
    assert apart.tolist() == ['train', '', 'test', 'test', '', 'test']
    same = np.full(6, 'train')
    assert not len(shared_ground(shapes, same))
    assert not len(
        shared_ground(shapes, np.array(['train', '', '', 'val', '', 'test']))
    )


@pytest.fixture
def dated(tmp_path: Path) -> Path:
    """Sixty places of two dates each; chips half over their neighbours."""
    place = np.arange(120) % 60
    return write_part(
        tmp_path / 'dated.parquet',
        vectors(120),
        lon=13 + 0.01 * place,
        lat=np.full(120, 48.0),
        cover=np.where(place % 2 == 0, 'water', 'wood'),
        fold=np.where(place < 40, 'train', np.where(place < 50, 'val', 'test')),
        year=np.where(np.arange(120) < 60, 'train', 'test'),
    )


@pytest.mark.parametrize('split', ['auto', 'spatial', 'random', 'stratified', 'fold'])
def test_dates_of_a_place_stay_together_in_any_split(dated: Path, split: str) -> None:
    data = EmbeddingDataModule(dated, 'cover', split=split)
    places = {name: set(data.rows(name) % 60) for name in SPLITS}
    assert all(places.values())
    assert not places['train'] & places['val']
    assert not (places['train'] | places['val']) & places['test']
    groups = [set(data.groups(name)) for name in SPLITS]
    assert not groups[0] & groups[1]
    assert not (groups[0] | groups[1]) & groups[2]
    if split in ('auto', 'spatial'):
        assert data.grouped_by == 'block'
    else:
        assert data.grouped_by == 'place'
        assert len(groups[2]) == len(places['test'])
    results = evaluate(data, resamples=0)
    assert results.n_groups == len(groups[2])
    assert set(data.notes) <= set(results.notes)


def test_a_column_that_tears_a_place_apart_is_refused(dated: Path) -> None:
    data = EmbeddingDataModule(dated, 'cover', split='year')
    with pytest.raises(SpecError, match=r"'year' divides 60 .*chip-0: test, train"):
        data.setup()


def test_splits_of_blocks_share_no_ground_and_others_say_how_much(dated: Path) -> None:
    data = EmbeddingDataModule(dated, 'cover', block_m=5000)
    division = data.division
    assert (division['kind'], division['block_m']) == ('spatial', 5000)
    lon = {name: 13 + 0.01 * (data.rows(name) % 60) for name in SPLITS}
    for one, two in (('train', 'test'), ('train', 'val'), ('val', 'test')):
        assert np.abs(lon[one][:, None] - lon[two]).min() > 0.0199
    kept = sum(len(data.rows(name)) for name in SPLITS)
    assert division['left_out'] == 120 - kept > 0
    assert data.notes == (
        f'{120 - kept} of 120 chips were left out, which share ground with chips of '
        'another split',
    )
    random = EmbeddingDataModule(dated, 'cover', split='random')
    assert sum(len(random.rows(name)) for name in SPLITS) == 120
    tested, others = (
        np.concatenate([random.rows(name) for name in names]) % 60
        for names in (('test',), ('train', 'val'))
    )
    near = (np.abs(tested[:, None] - others) == 1).any(1).sum()
    neighbours, note = random.notes
    assert '--split spatial' in neighbours
    assert note.startswith(f'{near} of {len(tested)} chips to test share ground')
    narrow = EmbeddingDataModule(dated, 'cover', block_m=500, fractions=(0.1, 0.1, 0.8))
    with pytest.raises(SpecError, match='use wider blocks'):
        narrow.setup()


def test_blocks_of_hardly_more_than_a_place_are_said(tmp_path: Path) -> None:
    # Sixty places of two dates each; chips do not overlap.
    place = np.arange(120) % 60
    path = write_part(
        tmp_path / 'apart.parquet',
        vectors(120),
        lon=13 + 0.05 * place,
        lat=np.full(120, 48.0),
        cover=np.where(place % 2 == 0, 'water', 'wood'),
    )
    data = EmbeddingDataModule(path, 'cover', block_m=2000)
    places = len(set(data.rows('test') % 60))
    blocks = len(set(data.groups('test')))
    assert places == blocks
    assert any(
        note.startswith(f'the test split has {places} places in {blocks} blocks')
        for note in data.notes
    )
    for options in ({'block_m': 20_000}, {'split': 'random'}):
        fine = EmbeddingDataModule(path, 'cover', **options)
        assert not any('single places' in note for note in fine.notes)


def test_chosen_blocks_are_told(dated: Path) -> None:
    division = EmbeddingDataModule(dated, 'cover').division
    # Twenty blocks in 60 x 740 m, of less than four chips of 2.2 km.
    assert division['block_m'] == 2000
    given = EmbeddingDataModule(dated, 'cover', block_m=3000).division
    assert given['block_m'] == 3000
    random = EmbeddingDataModule(dated, 'cover', split='random').division
    assert random['block_m'] is None
