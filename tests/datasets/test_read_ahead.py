import os
import signal
import subprocess
import threading
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import shapely
import torch
from torch.utils.data import DataLoader, Subset

from dynamicvis_geo.datasets import ChipDataset, collate
from dynamicvis_geo.datasets.read_ahead import MOST_PIXELS, ReadAhead, chips_ahead
from dynamicvis_geo.errors import NoImageryError, PermissionDeniedError
from dynamicvis_geo.samplers import GridSampler
from tests.earthengine_server import EarthEngineServer
from tests.processes import HANG, Start

from .composites import GAP, ROI, assert_right, batches_before, grid, make
from .rasters import Areas

FAULTS = [429, 500, 503, 'reset', 'close', 'truncated', 'short', 'html']


def chips_of(server: EarthEngineServer, count: int = 60, **options: Any) -> ChipDataset:
    options.setdefault('limits', {'max_concurrency': 8})
    dataset = make(server, block_size=1, **options)
    return ChipDataset([(dataset, grid(dataset, count // 10, 10, 16))])


def rows_of(batches: Any) -> list[list[int]]:
    return [batch['chip'][:, 0].tolist() for batch in batches]


# Which batches are begun, and when.


class Batches:
    """Notes what is begun and given up; a batch is the list of its rows."""

    def __init__(self, error: Exception | None = None, bad: int = -1) -> None:
        self.begun: list[list[int]] = []
        self.events: list[threading.Event] = []
        self.error, self.bad = error, bad

    def __call__(
        self, rows: np.ndarray[Any, Any], cancelled: threading.Event
    ) -> Callable[[], list[int]]:
        self.begun.append(rows.tolist())
        self.events.append(cancelled)

        def finish() -> list[int]:
            if self.error is not None and self.bad in rows:
                raise self.error
            return rows.tolist()  # type: ignore[no-any-return]

        return finish


def reader(
    batches: Batches, count: int = 20, worker: int = 0, workers: int = 2, ahead: int = 4
) -> ReadAhead[list[int]]:
    expected = torch.arange(100, 100 + count)
    return ReadAhead(expected, worker, workers, batches, lambda row: ahead)


def take(reader: ReadAhead[list[int]], *rows: int) -> None:
    assert reader.take(np.array(rows)) == list(rows)


def test_a_worker_begins_its_own_batches_before_they_are_asked_for() -> None:
    begun = Batches()
    second = reader(begun, worker=1)
    take(second, 102, 103)
    assert begun.begun == [[102, 103], [106, 107], [110, 111]]
    take(second, 106, 107)
    assert begun.begun[3:] == [[114, 115]]
    for first in (110, 114, 118):
        take(second, first, first + 1)
    assert begun.begun[4:] == [[118, 119]]
    # The next epoch of workers that persist.
    take(second, 102, 103)
    assert begun.begun[5] == [102, 103]


def test_the_last_batch_may_be_short() -> None:
    begun = Batches()
    one = reader(begun, count=10, workers=1)
    for rows in ((100, 101, 102, 103), (104, 105, 106, 107), (108, 109)):
        take(one, *rows)
    assert begun.begun == [[*range(100, 104)], [*range(104, 108)], [108, 109]]


def test_one_batch_at_least_is_read_ahead_unless_it_is_too_large() -> None:
    for ahead, expected in ((1, 2), (0, 1)):
        begun = Batches()
        take(reader(begun, workers=1, ahead=ahead), 100, 101, 102)
        assert len(begun.begun) == expected
    assert chips_ahead([], 100) == 0
    source = Areas([shapely.box(0, 0, 1, 1)])
    source.concurrency = 16  # type: ignore[attr-defined]
    assert chips_ahead([source], 512 * 512) == 32
    assert chips_ahead([source], MOST_PIXELS // 3) == 3


def test_other_rows_than_expected_cost_nothing() -> None:
    begun = Batches()
    one = reader(begun)
    rng = np.random.default_rng(0)
    for rows in rng.permutation(np.arange(100, 120)).reshape(-1, 2)[:8].tolist():
        take(one, *rows)
    assert len(begun.begun) == 8
    begun = Batches()
    one = reader(begun)
    take(one, 100, 101)
    take(one, 116, 117)
    assert begun.begun == [[100, 101], [104, 105], [108, 109], [116, 117]]
    assert [event.is_set() for event in begun.events] == [False, True, True, False]


def test_an_error_is_raised_where_its_batch_is_asked_for() -> None:
    begun = Batches(NoImageryError('nothing'), bad=104)
    one = reader(begun)
    take(one, 100, 101)
    with pytest.raises(NoImageryError):
        one.take(np.array([104, 105]))
    take(one, 108, 109)
    assert not any(event.is_set() for event in begun.events)


# With Earth Engine and a DataLoader.


@pytest.mark.parametrize(
    ('workers', 'method', 'batch_size'),
    [(0, None, 7), (1, 'fork', 7), (2, 'fork', 1), (2, 'fork', 32), (2, 'spawn', 7)],
)
def test_samples_and_their_order_are_the_same(
    server: EarthEngineServer, workers: int, method: Any, batch_size: int
) -> None:
    chips = chips_of(server)
    # The parent makes requests first: its connections are inherited.
    assert chips[3]['chip'].tolist() == [3]  # type: ignore[index, union-attr]
    order = [*range(30, 60), *range(30)]
    chips.expect(order)
    before = chips.retries
    server.set(kinds=FAULTS, rate=0.2, seed=workers)
    loader = DataLoader(
        chips,
        batch_size,
        sampler=order,
        num_workers=workers,
        collate_fn=collate,
        multiprocessing_context=method,
    )
    batches = list(loader)
    assert [*chain(*rows_of(batches))] == order
    dataset: Any = chips.datasets[0]
    wanted = grid(dataset, 6, 10, 16)
    for batch in batches:
        for i, row in enumerate(batch['chip'][:, 0].tolist()):
            sample = {key: batch[key][i] for key in ('image', 'valid_fraction')}
            assert_right(dataset, wanted[row], sample)
    counts = server.counts()
    assert counts['served'] == 60
    assert counts['peak'] <= 8
    assert chips.retries - before == counts['requests'] - 60 > 0


@pytest.mark.parametrize('kind', ['shuffled', 'part', 'single', 'epochs', 'dropped'])
def test_wrong_expectations_give_the_right_samples(
    server: EarthEngineServer, kind: str
) -> None:
    chips = chips_of(server)
    chips.expect(range(60))
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {'batch_size': 5, 'generator': generator}
    data: Any = Subset(chips, range(1, 60, 2)) if kind == 'part' else chips
    if kind in ('shuffled', 'single'):
        options['shuffle'] = True
    if kind == 'single':
        options['batch_size'] = 1
    if kind == 'epochs':
        options['persistent_workers'] = True
    if kind == 'dropped':
        options |= {'batch_size': 9, 'drop_last': True}
    loader = DataLoader(data, num_workers=2, collate_fn=collate, **options)
    epochs = [list(loader) for _ in range(2 if kind == 'epochs' else 1)]
    wanted = grid(chips.datasets[0], 6, 10, 16)
    for batches in epochs:
        rows = [*chain(*rows_of(batches))]
        assert sorted(rows) == {
            'part': [*range(1, 60, 2)],
            'dropped': [*range(54)],
        }.get(kind, [*range(60)])
        images = torch.cat([batch['image'] for batch in batches])
        valid = torch.cat([batch['valid_fraction'] for batch in batches])
        for row, image, fraction in zip(rows, images, valid, strict=True):
            sample = {'image': image, 'valid_fraction': fraction}
            assert_right(chips.datasets[0], wanted[row], sample)
    asked = sum(len(rows) for batches in epochs for rows in rows_of(batches))
    assert server.counts()['requests'] - asked <= 6


def test_requests_are_in_flight_across_batches(server: EarthEngineServer) -> None:
    peaks = []
    for expect in (False, True):
        chips = chips_of(server, limits={'max_concurrency': 12})
        if expect:
            chips.expect(range(60))
        server.set(latency=0.05)
        loader = DataLoader(chips, 2, num_workers=2, collate_fn=collate)
        assert [*chain(*rows_of(loader))] == [*range(60)]
        peaks.append(server.counts()['peak'])
    # Two workers with batches of two, and with their shares of six.
    assert peaks == [4, 12]


def test_errors_of_the_background_end_the_run_in_turn(
    server: EarthEngineServer,
) -> None:
    roi = shapely.union_all([area.geometry for area in (ROI, GAP)])
    dataset = make(server, roi, block_size=1)
    good, bad = grid(make(server), 4, 4, 16), grid(make(server, GAP), 1, 1, 16)
    chips = ChipDataset([(dataset, [*good, *bad])])
    chips.expect(range(17))
    loader = DataLoader(chips, 4, num_workers=2, collate_fn=collate)
    batches = batches_before(NoImageryError, loader)
    assert rows_of(batches) == [[*range(i, i + 4)] for i in (0, 4, 8, 12)]


def test_errors_of_the_run_end_it(server: EarthEngineServer) -> None:
    chips = chips_of(server)
    chips.on_error = 'skip'
    chips.expect(range(60))
    server.set(kinds=[403], rate=1)
    loader = DataLoader(chips, 4, num_workers=2, collate_fn=collate)
    assert batches_before(PermissionDeniedError, loader) == []


def test_files_are_read_when_they_are_asked_for(server: EarthEngineServer) -> None:
    # A zone of Earth Engine beside one of another dataset, in one batch.
    far = make(server, block_size=1)
    near = Areas([shapely.box(0, 0, 80, 10)], res=1.0)
    chips = ChipDataset([(far, grid(far, 1, 6, 16)), (near, GridSampler(near, 10))])
    chips.expect(range(14))
    found = [
        sample
        for batch in DataLoader(chips, 4, num_workers=2, collate_fn=list)
        for sample in batch
    ]
    assert [sample['chip'].item() for sample in found] == [*range(14)]
    for where, sample in zip(grid(far, 1, 6, 16), found[:6], strict=True):
        assert_right(far, where, sample)
    assert [sample['image'][0].item() for sample in found[6:]] == [*range(0, 80, 10)]


def test_expectations_must_be_rows(server: EarthEngineServer) -> None:
    with pytest.raises(IndexError, match='chip 60 of 60'):
        chips_of(server).expect(np.arange(61))


SLOW = """
import sys
sys.path.insert(0, '.')
from torch.utils.data import DataLoader
from dynamicvis_geo.datasets import ChipDataset, EarthEngineDataset, collate
from dynamicvis_geo.earthengine import EarthEngineClient
from tests.datasets.composites import ROI, WINDOW, SENSOR, grid
client = EarthEngineClient('p', sys.argv[1], max_concurrency=4)
dataset = EarthEngineDataset(ROI, WINDOW, SENSOR, client=client, block_size=1)
chips = ChipDataset([(dataset, grid(dataset, 10, 10, 16))])
chips.expect(range(100))
workers = int(sys.argv[2])
for batch in DataLoader(chips, 4, num_workers=workers, collate_fn=collate):
    print('batch', flush=True)
"""


@pytest.mark.parametrize('workers', [0, 2])
def test_an_interrupt_ends_requests_that_hang(
    start: Start, server: EarthEngineServer, workers: int
) -> None:
    server.set(script=[None] * 40, kinds=['hang'], rate=1, hang_s=2 * HANG)
    process = start('-c', SLOW, server.url, workers, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == 'batch\n'
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(HANG) != 0
