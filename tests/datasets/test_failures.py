import contextlib
import errno
import multiprocessing
import resource
import subprocess
import sys
import threading
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import rasterio.errors
import shapely
import torch
from torch.utils.data import DataLoader
from torchgeo.datasets import RasterDataset

from dynamicvis_geo import errors
from dynamicvis_geo.datasets import (
    ChipDataset,
    ChipFailure,
    EarthEngineDataset,
    Scenes,
    collate,
)
from dynamicvis_geo.datasets.source import concerns_one_chip
from dynamicvis_geo.earthengine import EarthEngineClient
from dynamicvis_geo.errors import (
    EarthEngineError,
    NoImageryError,
    PermissionDeniedError,
    SourceError,
    SpecError,
)
from dynamicvis_geo.samplers import GridSampler
from tests.earthengine_server import EarthEngineServer
from tests.processes import HANG

from .composites import (
    GAP,
    ROI,
    SENSOR,
    WINDOW,
    ahead,
    assert_right,
    batches_before,
    grid,
    make,
    query,
)
from .rasters import UTM, Areas, pattern, write_geotiff

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ('error', 'expected'),
    [
        (NoImageryError('none'), True),
        (errors.UnavailableError('503', status=503), False),
        (errors.ComputationError('500', status=500), True),
        (errors.RequestTooLargeError('400', status=400), True),
        (EarthEngineError('no such band', status=400), True),
        (SourceError('scene.tif'), True),
        (OSError('gone'), True),
        (OSError(errno.EIO, 'damaged'), True),
        (OSError(errno.ENOSPC, 'full'), False),
        (OSError(errno.EMFILE, 'too many'), False),
        (rasterio.errors.RasterioIOError('broken'), True),
        (rasterio.errors.WarpOperationError('warp'), True),
        (EarthEngineError('refused before any request'), False),
        (errors.AuthenticationError('who?'), False),
        (errors.ProjectError('which?'), False),
        (PermissionDeniedError('403', status=403), False),
        (errors.SessionError('other server'), False),
        (errors.QuotaError('429', status=429), False),
        (errors.OutputError('the cache is full'), False),
        (SpecError('size=0'), False),
        (TypeError('a mistake'), False),
        (KeyError('image'), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_which_errors_concern_one_chip(error: BaseException, expected: bool) -> None:
    assert concerns_one_chip(error) == expected


def loader(chips: ChipDataset, batch_size: int, workers: int) -> DataLoader[Any]:
    return DataLoader(chips, batch_size, num_workers=workers, collate_fn=collate)


def rows_of(batch: dict[str, Any]) -> list[int]:
    return batch['chip'][:, 0].tolist() if 'chip' in batch else []


class Some(Areas):
    """Chips whose left edge is in *bad* cannot be had."""

    bad: tuple[int, ...] = (10, 40, 50, 60, 70)
    error: type[Exception] = SourceError

    def __getitem__(self, query: Any) -> dict[str, Any]:
        if round(query[0].start) in self.bad:
            raise self.error(f'no image at {query[0].start:g}')
        return super().__getitem__(query)


def some(**options: Any) -> ChipDataset:
    dataset = Some([shapely.box(0, 0, 120, 10)], res=1.0)
    return ChipDataset([(dataset, GridSampler(dataset, 10))], **options)


@pytest.mark.parametrize('workers', [0, 2])
def test_chips_of_any_dataset_that_fail_are_told_of(workers: int) -> None:
    chips = some(on_error='skip')
    batches = list(loader(chips, 4, workers))
    assert [batch.get('failures', []) for batch in batches] == [
        [ChipFailure(1, 'SourceError', 'no image at 10')],
        [ChipFailure(i, 'SourceError', f'no image at {10 * i}') for i in (4, 5, 6, 7)],
        [],
    ]
    assert set(batches[1]) == {'failures'}
    assert rows_of(batches[0]) == [0, 2, 3]
    assert batches[0]['image'][:, 0].tolist() == [0, 20, 30]
    assert chips.rows([1])['chip_id'].iloc[0].startswith('EPSG32618_x10_y10_')


def test_errors_are_raised_unless_told_otherwise() -> None:
    assert rows_of(collate([some()[0]])) == [0]
    with pytest.raises(SourceError, match='at 10'):
        some().__getitems__([0, 1])
    with pytest.raises(SpecError, match="on_error='ignore'"):
        some(on_error='ignore')


@pytest.mark.parametrize('error', [SpecError, TypeError, PermissionDeniedError])
def test_errors_of_the_run_end_it(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    monkeypatch.setattr(Some, 'error', error)
    with pytest.raises(error, match='at 10'):
        list(loader(some(on_error='skip'), 4, 0))


def test_damaged_file_among_good_ones(tmp_path: Path) -> None:
    for i in range(3):
        write_geotiff(
            tmp_path / f'{i}.tif', pattern(64, 64, i), 1280.0 * i, 640, 10, UTM
        )
    scenes = RasterDataset(tmp_path)
    (tmp_path / '1.tif').write_bytes(b'no longer an image')
    chips = ChipDataset([(scenes, GridSampler(scenes, 64))], on_error='skip')
    (batch,) = loader(chips, 3, 0)
    assert rows_of(batch) == [0, 2]
    ((row, reason, message),) = batch['failures']
    assert (row, reason) == (1, 'RasterioIOError')
    assert '1.tif' in message


def from_earth_engine(dataset: Any, wanted: list[Any], **options: Any) -> ChipDataset:
    return ChipDataset([(dataset, wanted)], **options)


@pytest.mark.parametrize(
    ('on_missing', 'on_error'), [('skip', 'raise'), ('skip', 'skip'), ('raise', 'skip')]
)
@pytest.mark.parametrize('workers', [0, 2])
def test_chips_without_imagery(
    server: EarthEngineServer, workers: int, on_missing: Any, on_error: Any
) -> None:
    # Four chips that no scene shows among four that some do.
    roi = shapely.union_all([area.geometry for area in (ROI, GAP)])
    dataset = make(server, roi, on_missing=on_missing, block_size=1)
    present, missing = (grid(make(server, area), 2, 2) for area in (ROI, GAP))
    wanted = [*present[:1], *missing[:1], *present[1:2], *missing[1:], *present[2:]]
    batches = list(
        loader(from_earth_engine(dataset, wanted, on_error=on_error), 3, workers)
    )
    failures = [failure for batch in batches for failure in batch.get('failures', [])]
    assert [failure.chip for failure in failures] == [1, 3, 4, 5]
    assert {failure.reason for failure in failures} == {'NoImageryError'}
    assert all('x' in failure.message for failure in failures)
    assert set(batches[1]) == {'failures'}
    rows = [row for batch in batches for row in rows_of(batch)]
    assert rows == [0, 2, 6, 7]
    images = torch.cat([batch['image'] for batch in batches if 'image' in batch])
    valid = torch.cat(
        [batch['valid_fraction'] for batch in batches if 'image' in batch]
    )
    for row, image, fraction in zip(rows, images, valid, strict=True):
        assert_right(dataset, wanted[row], {'image': image, 'valid_fraction': fraction})


def test_the_chip_that_earth_engine_cannot_do(server: EarthEngineServer) -> None:
    dataset = make(server, block_size=1, limits={'max_concurrency': 1})
    wanted = grid(dataset, 1, 6)
    left = wanted[2][0].start
    server.set(kinds=[400], sick=[left], message="Image 'x' is broken.")
    chips = from_earth_engine(dataset, wanted, on_error='skip')
    found = chips.__getitems__(range(6))
    (failure,) = [one for one in found if isinstance(one, ChipFailure)]
    assert failure == found[2]
    assert (failure.chip, failure.reason) == (2, 'EarthEngineError')
    assert chips.rows([2])['chip_id'].iloc[0] in failure.message
    assert "Image 'x' is broken." in failure.message
    for row in (0, 1, 3, 4, 5):
        assert_right(dataset, wanted[row], found[row])
    assert server.counts()['requests'] == 6


def test_chips_of_a_shared_request_fail_together(server: EarthEngineServer) -> None:
    # Blocks of two chips a side: four requests, one of which cannot be answered.
    dataset = make(server, block_size=64, limits={'max_concurrency': 1})
    wanted = grid(dataset, 4, 4)
    server.set(script=[None, 400])
    found = dataset.submit(wanted, 'skip')()
    failed = [i for i, one in enumerate(found) if isinstance(one, ChipFailure)]
    assert len(failed) == 4
    assert len({(i // 8, i % 4 // 2) for i in failed}) == 1
    for i in set(range(16)) - set(failed):
        assert_right(dataset, wanted[i], found[i])


def test_a_chip_of_several_requests_fails_once(server: EarthEngineServer) -> None:
    dataset = make(server, block_size=48, limits={'max_concurrency': 1})
    wanted = grid(dataset, 2, 2)
    x, y, t = wanted[0]
    middle = (
        slice(x.start + 160, x.stop + 160, 10),
        slice(y.start - 160, y.stop, 10),
        t,
    )
    server.set(script=[400, 400])
    found = dataset.submit([*wanted, middle])()
    assert len(found) == 5
    assert any(isinstance(one, ChipFailure) for one in found)
    for query_, one in zip([*wanted, middle], found, strict=True):
        if not isinstance(one, ChipFailure):
            assert_right(dataset, query_, one)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_server_that_stays_away_ends_the_run(workers: int) -> None:
    client = EarthEngineClient(url='http://127.0.0.1:9', retry_for=0.1)
    dataset = EarthEngineDataset(ROI, WINDOW, SENSOR, client=client)
    chips = from_earth_engine(dataset, grid(dataset, 1, 6), on_error='skip')
    found = batches_before(errors.UnavailableError, loader(chips, 2, workers))
    assert found == []


def test_a_server_that_comes_back_is_waited_for() -> None:
    with EarthEngineServer() as first:
        port = first.url.rsplit(':', 1)[1]
        dataset = make(first, block_size=1, limits={'max_concurrency': 4})
        wanted = grid(dataset, 4, 6, 16)
        chips = from_earth_engine(dataset, wanted, on_error='skip')
        batches = iter(ahead(chips, 4, workers=2))
        found = [next(batches)]
    # What was sent meanwhile is refused.
    back = threading.Timer(1, lambda: servers.append(EarthEngineServer('--port', port)))
    servers: list[EarthEngineServer] = []
    back.start()
    try:
        found += batches
    finally:
        back.join()
        servers[0].stop()
    assert [*chain(*map(rows_of, found))] == [*range(24)]
    assert not any('failures' in batch for batch in found)
    images = torch.cat([batch['image'] for batch in found])
    valid = torch.cat([batch['valid_fraction'] for batch in found])
    for where, image, fraction in zip(wanted, images, valid, strict=True):
        assert_right(dataset, where, {'image': image, 'valid_fraction': fraction})


@pytest.mark.parametrize('fault', [500, 'short'])
def test_a_chip_that_the_server_fails_on_is_listed(
    server: EarthEngineServer, monkeypatch: pytest.MonkeyPatch, fault: int | str
) -> None:
    # Of the probe, and of each try: a busy machine needs more than a second.
    for module in ('client', 'web'):
        monkeypatch.setattr(f'dynamicvis_geo.earthengine.{module}.LEAST_TIME', 20)
    dataset = make(server, block_size=1, limits={'retry_for': 0.5})
    wanted = grid(dataset, 1, 6)
    server.set(kinds=[fault], sick=[wanted[2][0].start])
    chips = from_earth_engine(dataset, wanted, on_error='skip')
    found = chips.__getitems__(range(6))
    (failure,) = [one for one in found if isinstance(one, ChipFailure)]
    assert (failure.chip, failure.reason) == (2, 'ComputationError')
    for row in (0, 1, 3, 4, 5):
        assert_right(dataset, wanted[row], found[row])


AWAY = """
import sys
sys.path.insert(0, '.')
from dynamicvis_geo.datasets import ChipDataset, EarthEngineDataset
from dynamicvis_geo.earthengine import EarthEngineClient, limiter
from dynamicvis_geo.errors import UnavailableError
from tests.datasets.composites import ROI, WINDOW, SENSOR, ahead, grid
limiter.TELL_OF_FAILURES = 0.5
away = EarthEngineClient(url='http://127.0.0.1:9', retry_for=3)
dataset = EarthEngineDataset(ROI, WINDOW, SENSOR, client=away, block_size=1)
chips = ChipDataset([(dataset, grid(dataset, 4, 4))])
try:
    list(ahead(chips, 2, workers=2))
except UnavailableError:
    print('unavailable')
"""


def test_an_outage_is_told_in_one_line() -> None:
    run = subprocess.run(
        [sys.executable, '-c', AWAY],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == 'unavailable\n'
    (line,) = [line for line in run.stderr.splitlines() if 'answered' in line]
    assert 'trying again: 127.0.0.1:9: Connection refused; waiting for it' in line


def read_without_files(path: Path, told: Any) -> None:
    scenes = Scenes(path)
    chips = ChipDataset([(scenes, GridSampler(scenes, 64))], on_error='skip')
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    held: list[Any] = []
    with contextlib.suppress(OSError):
        while True:
            held.append(path.open())
    try:
        chips[0]
    except SourceError as error:
        held.clear()
        told.send(str(error))
    told.close()


def test_too_many_open_files_are_no_failure_of_a_chip(tmp_path: Path) -> None:
    path = tmp_path / 'a.tif'
    write_geotiff(path, pattern(64, 64), 0, 640, 10, UTM)
    context = multiprocessing.get_context('fork')
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=read_without_files, args=(path, writer))
    child.start()
    writer.close()
    child.join(HANG)
    assert 'Too many open files' in reader.recv()


@pytest.mark.parametrize('workers', [0, 2])
def test_a_used_up_quota_ends_the_run(server: EarthEngineServer, workers: int) -> None:
    limits = {'retry_for': 0.2, 'max_concurrency': 4}
    dataset = make(server, block_size=1, limits=limits)
    chips = from_earth_engine(dataset, grid(dataset, 2, 8), on_error='skip')
    server.set(kinds=[429], rate=1)
    assert batches_before(errors.QuotaError, loader(chips, 4, workers)) == []


def test_a_query_outside_is_a_mistake(server: EarthEngineServer) -> None:
    dataset = make(server, on_missing='skip')
    x, y, t = query(dataset)
    far = (slice(x.start + 1e6, x.stop + 1e6, 10), y, t)
    with pytest.raises(IndexError, match='not found in index'):
        from_earth_engine(dataset, [far], on_error='skip')[0]
