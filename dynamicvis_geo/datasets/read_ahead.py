"""Requests in flight all the time: batches begin before they are asked for.

A DataLoader's worker makes one batch after the other: it would wait for the slowest
request of each, and then for the first of the next.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dynamicvis_geo.datasets.failures import OnError, Sample, fetch_each

Rows = NDArray[np.int64]
T = TypeVar('T')
T_co = TypeVar('T_co', covariant=True)

#: Pixels of all batches under way in a process, at most: 6 bytes each for three bands.
MOST_PIXELS = 2**26


class Begin(Protocol[T_co]):
    """Begins to make a batch; the function that it returns waits for it."""

    def __call__(self, rows: Rows, cancelled: threading.Event) -> Callable[[], T_co]:
        """Begin the batch of some rows; give it up when *cancelled* is set."""
        ...


@dataclass(frozen=True)
class _Batch(Generic[T]):
    rows: Rows
    finish: Callable[[], T]
    cancelled: threading.Event


class ReadAhead(Generic[T]):
    """The next batches of one worker of a DataLoader.

    With W workers and batches of B rows, worker w makes the batches that begin at
    ``w * B``, ``(w + W) * B`` and so on of the rows in the order in which they are
    asked for. Where that is not so (rows are shuffled, or a part of them is asked for),
    the worker reads nothing ahead until it is asked for its first batch again.

    Args:
        expected: All rows, int64, in the order in which they will be asked for.
        worker: Number of this worker.
        workers: How many there are.
        begin: Begins to make a batch.
        ahead: How many rows to have under way besides the batch of a row.
    """

    def __init__(
        self,
        expected: Tensor,
        worker: int,
        workers: int,
        begin: Begin[T],
        ahead: Callable[[int], int],
    ) -> None:
        self._expected: Rows = expected.numpy()
        self._worker, self._workers = worker, workers
        self._begin, self._ahead = begin, ahead
        self._under_way: deque[_Batch[T]] = deque()
        self._next = 0

    def take(self, rows: Rows) -> T:
        """Make a batch, and begin the ones after it.

        Args:
            rows: What is asked for.

        Returns:
            What the function that ``begin`` gave for these rows returns.
        """
        if not (self._under_way and np.array_equal(self._under_way[0].rows, rows)):
            self._restart(rows)
        self._fill(len(rows), self._ahead(int(rows[0])))
        if not self._under_way:
            return self._begin(rows, threading.Event())()
        return self._under_way.popleft().finish()

    def _restart(self, rows: Rows) -> None:
        """Forget what is under way; go on from *rows* if they are a first batch."""
        for batch in self._under_way:
            batch.cancelled.set()
        self._under_way.clear()
        start = self._worker * len(rows)
        here = np.array_equal(self._expected[start : start + len(rows)], rows)
        self._next = start if here else len(self._expected)

    def _fill(self, size: int, ahead: int) -> None:
        # Besides this batch, the next one at least if there may be any.
        most = size + max(ahead, size if ahead else 0)
        while self._next < len(self._expected) and (
            sum(len(batch.rows) for batch in self._under_way) < most
        ):
            rows = self._expected[self._next : self._next + size]
            cancelled = threading.Event()
            self._under_way.append(
                _Batch(rows, self._begin(rows, cancelled), cancelled)
            )
            self._next += size * self._workers


def begin(
    dataset: Any, queries: Sequence[Any], on_error: OnError, cancelled: threading.Event
) -> Callable[[], Sequence[Sample | Exception | None]]:
    """Begin to get samples from a dataset, or leave it all to the function returned."""
    if hasattr(dataset, 'begin'):
        started: Callable[[], Sequence[Sample | Exception | None]]
        started = dataset.begin(queries, on_error, cancelled)
        return started
    return lambda: fetch_each(dataset, queries, on_error)


def reads_ahead(datasets: Iterable[Any]) -> bool:
    """Whether there is a dataset that fetches in the background."""
    return any(hasattr(dataset, 'begin') for dataset in datasets)


def chips_ahead(datasets: Iterable[Any], pixels: int) -> int:
    """How many chips of so many pixels keep this process's requests in flight."""
    shares = (getattr(dataset, 'concurrency', 0) for dataset in datasets)
    return min(2 * max(shares, default=0), MOST_PIXELS // pixels)
