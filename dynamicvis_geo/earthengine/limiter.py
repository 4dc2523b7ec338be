"""Requests in flight: as many as the server lets in, shared by all of a process."""

import logging
import mmap
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from dynamicvis_geo.earthengine.threads import DaemonPool

#: Seconds after which those that wait look again if they are still wanted.
POLL = 0.5

#: Seconds without an answer after which a user is told: when requests fail and are
#: tried again, and when nothing comes back at all.
TELL_OF_FAILURES, TELL_OF_SILENCE = 10.0, 60.0

_logger = logging.getLogger(__name__)


class CancelledError(Exception):
    """The batch of this request was given up, and the request with it."""


class Limiter:
    """A semaphore whose size follows what the server lets in.

    Places are given in the order in which they are asked for. Else a thread that has
    just given one back would take it again before the next could wake up, and requests
    of a later batch would go before those of one that is waited for.

    Each refusal (HTTP status 429) lowers the limit by one: when all of a burst but a
    few are refused, these few, which the server does let in, become the limit at once.
    It grows again by one when ``patience`` times that many requests were answered. A
    growth that is refused at once doubles the patience (the limit is a real one, so it
    is tried rarely); one that holds halves it (the trouble is over, so it recovers
    faster and faster).

    Args:
        most: Upper bound of the limit.
        clock: Seconds, monotonic.
    """

    #: Bounds of the patience, in rounds of answered requests.
    PATIENCE = (1, 64)

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self.limit = most
        self.in_flight = 0
        self.refusals = 0
        self._clock = clock
        self._lock = threading.Lock()
        #: Those that wait, each with a condition of its own, first come first.
        self._queue: deque[threading.Condition] = deque()
        self._not_before = 0.0
        self._patience = 4
        self._answered = 0
        self._probing = False

    @contextmanager
    def slot(self, cancelled: threading.Event | None = None) -> Iterator[None]:
        """Hold one of the places in flight, waiting for it if need be.

        Args:
            cancelled: Ends the waiting when set.

        Raises:
            CancelledError: If *cancelled* is set.
        """
        turn = threading.Condition(self._lock)
        with self._lock:
            self._queue.append(turn)
            try:
                while self._queue[0] is not turn or self._wait() != 0:
                    if cancelled is not None and cancelled.is_set():
                        raise CancelledError
                    turn.wait(min(self._wait() or POLL, POLL))
                self.in_flight += 1
            finally:
                self._queue.remove(turn)
                self._wake()
        try:
            yield
        finally:
            with self._lock:
                self.in_flight -= 1
                self._wake()

    def _wake(self) -> None:
        """Tell the first of the queue that there is a place."""
        if self._queue and self.in_flight < self.limit:
            self._queue[0].notify()

    def _wait(self) -> float | None:
        """Seconds until a place may be free: 0 now, None when another is given back."""
        if self.in_flight >= self.limit:
            return None
        return max(0.0, self._not_before - self._clock())

    def refused(self, retry_after: float = 0.0) -> None:
        """Note that the server refused the request of the caller, who holds a slot.

        Args:
            retry_after: Seconds for which nobody in this process shall ask again.
        """
        with self._lock:
            self.refusals += 1
            self.limit = max(1, self.limit - 1)
            self._not_before = max(self._not_before, self._clock() + retry_after)
            if self._probing:
                self._probing = False
                self._answered = 0
                self._patience = min(self._patience * 2, self.PATIENCE[1])

    def answered(self) -> None:
        """Note that the server answered a request."""
        with self._lock:
            if self.limit == self.most and not self._probing:
                return
            self._answered += 1
            if self._probing and self._answered >= self.limit:
                self._probing = False
                self._patience = max(self._patience // 2, self.PATIENCE[0])
            if self.limit < self.most and (
                self._answered >= self._patience * self.limit
            ):
                self.limit += 1
                self._answered = 0
                self._probing = True
                self._wake()


class Counts(NamedTuple):
    """Requests and bytes of a process.

    Attributes:
        requests: Requests sent.
        retries: How many of them were repetitions.
        received: Bytes received.
    """

    requests: int = 0
    retries: int = 0
    received: int = 0


class Silence:
    """Tells a user once that a server has not answered for a while.

    Forked workers of a DataLoader speak with one voice.

    Args:
        server: Name of the server in the warning.
    """

    #: When a silence was told of last, for a process and all that it forks.
    _told = mmap.mmap(-1, 8)

    def __init__(self, server: str) -> None:
        self._server = server
        self._failure: str | None = None
        self._since = self._looked = 0.0

    def failed(self, words: str) -> None:
        """Note the reason for which a request is to be tried again.

        Args:
            words: The reason.
        """
        self._failure = words

    def broken(self) -> None:
        """Note that the server has answered."""
        self._since, self._failure = 0.0, None

    def look(self, retry_for: float) -> None:
        """Warn once if it has been long; to be called again and again while waiting.

        Args:
            retry_for: Seconds for all tries of a request.
        """
        now = time.monotonic()
        if not self._since or now - self._looked > 10 * POLL:
            # Until now nobody was waiting.
            self._since = now
        self._looked = now
        patience = TELL_OF_SILENCE if self._failure is None else TELL_OF_FAILURES
        (told,) = struct.unpack('d', self._told[:])
        if now - self._since < patience or told >= self._since:
            return
        self._told[:] = struct.pack('d', now)
        since = time.time() - (now - self._since)
        _logger.warning(
            '%s has not answered since %s%s; waiting for it until %s',
            self._server,
            _time_of_day(since),
            '' if self._failure is None else f', trying again: {self._failure}',
            _time_of_day(since + retry_for),
        )


class Traffic:
    """Limit, threads and counts that all equal clients of one process share.

    Attributes:
        limiter: Admits requests.
        pool: Threads that make them.
        threads: Number of these threads.
        counts: What was sent and received so far.
        silence: Tells of it if it lasts.

    Args:
        share: Requests that this process may have in flight.
        server: Name of the server in messages.
    """

    def __init__(self, share: int, server: str) -> None:
        self.limiter = Limiter(share)
        # More threads than requests in flight: the others decode what has arrived,
        # or wait before they try again.
        self.threads = share + share // 2 + 4
        self.pool = DaemonPool(self.threads, server.lower().replace(' ', '-'))
        self.counts = Counts()
        self.silence = Silence(server)
        self._lock = threading.Lock()

    def count(self, *more: int) -> None:
        """Add to the counts, in their order.

        Args:
            *more: Requests, retries and bytes received to add.
        """
        with self._lock:
            self.counts = Counts(*map(sum, zip(self.counts, more, strict=True)))


def _time_of_day(seconds: float) -> str:
    return time.strftime('%H:%M:%S', time.localtime(seconds))
