"""Programs that tests start as processes of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest

#: Seconds after which a program counts as hung: many times what a busy machine needs.
HANG = 600

Process = subprocess.Popen[str]
Start = Callable[..., Process]


def interruptible() -> None:
    """Undo what shells do to programs in the background: these ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start Python programs, each with a process group; what is left of it is killed.

    Errors go where the output goes, to a pipe.
    """
    started: list[Process] = []

    def begin(*arguments: Any, **options: Any) -> Process:
        started.append(
            subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=options.pop('stderr', subprocess.STDOUT),
                text=True,
                start_new_session=True,
                preexec_fn=interruptible,
                **options,
            )
        )
        return started[-1]

    yield begin
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(what: Callable[[], Any], process: Process) -> None:
    """Wait until something is so, while a process runs."""
    deadline = time.monotonic() + HANG
    while not what():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(process: Process) -> list[int]:
    """Numbers of the processes that a process has started, in that order."""
    return [child.pid for child in psutil.Process(process.pid).children()]


def living(group: int) -> list[int]:
    """Numbers of the processes of a group that have not ended."""
    every = psutil.process_iter(['pid', 'status'])
    alive = (one.info['pid'] for one in every if one.info['status'] != 'zombie')
    return [number for number in alive if _group(number) == group]


def _group(process: int) -> int | None:
    with suppress(ProcessLookupError):
        return os.getpgid(process)
    return None
