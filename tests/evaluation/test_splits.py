from collections import Counter

import numpy as np
import pytest
from pyproj import Geod

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.evaluation.splits import (
    block_numbers,
    column_split,
    random_split,
    spatial_block_split,
    stratified_split,
)

GEOD = Geod(ellps='WGS84')


def test_random_split_keeps_fractions_and_seed() -> None:
    splits = random_split(100, (0.7, 0.1, 0.2), seed=3)
    assert Counter(splits) == {'train': 70, 'val': 10, 'test': 20}
    np.testing.assert_array_equal(splits, random_split(100, (0.7, 0.1, 0.2), seed=3))
    assert (splits != random_split(100, (0.7, 0.1, 0.2), seed=4)).any()


def test_small_splits_are_not_empty() -> None:
    assert Counter(random_split(4, (0.98, 0.01, 0.01))) == {
        'train': 2,
        'val': 1,
        'test': 1,
    }
    assert set(random_split(10, (0.8, 0.0, 0.2))) == {'train', 'test'}


@pytest.mark.parametrize(
    'fractions', [(0.5, 0.5), (0.5, 0.2, 0.2), (0, 0.5, 0.5), (1.2, -0.2, 0), 'abc']
)
def test_wrong_fractions(fractions: tuple[float, ...]) -> None:
    with pytest.raises(SpecError, match='fractions='):
        random_split(10, fractions)


def test_too_few_samples() -> None:
    with pytest.raises(SpecError, match='2 samples, too few for 3 splits'):
        random_split(2)


def test_stratified_split_has_every_class_in_every_split() -> None:
    labels = np.array(['common'] * 90 + ['rare'] * 3 + ['other'] * 7)
    splits = stratified_split(labels)
    for name in ('train', 'val', 'test'):
        assert set(labels[splits == name]) == {'common', 'rare', 'other'}
    assert Counter(splits[:90]) == {'train': 54, 'val': 18, 'test': 18}


def test_stratified_split_keeps_fractions_over_many_small_classes() -> None:
    splits = stratified_split(np.repeat(np.arange(50), 8))
    assert Counter(splits) == {'train': 240, 'val': 80, 'test': 80}


def test_stratified_split_refuses() -> None:
    with pytest.raises(SpecError, match='2 samples of class b'):
        stratified_split(list('aaaaabb'))
    with pytest.raises(SpecError, match='needs two'):
        stratified_split(list('aaaaa'))
    with pytest.raises(SpecError, match='one class a sample'):
        stratified_split(np.zeros((5, 2)))


def test_blocks_are_whole_and_fractions_kept() -> None:
    rng = np.random.default_rng(0)
    lon, lat = rng.uniform(10, 11, 2000), rng.uniform(50, 51, 2000)
    splits = spatial_block_split(lon, lat, 5000.0, (0.5, 0.25, 0.25), seed=1)
    blocks = block_numbers(lon, lat, 5000.0)
    for block in np.unique(blocks):
        assert len(set(splits[blocks == block])) == 1
    counts = Counter(splits)
    assert abs(counts['train'] - 1000) < 20
    assert abs(counts['val'] - 500) < 20
    again = spatial_block_split(lon, lat, 5000.0, (0.5, 0.25, 0.25), seed=1)
    np.testing.assert_array_equal(splits, again)


@pytest.mark.parametrize(
    ('west', 'south'), [(0.0, 0.0), (12.0, 52.0), (-178.0, -35.0), (30.0, 78.0)]
)
def test_blocks_are_metres_on_the_ground(west: float, south: float) -> None:
    side = 10_000.0
    # Walk 200 km east and 200 km north in steps of 100 m, and see where blocks change.
    steps = np.arange(2000) * 100.0
    for azimuth in (90, 0):
        lon, lat, _ = GEOD.fwd(
            np.full_like(steps, west),
            np.full_like(steps, south),
            np.full_like(steps, azimuth),
            steps,
        )
        if azimuth == 90:
            lat = np.full_like(lat, south)
        changes = (np.diff(block_numbers(lon, lat, side)) != 0).sum()
        if azimuth == 90:
            assert changes == pytest.approx(20, abs=2)
        else:
            rows = np.unique(block_numbers(lon, lat, side)).size
            assert rows >= 19


def test_blocks_at_the_antimeridian_and_the_pole() -> None:
    lon = np.array([180.0, -180.0, 540.0, 179.0, -181.0])
    blocks = block_numbers(lon, np.full(5, 10.2), 20_000.0)
    assert blocks[0] == blocks[1] == blocks[2]
    assert blocks[3] == blocks[4] != blocks[0]
    # The cap around a pole has an area of about three blocks.
    cap = block_numbers(np.arange(-180, 180), np.full(360, -89.95), 20_000.0)
    assert np.unique(cap, return_counts=True)[1].tolist() == [120, 120, 120]


def test_every_split_gets_every_class_where_that_can_be() -> None:
    # One block in ten has the rare class.
    lon = np.repeat(np.arange(40) * 0.1, 10)
    labels = np.where(np.repeat(np.arange(40) % 10 == 0, 10), 'rare', 'common')
    for seed in range(5):
        splits = spatial_block_split(
            lon, np.zeros(400), 5000.0, seed=seed, labels=labels
        )
        for name in ('train', 'val', 'test'):
            assert 'rare' in labels[splits == name]


def test_spatial_split_refuses() -> None:
    with pytest.raises(SpecError, match='all 5 samples lie in 1 block, too few'):
        spatial_block_split(np.full(5, 10.0), np.full(5, 50.0), 10_000.0)
    with pytest.raises(SpecError, match='block_m=0'):
        spatial_block_split([1, 2, 3], [1, 2, 3], 0)
    with pytest.raises(SpecError, match='sample 1 lies at'):
        spatial_block_split([1, 2, 3], [1, 91, 3], 1000)
    with pytest.raises(SpecError, match='one place a sample'):
        spatial_block_split([1, 2], [1, 2, 3], 1000)


def test_column_split_knows_usual_spellings() -> None:
    values = ['Train', 'training', 'VALID', ' dev ', 'validation', 'Test', None, '']
    assert column_split(values).tolist() == [
        *('train', 'train', 'val', 'val', 'val', 'test', '', ''),
    ]
    with pytest.raises(SpecError, match=r"'fold 3', 4 are none of train, val, test"):
        column_split(['train', 'fold 3', 4])
    with pytest.raises(SpecError, match="no sample to the split 'train'"):
        column_split(['test', 'val'])
