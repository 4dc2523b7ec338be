"""Batches whose chips lie in several UTM zones: parts that do not touch each other."""

import threading
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dynamicvis_geo.datasets import ChipDataset
from dynamicvis_geo.earthengine.limiter import CancelledError
from dynamicvis_geo.errors import EarthEngineError
from dynamicvis_geo.specs import BBox
from tests.earthengine_server import EarthEngineServer

from .composites import ahead, assert_right, grid, make

#: One place in each of three zones.
PLACES = [
    BBox(lon, lat, lon + 0.1, lat + 0.1)
    for lon, lat in ((10.2, 50.3), (15.2, 50.3), (21.2, 50.3))
]


def chips_of(server: EarthEngineServer, **options: Any) -> ChipDataset:
    """One chip in the first zone and two in each of the others."""
    limits = {'max_concurrency': 2, **options.pop('limits', {})}
    pairs = []
    for i, place in enumerate(PLACES):
        dataset = make(server, place, block_size=1, limits=limits)
        pairs.append((dataset, grid(dataset, 1, 2 if i else 1, 16)))
    return ChipDataset(pairs, **options)


def load(chips: ChipDataset, workers: int) -> DataLoader[Any]:
    # An order in which zones alternate within a batch.
    order = np.random.default_rng(0).permutation(len(chips))
    return ahead(chips, 4, workers, order)


def assert_chips(chips: ChipDataset, batches: list[Any], without: set[int]) -> None:
    rows = [
        row
        for batch in batches
        if 'chip' in batch
        for row in batch['chip'][:, 0].tolist()
    ]
    assert sorted(rows) == sorted(set(range(len(chips))) - without)
    images = torch.cat([batch['image'] for batch in batches if 'image' in batch])
    valid = torch.cat(
        [batch['valid_fraction'] for batch in batches if 'image' in batch]
    )
    wanted = [
        (dataset, where)
        for i, dataset in enumerate(chips.datasets)
        for where in grid(dataset, 1, 2 if i else 1, 16)
    ]
    for row, image, fraction in zip(rows, images, valid, strict=True):
        assert_right(*wanted[row], {'image': image, 'valid_fraction': fraction})


@pytest.mark.parametrize('workers', [0, 2])
def test_a_fault_at_any_position_is_nothing_to_the_other_zones(
    server: EarthEngineServer, workers: int
) -> None:
    chips = chips_of(server)
    for position in range(len(chips)):
        server.set(latency=0.01, script=[None] * position + [503])
        assert_chips(chips, list(load(chips, workers)), without=set())
        assert server.counts()['requests'] == len(chips) + 1


@pytest.mark.parametrize('workers', [0, 2])
def test_a_chip_that_fails_is_nothing_to_the_other_zones(
    server: EarthEngineServer, workers: int
) -> None:
    chips = chips_of(server, on_error='skip')
    for position in range(len(chips)):
        server.set(latency=0.01, script=[None] * position + [400])
        batches = list(load(chips, workers))
        failed = [*chain(*(batch.get('failures', []) for batch in batches))]
        assert [failure.reason for failure in failed] == ['EarthEngineError']
        assert_chips(chips, batches, without={failed[0].chip})


def test_parts_share_nothing_but_that_they_are_given_up_together(
    server: EarthEngineServer,
) -> None:
    limits = {'max_concurrency': 1}
    datasets = [make(server, place, limits=limits) for place in PLACES[:3]]
    cancelled = threading.Event()
    server.set(script=[400], latency=0.05)
    with pytest.raises(EarthEngineError, match='fail with 400'):
        datasets[0].submit(grid(datasets[0], 1, 1), 'raise', cancelled)()
    finish = datasets[1].submit(grid(datasets[1], 1, 3), 'raise', cancelled)
    for where, sample in zip(grid(datasets[1], 1, 3), finish(), strict=True):
        assert_right(datasets[1], where, sample)
    assert not cancelled.is_set()
    server.set(kinds=[503], rate=1)
    finish = datasets[2].submit(grid(datasets[2], 1, 3), 'raise', cancelled)
    cancelled.set()
    with pytest.raises(CancelledError):
        finish()
