import subprocess
import sys
import threading

import pytest

from dynamicvis_geo.earthengine.threads import DaemonPool, in_background
from tests.processes import HANG

pytestmark = pytest.mark.once


def test_a_pool_starts_no_more_threads_than_it_may() -> None:
    pool = DaemonPool(3, 'test-pool')
    together = threading.Barrier(3, timeout=HANG)
    futures = [pool.submit(together.wait) for _ in range(9)]
    assert sorted(future.result() for future in futures) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    names = [thread.name for thread in threading.enumerate()]
    assert sum(name.startswith('test-pool') for name in names) == 3


def test_idle_threads_are_used_again() -> None:
    pool = DaemonPool(50, 'test-idle')
    for i in range(20):
        assert pool.submit(pow, i, 2).result() == i * i
    names = [thread.name for thread in threading.enumerate()]
    # A thread may give its result before it counts as idle.
    assert 1 <= sum(name.startswith('test-idle') for name in names) < 20


def test_errors_are_those_of_the_future() -> None:
    for future in (DaemonPool(1, 'test').submit(int, 'x'), in_background(int, 'x')):
        with pytest.raises(ValueError, match="'x'"):
            future.result()


def test_what_has_not_begun_can_be_cancelled() -> None:
    pool = DaemonPool(1, 'test')
    go = threading.Event()
    first, second = pool.submit(go.wait), pool.submit(go.wait)
    assert second.cancel()
    go.set()
    assert first.result()
    assert pool.submit(int).result() == 0


def test_a_process_ends_whatever_its_threads_do() -> None:
    script = (
        'import threading\n'
        'from dynamicvis_geo.earthengine.threads import DaemonPool, in_background\n'
        'in_background(threading.Event().wait)\n'
        "DaemonPool(1, 'p').submit(threading.Event().wait)\n"
    )
    subprocess.run([sys.executable, '-c', script], check=True, timeout=HANG)
