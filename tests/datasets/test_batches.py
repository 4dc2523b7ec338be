from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import shapely
import torch
from torch.utils.data import DataLoader, Dataset

from dynamicvis_geo.datasets import ChipDataset, collate
from dynamicvis_geo.datasets.batches import Batches
from dynamicvis_geo.errors import SourceError
from dynamicvis_geo.samplers import GridSampler
from tests.datasets.composites import batches_before

from ..datasets.rasters import Areas

#: Blocks of 30 rows, and their batches of three.
BLOCKS = [np.arange(7), np.arange(20, 22), np.arange(0), np.arange(29, 8, -5)]
BATCHES = [[0, 1, 2], [3, 4, 5], [6], [20, 21], [29, 24, 19], [14, 9]]


class Squares(Dataset[int]):
    def __getitem__(self, row: int) -> int:
        assert type(row) is int
        if row == 24:
            raise SourceError('no square of 24')
        return row**2


class Together(Squares):
    """Is asked for batches, as ChipDataset is."""

    def __getitem__(self, row: int) -> int:
        raise NotImplementedError

    def __getitems__(self, rows: Sequence[int]) -> list[int]:
        return [row**2 for row in rows]


def chip_dataset() -> ChipDataset:
    dataset = Areas([shapely.box(0, 0, 300, 10)])
    return ChipDataset([(dataset, GridSampler(dataset, 1))])


def load(dataset: Any, workers: int, batch_size: int = 3, **options: Any) -> Any:
    batches = Batches(dataset, BLOCKS, batch_size)
    return DataLoader(batches, batch_size=None, num_workers=workers, **options)


@pytest.mark.filterwarnings('ignore:This DataLoader will create')
@pytest.mark.parametrize(
    ('workers', 'method'),
    [(0, None), (2, 'fork'), (5, 'fork'), (8, 'fork')],
)
def test_batches_keep_their_order_and_within_blocks(workers: int, method: Any) -> None:
    loader = load(
        chip_dataset(), workers, collate_fn=collate, multiprocessing_context=method
    )
    assert len(loader) == len(BATCHES)
    assert loader.dataset.chips == sum(map(len, BATCHES))
    assert [batch['chip'][:, 0].tolist() for batch in loader] == BATCHES


@pytest.mark.parametrize('workers', [0, 2])
def test_any_map_style_dataset(workers: int) -> None:
    squares = [[row**2 for row in batch] for batch in BATCHES]
    assert list(load(Together(), workers, collate_fn=list)) == squares
    loader = load(Squares(), workers, collate_fn=list)
    assert batches_before(SourceError, loader) == squares[:4]


def test_every_epoch_of_workers_that_persist() -> None:
    loader = load(chip_dataset(), 2, collate_fn=collate, persistent_workers=True)
    iterator = iter(loader)
    next(iterator)
    for _ in range(2):
        assert [batch['chip'][:, 0].tolist() for batch in loader] == BATCHES


def test_page_locked_batches() -> None:
    loader = load(
        chip_dataset(), 2, collate_fn=collate, pin_memory=torch.cuda.is_available()
    )
    assert [batch['chip'][:, 0].tolist() for batch in loader] == BATCHES


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('blocks', [[], [np.arange(0)]])
def test_nothing_to_do(workers: int, blocks: Any) -> None:
    batches = Batches(chip_dataset(), blocks, 4)
    assert (len(batches), batches.chips) == (0, 0)
    assert list(DataLoader(batches, batch_size=None, num_workers=workers)) == []
