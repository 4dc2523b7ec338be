import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import geopandas as gpd
import pyarrow.parquet as pq
import pytest
from torch.multiprocessing.spawn import ProcessRaisedException, spawn

from dynamicvis_geo.callbacks import EmbeddingWriter, rendezvous
from dynamicvis_geo.callbacks.rendezvous import Rendezvous
from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.provenance import read_provenance
from tests.callbacks.standins import Chips, Task
from tests.callbacks.test_writer import predict, values
from tests.processes import HANG, Start, children, wait_for

pytestmark = pytest.mark.skipif(sys.platform == 'win32', reason='gloo')


class FailsInOneProcess(Task):
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        if self.global_rank == 1:
            raise RuntimeError('the model failed')
        return super().predict_step(batch, batch_idx)


def run_as_rank(rank: int, port: int, folder: Path) -> None:
    # What torchrun sets for the processes that it starts.
    os.environ.update(
        LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port)
    )
    two: dict[str, Any] = {'devices': 2, 'strategy': 'ddp', 'batch_size': 2}
    predict(EmbeddingWriter(folder / 'a.parquet'), Chips(11), Task(), **two)
    predict(EmbeddingWriter(folder / 'b'), Chips(11), Task('grid'), **two)
    predict(EmbeddingWriter(folder / 'c'), Chips(4), FailsInOneProcess('grid'), **two)


def test_two_processes_write_every_chip_once(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    # Which of the two processes is heard first is left to chance.
    with pytest.raises(ProcessRaisedException, match='the model failed'):
        spawn(run_as_rank, (port, tmp_path), nprocs=2)
    frame = gpd.read_parquet(tmp_path / 'a.parquet')
    assert len(frame) == 11
    assert values(tmp_path / 'a.parquet') == {f'chip-{i}': i for i in range(11)}
    assert len(list((tmp_path / 'b').glob('*.tif'))) == 11
    for name in ('a.parquet', 'b'):
        assert read_provenance(tmp_path / name)['run']['processes'] == 2


@pytest.mark.parametrize('nodes', [1, 2])
def test_torchrun(start: Start, tmp_path: Path, nodes: int) -> None:
    path = tmp_path / 'a.parquet'
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    # As on two machines: an agent each, which starts one process.
    shape = {1: ('1', '2'), 2: ('2', '1')}[nodes]
    agents = [
        start(
            *('-m', 'torch.distributed.run'),
            *('--nnodes', shape[0], '--nproc-per-node', shape[1]),
            *('--node-rank', node, '--master-addr', '127.0.0.1'),
            *('--master-port', port, '-m', 'tests.callbacks.job', path),
            *('--chips', 7, '--nodes', nodes),
        )
        for node in range(nodes)
    ]
    logs = [agent.communicate(timeout=HANG)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0] * nodes, logs
    assert values(path) == {f'chip-{i}': i for i in range(7)}
    assert read_provenance(path)['run']['processes'] == 2


def test_killed_processes_lose_nothing_that_is_finished(
    start: Start, tmp_path: Path
) -> None:
    path, hold = tmp_path / 'a.parquet', tmp_path / 'hold'
    parts = tmp_path / 'a.parquet.partial'
    command = ('-m', 'tests.callbacks.job', path, '--hold', hold)

    def finished() -> int:
        return sum(pq.read_metadata(f).num_rows for f in parts.glob('part-*.parquet'))

    hold.touch()
    job = start(*command)
    # Each of the two has five batches of two, and four of these chips on disk or more.
    wait_for(lambda: finished() >= 16, job)
    (rank_1,) = children(job)
    os.kill(rank_1, signal.SIGKILL)
    # Lightning ends the first process when the other one dies.
    assert job.wait(HANG) != 0
    before = finished()
    assert before >= 16

    job = start(*command, '--hold-at', 2)
    wait_for(lambda: finished() >= before + 4, job)
    job.kill()
    # The other process lives on, until it finds its parent gone.
    job.wait(HANG)
    between = finished()
    hold.unlink()
    done = start(*command)
    log = done.communicate(timeout=HANG)[0]
    assert done.returncode == 0, log
    assert between >= before + 4

    undisturbed = tmp_path / 'b.parquet'
    predict(EmbeddingWriter(undisturbed), Chips(40))
    assert gpd.read_parquet(path).equals(gpd.read_parquet(undisturbed))
    assert not parts.exists()


def test_ctrl_c_ends_the_run_and_keeps_what_is_done(
    start: Start, tmp_path: Path
) -> None:
    path, hold = tmp_path / 'a.parquet', tmp_path / 'hold'
    hold.touch()
    options = ('--hold', hold, '--processes', 1)
    job = start('-m', 'tests.callbacks.job', path, *options)
    folder = tmp_path / 'a.parquet.partial'
    wait_for(lambda: len(list(folder.glob('part-*.parquet'))) == 5, job)
    job.send_signal(signal.SIGINT)
    log = job.communicate(timeout=HANG)[0]
    assert job.returncode == 1
    assert '10 chips are finished' in log
    assert 'the same command goes on from there' in log
    assert sum(pq.read_metadata(f).num_rows for f in folder.glob('part-*')) == 10


# Waiting for each other.


def test_a_process_that_fails_ends_those_that_wait(tmp_path: Path) -> None:
    one, two = (Rendezvous(tmp_path, 'run', rank, 2) for rank in (0, 1))
    two.fail('disk full')
    with pytest.raises(OutputError, match='process 1 has failed: disk full'):
        one.wait('flushed')


def test_a_process_without_signs_of_life_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, 'PATIENCE', 0.05)
    monkeypatch.setattr(rendezvous, 'POLL', 0.01)
    one, two = (Rendezvous(tmp_path, 'run', rank, 2) for rank in (0, 1))
    two.beat()
    with pytest.raises(OutputError, match='process 1 has given no sign of life'):
        one.wait('flushed')


def test_what_the_others_said_is_heard(tmp_path: Path) -> None:
    ranks = [Rendezvous(tmp_path, 'run', rank, 3) for rank in range(3)]
    for rank in ranks:
        rank.reach('flushed', str(rank.rank))
    ranks[0].wait('flushed')
    assert sorted(ranks[0].texts('flushed')) == ['1', '2']
