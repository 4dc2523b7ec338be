"""Requests in flight all the time: batches begin before they are asked for.

Whoever makes one batch after the other waits for the slowest request of each, and then
for the first of the next.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from dynamicvis_geo.datasets.failures import OnError, Sample, fetch_each

Rows = NDArray[np.int64]
#: Waits for samples that were begun, and gives them or their errors.
Begun: TypeAlias = Callable[[], Sequence[Sample | Exception | None]]
T = TypeVar('T')
T_co = TypeVar('T_co', covariant=True)

#: Pixels of all batches under way in a process, at most: 6 bytes each for three bands.
MOST_PIXELS = 2**26


class Begin(Protocol[T_co]):
    """Begins to make a batch; the function that it returns waits for it."""

    def __call__(self, rows: Rows, cancelled: threading.Event, /) -> Callable[[], T_co]:
        """Begin the batch of some rows; give it up when *cancelled* is set."""
        ...


def read_ahead(
    batches: Iterable[Rows], begin: Begin[T], ahead: Callable[[int], int]
) -> Iterator[T]:
    """Make batches one after the other, with the next ones under way.

    All are given up when an error ends it, or nobody goes on with it.

    Args:
        batches: Rows of each batch, none of them empty.
        begin: Begins to make a batch.
        ahead: How many rows at least to have under way besides the batch of a row.

    Yields:
        What was made of each batch.
    """
    under_way: deque[tuple[Rows, Callable[[], T]]] = deque()
    cancelled = threading.Event()
    try:
        for rows in batches:
            under_way.append((rows, begin(rows, cancelled)))
            while under_way:
                first, *others = (rows for rows, _ in under_way)
                if sum(map(len, others)) < ahead(int(first[0])):
                    break
                yield under_way.popleft()[1]()
        while under_way:
            yield under_way.popleft()[1]()
    finally:
        cancelled.set()


def begin(
    dataset: Any, queries: Sequence[Any], on_error: OnError, cancelled: threading.Event
) -> Begun:
    """Begin to get samples from a dataset, or leave it all to the function returned."""
    if hasattr(dataset, 'begin'):
        started: Begun = dataset.begin(queries, on_error, cancelled)
        return started
    return lambda: fetch_each(dataset, queries, on_error)


def chips_ahead(datasets: Iterable[Any], pixels: int) -> int:
    """How many chips of so many pixels keep this process's requests in flight."""
    shares = (getattr(dataset, 'concurrency', 0) for dataset in datasets)
    return min(2 * max(shares, default=0), MOST_PIXELS // pixels)
