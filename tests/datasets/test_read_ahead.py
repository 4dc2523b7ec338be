import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
import shapely
from torch.utils.data import DataLoader

from dynamicvis_geo.datasets import ChipDataset, collate
from dynamicvis_geo.datasets.read_ahead import MOST_PIXELS, chips_ahead, read_ahead
from dynamicvis_geo.earthengine.limiter import CancelledError
from dynamicvis_geo.errors import NoImageryError, PermissionDeniedError
from dynamicvis_geo.samplers import GridSampler
from tests.earthengine_server import EarthEngineServer
from tests.processes import HANG, Start

from .composites import GAP, ROI, ahead, assert_right, batches_before, grid, make
from .rasters import Areas

pytestmark = pytest.mark.once

FAULTS = [429, 500, 503, 'reset', 'close', 'truncated', 'short', 'html']


def chips_of(server: EarthEngineServer, count: int = 60, **options: Any) -> ChipDataset:
    options.setdefault('limits', {'max_concurrency': 8})
    dataset = make(server, block_size=1, **options)
    return ChipDataset([(dataset, grid(dataset, count // 10, 10, 16))])


def rows_of(batches: Any) -> list[list[int]]:
    return [batch['chip'][:, 0].tolist() for batch in batches]


# Which batches are begun, and when.


class Begun:
    """Notes what is begun and given up; a batch is the list of its rows.

    Rows from *slow* on are still on their way when they are given up.
    """

    def __init__(self, bad: int = -1, slow: int = 1000) -> None:
        self.rows: list[list[int]] = []
        self.cancelled: set[threading.Event] = set()
        self.bad, self.slow = bad, slow

    def __call__(
        self, rows: np.ndarray[Any, Any], cancelled: threading.Event
    ) -> Callable[[], list[int]]:
        self.rows.append(rows.tolist())
        self.cancelled.add(cancelled)

        def finish() -> list[int]:
            if self.bad in rows:
                raise NoImageryError('nothing')
            if cancelled.is_set() and rows[-1] >= self.slow:
                raise CancelledError
            return rows.tolist()  # type: ignore[no-any-return]

        return finish


def reader(begun: Begun, sizes: list[int], ahead: int) -> Iterator[list[int]]:
    batches = np.split(np.arange(100, 100 + sum(sizes)), np.cumsum(sizes)[:-1])
    return read_ahead(batches, begun, lambda row: ahead)


def test_so_many_chips_are_begun_besides_the_batch_in_hand() -> None:
    begun = Begun()
    sizes = [4, 1, 3, 2, 4, 4]
    batches = reader(begun, sizes, ahead=5)
    assert begun.rows == []
    assert next(batches) == [100, 101, 102, 103]
    # 1 + 3 are not enough.
    assert list(map(len, begun.rows)) == [4, 1, 3, 2]
    assert next(batches) == [104]
    assert list(map(len, begun.rows)) == [4, 1, 3, 2]
    assert next(batches) == [105, 106, 107]
    assert list(map(len, begun.rows)) == sizes[:5]
    assert list(map(len, batches)) == sizes[3:]
    assert begun.rows[-1] == [114, 115, 116, 117]


def test_one_batch_at_least_is_read_ahead_unless_it_is_too_large() -> None:
    for least, expected in ((1, 2), (0, 1)):
        begun = Begun()
        next(reader(begun, [3, 3, 3], least))
        assert len(begun.rows) == expected
    assert chips_ahead(0, 100) == 0
    assert chips_ahead(16, 512 * 512) == 32
    assert chips_ahead(16, MOST_PIXELS // 3) == 3


def test_an_error_gives_up_all_but_the_batches_that_are_there() -> None:
    begun = Begun(bad=102, slow=106)
    batches = reader(begun, [2] * 6, ahead=6)
    assert next(batches) == [100, 101]
    (cancelled,) = begun.cancelled
    assert not cancelled.is_set()
    # Requests of a later batch may have overtaken those of one that fails.
    assert next(batches) == [104, 105]
    assert cancelled.is_set()
    with pytest.raises(NoImageryError):
        next(batches)
    assert begun.rows[-1] == [108, 109]


def test_what_nobody_waits_for_is_given_up() -> None:
    begun = Begun()
    batches = reader(begun, [2, 2, 2], ahead=2)
    next(batches)
    del batches
    assert all(cancelled.is_set() for cancelled in begun.cancelled)


# With Earth Engine and a DataLoader.


@pytest.mark.parametrize(
    ('workers', 'method', 'batch_size'),
    [(0, None, 7), (2, 'fork', 1), (2, 'fork', 32), (1, 'spawn', 7)],
)
def test_samples_and_their_order_are_the_same(
    server: EarthEngineServer, workers: int, method: Any, batch_size: int
) -> None:
    chips = chips_of(server)
    # The parent makes requests first: its connections are inherited.
    assert chips[3]['chip'].tolist() == [3]  # type: ignore[index, union-attr]
    order = [*range(30, 60), *range(30)]
    loader = ahead(chips, batch_size, workers, order, multiprocessing_context=method)
    before = chips.retries
    server.set(kinds=FAULTS, rate=0.2, seed=workers)
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


def test_requests_are_in_flight_across_batches(server: EarthEngineServer) -> None:
    peaks = []
    for workers in (2, 0):
        for known in (False, True):
            chips = chips_of(server, limits={'max_concurrency': 12})
            loader = DataLoader(chips, 2, num_workers=workers, collate_fn=collate)
            server.set(latency=0.05)
            loader = ahead(chips, 2, workers) if known else loader
            assert [*chain(*rows_of(loader))] == [*range(60)]
            peaks.append(server.counts()['peak'])
    # Two workers with batches of two, and with their shares of six; one process with a
    # batch of two, and with all twelve; a busy machine may not reach what it may.
    assert peaks[0] <= 4 < peaks[1] <= 12
    assert peaks[2] <= 2 < peaks[3] <= 12


def test_errors_of_the_background_end_the_run_in_turn(
    server: EarthEngineServer,
) -> None:
    roi = shapely.union_all([area.geometry for area in (ROI, GAP)])
    dataset = make(server, roi, block_size=1)
    good, bad = grid(make(server), 4, 4, 16), grid(make(server, GAP), 1, 1, 16)
    chips = ChipDataset([(dataset, [*good, *bad])])
    batches = batches_before(NoImageryError, ahead(chips, 4, workers=2))
    assert rows_of(batches) == [[*range(i, i + 4)] for i in (0, 4, 8, 12)]


def test_errors_of_the_run_end_it(server: EarthEngineServer) -> None:
    chips = chips_of(server)
    chips.on_error = 'skip'
    server.set(kinds=[403], rate=1)
    assert batches_before(PermissionDeniedError, ahead(chips, 4, workers=2)) == []


def test_files_are_read_when_they_are_asked_for(server: EarthEngineServer) -> None:
    # A zone of Earth Engine beside one of another dataset, in one batch.
    far = make(server, block_size=1)
    near = Areas([shapely.box(0, 0, 80, 10)], res=1.0)
    chips = ChipDataset([(far, grid(far, 1, 6, 16)), (near, GridSampler(near, 10))])
    found = [*chain(*ahead(chips, 4, workers=2, collate_fn=list))]
    assert [sample['chip'].item() for sample in found] == [*range(14)]
    for where, sample in zip(grid(far, 1, 6, 16), found[:6], strict=True):
        assert_right(far, where, sample)
    assert [sample['image'][0].item() for sample in found[6:]] == [*range(0, 80, 10)]
    # Nor are they, when the run has ended.
    server.set(kinds=[403], rate=1)
    assert batches_before(PermissionDeniedError, ahead(chips, 4, 0)) == []


SLOW = """
import sys
sys.path.insert(0, '.')
from dynamicvis_geo.datasets import ChipDataset, EarthEngineDataset
from dynamicvis_geo.earthengine import EarthEngineClient
from tests.datasets.composites import ROI, WINDOW, SENSOR, ahead, grid
client = EarthEngineClient('p', sys.argv[1], max_concurrency=4)
dataset = EarthEngineDataset(ROI, WINDOW, SENSOR, client=client, block_size=1)
chips = ChipDataset([(dataset, grid(dataset, 10, 10, 16))])
for batch in ahead(chips, 4, int(sys.argv[2])):
    print('batch', flush=True)
"""


def test_an_interrupt_ends_requests_that_hang(
    start: Start, server: EarthEngineServer
) -> None:
    server.set(script=[None] * 40, kinds=['hang'], rate=1, hang_s=2 * HANG)
    process = start('-c', SLOW, server.url, 2, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == 'batch\n'
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(HANG) != 0
