"""Threads that never keep a process from ending.

Those of ``concurrent.futures`` are waited for when a process ends. A request to a
server that hangs cannot be interrupted, and would hold up Ctrl-C, or the end of a
DataLoader's worker, until its deadline.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec('P')
R = TypeVar('R')


def in_background(function: Callable[P, R], *args: P.args, **kw: P.kwargs) -> Future[R]:
    """Call a function in a thread of its own.

    Args:
        function: What to call.
        *args: Its arguments.
        **kw: Its arguments by name.
    """
    future: Future[R] = Future()
    threading.Thread(
        target=_run, args=(future, function, args, kw), daemon=True
    ).start()
    return future


class DaemonPool:
    """Calls functions in a bounded number of threads, in the order they came.

    Args:
        threads: How many there may be; they start as they are needed.
        name: What they are called.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._most, self._name = threads, name
        self._tasks: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._started = 0
        self._lock = threading.Lock()

    def submit(
        self, function: Callable[P, R], *args: P.args, **kw: P.kwargs
    ) -> Future[R]:
        """Call a function when a thread is free; until then it can be cancelled.

        Args:
            function: What to call.
            *args: Its arguments.
            **kw: Its arguments by name.

        Returns:
            The result to come.
        """
        future: Future[R] = Future()
        self._tasks.put((future, function, args, kw))
        if not self._idle.acquire(blocking=False):
            self._start()
        return future

    def _start(self) -> None:
        with self._lock:
            if self._started == self._most:
                return
            self._started += 1
            name = f'{self._name}_{self._started}'
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def _work(self) -> None:
        while True:
            try:
                task = self._tasks.get_nowait()
            except Empty:
                self._idle.release()
                task = self._tasks.get()
            _run(*task)
            del task  # Or an idle thread would keep the last result alive.


def _run(
    future: Future[R], function: Callable[..., R], args: Any, kwargs: dict[str, Any]
) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function(*args, **kwargs)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
