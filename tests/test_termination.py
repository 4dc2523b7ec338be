import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import geopandas as gpd
import pyarrow.parquet as pq
import pytest
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from dynamicvis_geo.callbacks import EmbeddingWriter
from dynamicvis_geo.cli import main
from dynamicvis_geo.termination import Terminated, terminable
from tests.callbacks.standins import Chips, Task
from tests.callbacks.test_writer import predict
from tests.earthengine_server import EarthEngineServer
from tests.processes import HANG, Process, Start, children, living, wait_for

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(sys.platform != 'linux', reason='who sent a signal'),
]

#: Who gets the signal: one process of a run, or all of them.
SEND: dict[str, Callable[[Process], None]] = {
    'first': lambda run: os.kill(run.pid, signal.SIGTERM),
    'child': lambda run: os.kill(children(run)[-1], signal.SIGTERM),
    'group': lambda run: os.killpg(run.pid, signal.SIGTERM),
}


#: Of twelve requests the last one, which is never that for the first chip.
LAST_HANGS = {'script': [None] * 11, 'kinds': ['hang'], 'rate': 1, 'hang_s': HANG}


def rows(folder: Path) -> int:
    return sum(pq.read_metadata(part).num_rows for part in folder.glob('block-*'))


@pytest.fixture
def options(server: EarthEngineServer, tmp_path: Path) -> tuple[Any, ...]:
    """Arguments of ``embed`` for twelve chips of one request each."""
    points = [f'{i},{10.2 + 0.02 * i},50.4' for i in range(12)]
    (tmp_path / 'points.csv').write_text('\n'.join(['id,lon,lat', *points]))
    return (
        *('embed', '--points', tmp_path / 'points.csv', '--on-missing', 'fill'),
        *('--start', '2022-06-01', '--end', '2022-07-21', '--cloudy-pct', 90),
        *('--ee-url', server.url, '--project', 'p', '--size', 64, '--batch-size', 1),
        *('--weights', 'random', '--device', 'cpu', '--block-chips', 1, '--quiet'),
        *('--max-concurrency', 1, '--output', tmp_path / 'e.parquet'),
    )


@pytest.fixture
def command(start: Start, options: tuple[Any, ...]) -> Callable[..., Process]:
    environment = {**os.environ, 'RS_EMBED_DYNAMICVIS_IMG': '64'}

    def run(*more: Any) -> Process:
        return start('-m', 'dynamicvis_geo.cli', *options, *more, env=environment)

    return run


@pytest.mark.parametrize(
    ('devices', 'workers', 'whom'),
    [
        (1, 2, 'child'),
        (2, 1, 'group'),
        (2, 0, 'child'),
    ],
)
def test_a_command_keeps_what_is_done(
    command: Callable[..., Process],
    options: tuple[Any, ...],
    server: EarthEngineServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    devices: int,
    workers: int,
    whom: str,
) -> None:
    server.set(**LAST_HANGS)
    run = command('--devices', devices, '--num-workers', workers)
    parts = tmp_path / 'e.parquet.partial'
    wait_for(lambda: rows(parts), run)
    done = rows(parts)
    SEND[whom](run)
    log = run.communicate(timeout=HANG)[0]
    assert run.returncode == 143, log
    assert not living(run.pid)
    kept = rows(parts)
    assert kept >= done
    told, word = log.splitlines()[-2:]
    assert told.startswith(
        f'dynamicvis-geo: {kept} of 12 chips are finished and kept'
    ), log
    assert word == 'dynamicvis-geo: terminated'
    assert 'Traceback' not in log, log

    server.set()
    monkeypatch.setenv('RS_EMBED_DYNAMICVIS_IMG', '64')
    assert main([str(option) for option in options]) == 0
    output = gpd.read_parquet(tmp_path / 'e.parquet')
    assert sorted(map(int, output['point_id'])) == list(range(12))
    assert server.counts()['served'] == 12 - kept


def test_processes_that_wait_for_others_to_begin_end(
    command: Callable[..., Process], tmp_path: Path
) -> None:
    run = command('--devices', 2)
    wait_for(lambda: children(run), run)
    # The first process waits for this one, in PyTorch, where it cannot be interrupted.
    SEND['group'](run)
    log = run.communicate(timeout=HANG)[0]
    assert run.returncode == 143, log
    assert not living(run.pid)
    assert log.splitlines()[-1] == 'dynamicvis-geo: terminated'
    assert 'Traceback' not in log, log
    assert not (tmp_path / 'e.parquet').exists()


