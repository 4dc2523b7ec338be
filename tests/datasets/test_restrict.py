import pickle
from collections.abc import Iterable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import shapely
from torch.utils.data import DataLoader

from dynamicvis_geo.datasets import ChipDataset, collate
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.samplers import GridSampler

from .rasters import Areas


class Watched(Areas):
    """Counts what it is asked for."""

    asked = 0

    def __getitem__(self, query: Any) -> dict[str, Any]:
        self.asked += 1
        return super().__getitem__(query)


@pytest.fixture
def chips() -> ChipDataset:
    dataset = Watched([shapely.box(0, 0, 1280 * 4, 1280 * 3)])
    return ChipDataset([(dataset, GridSampler(dataset, 128))])


def test_everything_is_wanted_at_first(chips: ChipDataset) -> None:
    assert chips.remaining.dtype == np.int64
    assert chips.remaining.tolist() == list(range(12))


@pytest.mark.parametrize('kind', [list, set, iter, pa.array, pa.chunked_array])
def test_what_is_set_aside_keeps_its_row_and_is_not_fetched(
    chips: ChipDataset, kind: Any
) -> None:
    ids = chips.chips['chip_id'].tolist()
    done = [*ids[2:5], 'EPSG32618_of_another_run']
    chips.restrict(kind([done] if kind is pa.chunked_array else done))
    assert chips.remaining.tolist() == [0, 1, *range(5, 12)]
    assert len(chips) == 12
    assert chips.chips['chip_id'].tolist() == ids
    samples = chips.__getitems__([1, 2, 3, 4, 5])
    assert [sample is None for sample in samples] == [False, True, True, True, False]
    dataset: Any = chips.datasets[0]
    assert dataset.asked == 2
    assert collate(samples)['chip'].tolist() == [[1], [5]]
    assert chips[-1] is not None
    assert chips[3] is None


def test_only_and_leave_out_and_neither(chips: ChipDataset) -> None:
    ids = chips.chips['chip_id'].tolist()
    chips.restrict(only=[ids[7], ids[1], 'unknown'])
    assert chips.remaining.tolist() == [1, 7]
    chips.restrict([ids[1]], only=ids[:3])
    assert chips.remaining.tolist() == [0, 2]
    chips.restrict(only=[])
    assert chips.remaining.tolist() == []
    assert collate(chips.__getitems__(range(12))) == {}
    chips.restrict()
    assert len(chips.remaining) == 12


def test_workers_see_it(chips: ChipDataset) -> None:
    chips.restrict(only=chips.chips['chip_id'][[3, 9]])
    # How a dataset travels to workers that are started anew.
    sent: ChipDataset = pickle.loads(ForkingPickler.dumps(chips))
    assert sent.remaining.tolist() == [3, 9]
    loader = DataLoader(
        chips,
        batch_size=4,
        num_workers=1,
        collate_fn=collate,
        multiprocessing_context='fork',
    )
    seen = [row for batch in loader if batch for (row,) in batch['chip'].tolist()]
    assert seen == [3, 9]


@pytest.mark.parametrize('wrong', ['one-id', [1, 2], 5])
def test_what_are_no_ids(chips: ChipDataset, wrong: Any) -> None:
    with pytest.raises(SpecError, match='leave_out'):
        chips.restrict(wrong)
    with pytest.raises(SpecError, match='only'):
        chips.restrict(only=wrong)


def test_more_ids_than_are_compared_at_a_time(
    chips: ChipDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('dynamicvis_geo.datasets.chips.MANY', 5)
    ids = chips.chips['chip_id'].tolist()
    names: Iterable[str] = [f'x{i}' for i in range(7)] + ids[3:11]
    chips.restrict(names)
    assert chips.remaining.tolist() == [0, 1, 2, 11]
