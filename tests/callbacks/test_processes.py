import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import geopandas as gpd
import pytest
from torch.multiprocessing.spawn import ProcessRaisedException, start_processes

from dynamicvis_geo.callbacks import EmbeddingWriter
from dynamicvis_geo.provenance import read_provenance
from tests.callbacks.job import main
from tests.callbacks.standins import Chips, Task
from tests.callbacks.test_writer import predict, values
from tests.processes import HANG, Start, children, wait_for

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(sys.platform == 'win32', reason='gloo'),
]


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
        start_processes(run_as_rank, (port, tmp_path), nprocs=2, start_method='fork')
    frame = gpd.read_parquet(tmp_path / 'a.parquet')
    assert len(frame) == 11
    assert values(tmp_path / 'a.parquet') == {f'chip-{i}': i for i in range(11)}
    assert len(list((tmp_path / 'b').glob('*.tif'))) == 11
    for name in ('a.parquet', 'b'):
        assert read_provenance(tmp_path / name)['run']['processes'] == 2


@pytest.mark.parametrize('strategy', ['ddp_spawn', 'ddp_fork'])
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore:.*fork')
def test_processes_that_are_started_otherwise(tmp_path: Path, strategy: str) -> None:
    path = tmp_path / 'a.parquet'
    main([str(path), '--strategy', strategy])
    assert gpd.read_parquet(path).equals(undisturbed(tmp_path / 'b.parquet'))
    assert blocks(path) == 0


def test_torchrun_on_two_machines(start: Start, tmp_path: Path) -> None:
    path = tmp_path / 'a.parquet'
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    # As on two machines: an agent each, which starts one process.
    agents = [
        start(
            *('-m', 'torch.distributed.run'),
            *('--nnodes', 2, '--nproc-per-node', 1),
            *('--node-rank', node, '--master-addr', '127.0.0.1'),
            *('--master-port', port, '-m', 'tests.callbacks.job', path),
            *('--chips', 7, '--nodes', 2),
        )
        for node in range(2)
    ]
    logs = [agent.communicate(timeout=HANG)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], logs
    assert values(path) == {f'chip-{i}': i for i in range(7)}
    assert read_provenance(path)['run']['processes'] == 2


#: What is registered first is called last when Python ends.
LEAVES = """
import atexit
from torch import distributed
atexit.register(lambda: print(distributed.is_initialized()))
store = distributed.HashStore()
distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
from dynamicvis_geo.callbacks.peers import Peers
assert Peers().total([2, 3]) == [2, 3]
"""


def test_no_group_is_left_to_the_end_of_python(start: Start) -> None:
    run = start('-c', LEAVES)
    assert run.communicate(timeout=HANG)[0].splitlines()[-1] == 'False'
    assert run.returncode == 0


def blocks(path: Path) -> int:
    return len(list(path.with_name(f'{path.name}.partial').glob('block-*')))


def undisturbed(path: Path, chips: int = 40) -> gpd.GeoDataFrame:
    predict(EmbeddingWriter(path, block_chips=4), Chips(chips))
    return gpd.read_parquet(path)


def test_killed_processes_lose_nothing_that_is_finished(
    start: Start, tmp_path: Path
) -> None:
    path, hold = tmp_path / 'a.parquet', tmp_path / 'hold'
    command = ('-m', 'tests.callbacks.job', path, '--hold', hold)
    hold.touch()
    job = start(*command)
    # Each of the two has five blocks of two batches, and two of them on disk.
    wait_for(lambda: blocks(path) == 4, job)
    (rank_1,) = children(job)
    os.kill(rank_1, signal.SIGKILL)
    # Lightning ends the first process when the other one dies.
    assert job.wait(HANG) != 0
    assert blocks(path) == 4

    job = start(*command, '--hold-at', 2)
    wait_for(lambda: blocks(path) == 6, job)
    others = children(job)
    job.kill()
    job.wait(HANG)
    # The other process goes on with its share.
    hold.unlink()
    done = start(*command, '--processes', 1)
    log = done.communicate(timeout=HANG)[0]
    assert done.returncode == 0, log
    assert gpd.read_parquet(path).equals(undisturbed(tmp_path / 'b.parquet'))
    for other in others:
        wait_for(lambda: not alive(other), done)  # noqa: B023
    assert blocks(path) == 0


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_torchrun_starts_a_killed_worker_again(start: Start, tmp_path: Path) -> None:
    path, hold = tmp_path / 'a.parquet', tmp_path / 'hold'
    hold.touch()
    agent = start(
        *('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2'),
        *('--max-restarts', '3', '--monitor-interval', '0.1'),
        *('-m', 'tests.callbacks.job', path, '--hold', hold),
        # Else PyTorch's processes look for each other where the killed ones were.
        env={**os.environ, 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'},
    )
    wait_for(lambda: blocks(path) == 4, agent)
    os.kill(children(agent)[0], signal.SIGKILL)
    hold.unlink()
    log = agent.communicate(timeout=HANG)[0]
    assert agent.returncode == 0, log
    assert gpd.read_parquet(path).equals(undisturbed(tmp_path / 'b.parquet'))


def test_ctrl_c_ends_the_run_and_keeps_what_is_done(
    start: Start, tmp_path: Path
) -> None:
    path, hold = tmp_path / 'a.parquet', tmp_path / 'hold'
    hold.touch()
    options = ('--hold', hold, '--processes', 1)
    job = start('-m', 'tests.callbacks.job', path, *options)
    wait_for(lambda: blocks(path) == 2, job)
    job.send_signal(signal.SIGINT)
    log = job.communicate(timeout=HANG)[0]
    assert job.returncode == 1
    assert '8 of 40 chips are finished and kept' in log
    assert 'the same command goes on from there' in log
    assert blocks(path) == 2


def test_a_shard_that_is_suspended_ends_the_run_when_it_wakes(
    start: Start, tmp_path: Path
) -> None:
    path, hold = tmp_path / 'a.parquet', tmp_path / 'hold'
    hold.touch()
    slow = start(
        *('-m', 'tests.callbacks.job', path, '--processes', 1, '--shard', '1/3'),
        *('--hold', hold, '--hold-at', 3),
    )
    wait_for(lambda: blocks(path) == 1, slow)
    slow.send_signal(signal.SIGSTOP)
    for shard in ('3/3', '2/3', '3/3'):
        main([str(path), '--processes', '1', '--shard', shard])
    assert not path.exists()
    hold.unlink()
    slow.send_signal(signal.SIGCONT)
    log = slow.communicate(timeout=HANG)[0]
    assert slow.returncode == 0, log
    assert gpd.read_parquet(path).equals(undisturbed(tmp_path / 'b.parquet'))
    assert blocks(path) == 0


def test_a_shard_whose_work_was_done_by_another_ends_without_harm(
    start: Start, tmp_path: Path
) -> None:
    path, hold = tmp_path / 'a.parquet', tmp_path / 'hold'
    hold.touch()
    late = start(
        *('-m', 'tests.callbacks.job', path, '--processes', 1, '--shard', '2/2'),
        *('--hold', hold, '--hold-at', 3),
    )
    wait_for(lambda: blocks(path) == 1, late)
    for shard in ('1/2', '2/2'):
        main([str(path), '--processes', '1', '--shard', shard])
    made = path.read_bytes()
    hold.unlink()
    log = late.communicate(timeout=HANG)[0]
    assert 'another process has finished' in log
    assert 'RunEndedError' in log
    assert path.read_bytes() == made
    assert {entry.name for entry in tmp_path.iterdir()} == {
        'a.parquet',
        'a.parquet.stac',
    }
