"""Requests in flight all the time: batches are submitted before they are asked for.

Whoever makes one batch after the other waits for the slowest request of each, and then
for the first of the next.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
T = TypeVar('T')
#: Starts the batch of some rows, to be given up when the event is set; the function
#: that it returns waits for it.
Submit: TypeAlias = Callable[[Rows, threading.Event], Callable[[], T]]

#: Pixels of all batches under way in a process, at most: 6 bytes each for three bands.
MOST_PIXELS = 2**26


def read_ahead(
    batches: Iterable[Rows], submit: Submit[T], ahead: Callable[[int], int]
) -> Iterator[T]:
    """Make batches one after the other, with the next ones under way.

    All are given up when an error ends it, or nobody goes on with it. Requests of
    several batches may overtake each other, so that later batches may be there when one
    fails: they are given before the error is raised, and are not fetched in vain.

    Args:
        batches: Rows of each batch, none of them empty.
        submit: Starts a batch.
        ahead: How many rows at least to have under way besides the batch of a row.

    Yields:
        The result of each batch.
    """
    under_way: deque[tuple[Rows, Callable[[], T]]] = deque()
    cancelled = threading.Event()
    try:
        for rows in batches:
            under_way.append((rows, submit(rows, cancelled)))
            while under_way:
                first, *others = (rows for rows, _ in under_way)
                if sum(map(len, others)) < ahead(int(first[0])):
                    break
                yield under_way.popleft()[1]()
        while under_way:
            yield under_way.popleft()[1]()
    except Exception:
        cancelled.set()
        for _, finish in under_way:
            try:
                batch = finish()
            except Exception:  # Given up; the first error is raised.
                continue
            yield batch
        raise
    finally:
        cancelled.set()


def chips_ahead(concurrency: int, pixels: int) -> int:
    """Count the chips to have under way, so that requests are in flight all the time.

    Args:
        concurrency: Most requests in flight.
        pixels: Pixels of a chip.

    Returns:
        Two a request, but no more than :data:`MOST_PIXELS` allow.
    """
    return min(2 * concurrency, MOST_PIXELS // pixels)