def test_fetch_ends(start: Start, server: EarthEngineServer, tmp_path: Path) -> None:
    server.set(script=[None] * 2, kinds=['hang'], rate=1)
    run = start(
        *('-m', 'dynamicvis_geo.cli', 'fetch', '--roi=10.2,50.3,10.4,50.5'),
        *('--start', '2022-06-01', '--end', '2022-07-21', '--ee-url', server.url),
        *('--project', 'p', '--size', 512, '--cache', tmp_path / 'cache'),
    )
    wait_for(lambda: server.counts()['requests'] > 2, run)
    SEND['first'](run)
    log = run.communicate(timeout=HANG)[0]
    assert run.returncode == 143, log
    assert log.splitlines()[-1] == 'dynamicvis-geo: terminated'
    assert 'Traceback' not in log, log


@pytest.mark.parametrize(
    ('processes', 'workers', 'whom'),
    [(1, 2, 'group'), (2, 0, 'first')],
)
def test_a_trainer_of_the_users_keeps_what_is_done(
    start: Start, tmp_path: Path, processes: int, workers: int, whom: str
) -> None:
    (tmp_path / 'hold').touch()
    run = start(
        *('-m', 'tests.callbacks.job', tmp_path / 'a.parquet', '--hold'),
        *(tmp_path / 'hold', '--processes', processes, '--workers', workers),
    )
    parts = tmp_path / 'a.parquet.partial'
    # Each stops after five batches of two, with two blocks of four chips on disk.
    wait_for(lambda: rows(parts) >= 8 * processes, run)
    SEND[whom](run)
    log = run.communicate(timeout=HANG)[0]
    assert run.returncode == 143, log
    assert not living(run.pid)
    assert rows(parts) >= 8 * processes
    assert f'{rows(parts)} of 40 chips are finished and kept' in log
    assert 'Traceback' not in log, log


#: A worker hands a descriptor over, as it does tensors, to one that goes before that.
LEFT = """
import multiprocessing, os, socket
from multiprocessing.resource_sharer import DupFd
from dynamicvis_geo.termination import in_worker

def work(pipe):
    in_worker(0)
    handed = DupFd(pipe.fileno())
    pipe.send(handed._id[0])
    pipe.recv()

if __name__ == '__main__':
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context('fork').Process(target=work, args=(theirs,))
    worker.start()
    address = ours.recv()
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as left:
            left.connect(address)
            left.recv(1)
    ours.send(None)
    worker.join()
"""


def test_a_worker_that_is_left_says_nothing(start: Start) -> None:
    run = start('-c', LEFT)
    assert run.communicate(timeout=HANG)[0] == ''
    assert run.returncode == 0


class SignalsItself(Task):
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        if batch_idx == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().predict_step(batch, batch_idx)


@pytest.fixture
def handler() -> Iterator[Any]:
    """What a program of a user does at SIGTERM: it takes a note."""
    noted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    yield noted
    signal.signal(signal.SIGTERM, before)


def test_the_handler_of_the_user_is_called_and_restored(
    handler: list[int], tmp_path: Path
) -> None:
    mine = signal.getsignal(signal.SIGTERM)
    path = tmp_path / 'a.parquet'
    writer = EmbeddingWriter(path, block_chips=4)
    with pytest.raises(SystemExit) as raised:
        predict(writer, Chips(12), SignalsItself(), batch_size=2)
    assert raised.value.code == 143
    assert handler == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is mine
    assert rows(tmp_path / 'a.parquet.partial') == 4
    predict(EmbeddingWriter(path), Chips(12), Task())
    assert signal.getsignal(signal.SIGTERM) is mine
    assert len(gpd.read_parquet(path)) == 12


def test_training_ends_too() -> None:
    class Fitted(LightningModule):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        def configure_optimizers(self) -> None:
            return None

    before = signal.getsignal(signal.SIGTERM)
    trainer = Trainer(
        accelerator='cpu',
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    with pytest.raises(Terminated), terminable():
        trainer.fit(Fitted(), DataLoader([0, 1]))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_user_may_ignore_it(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        path = tmp_path / 'a.parquet'
        predict(EmbeddingWriter(path), Chips(12), SignalsItself(), batch_size=2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(gpd.read_parquet(path)) == 12


def test_ctrl_c_is_said_in_one_line(
    command: Callable[..., Process], server: EarthEngineServer, tmp_path: Path
) -> None:
    server.set(**LAST_HANGS)
    run = command('--devices', 2)
    wait_for(lambda: rows(tmp_path / 'e.parquet.partial'), run)
    os.killpg(run.pid, signal.SIGINT)
    log = run.communicate(timeout=HANG)[0]
    assert run.returncode == 130, log
    assert not living(run.pid)
    assert log.splitlines()[-1] == 'dynamicvis-geo: interrupted'
    assert log.count('interrupted') == 1
    assert 'Traceback' not in log, log
