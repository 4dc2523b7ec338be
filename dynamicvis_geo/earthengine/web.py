"""Requests to any server of images: limits, deadlines and retries.

:class:`Client` is what is told of a server; a source of your own is content with a
:class:`WebClient`.
"""

import os
import random
import threading
import time
import warnings
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, TypeVar

import numpy as np
import tenacity

from dynamicvis_geo.earthengine.failures import Failure, classify
from dynamicvis_geo.earthengine.limiter import POLL, CancelledError, Traffic
from dynamicvis_geo.errors import (
    ServerError,
    SourceError,
    SpecError,
    UnavailableError,
)

T = TypeVar('T')
R = TypeVar('R')

#: First and longest wait between tries, in seconds, when the server names none.
FIRST_WAIT, LONGEST_WAIT = 0.25, 30.0

#: Least time of the last try, in seconds.
LEAST_TIME = 1.0

#: Statuses of a server that would fail on any request: it wants credentials, is asked
#: too much, or is not there. None is a server that does not answer.
_OF_THE_SERVER = (None, 401, 429, 502, 503, 504)

#: Limiters and counters of this process, by client: equal clients share theirs.
_shared: dict[Any, Traffic] = {}


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_shared.clear)


@dataclass(frozen=True)
class Client(metaclass=ABCMeta):
    """The limits of requests to a server, and how it is asked.

    Subclasses are frozen dataclasses of plain values, so that they pickle. Equal ones
    share threads and limits in a process.

    Attributes:
        server: Name of the server in messages.
    """

    server: ClassVar[str] = 'The server'

    @property
    @abstractmethod
    def max_concurrency(self) -> int:
        """Requests in flight for the whole job.

        Divided by the ranks of a distributed run and by the workers of a DataLoader, at
        least 1 each.
        """

    @property
    @abstractmethod
    def timeout(self) -> float:
        """Seconds for one request."""

    @property
    @abstractmethod
    def retry_for(self) -> float:
        """Seconds for all tries of one request."""

    def __post_init__(self) -> None:
        for name in ('max_concurrency', 'timeout', 'retry_for'):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise SpecError(f'{name}={value!r} is not a number.')
            if not value > 0:
                raise SpecError(f'{name}={value!r} is not positive.')
        if int(self.max_concurrency) != self.max_concurrency:
            raise SpecError(
                f'max_concurrency={self.max_concurrency!r} is not a whole number.'
            )

    @property
    def identity(self) -> Hashable:
        """The server and the account: clients that share theirs share limits."""
        return self

    @contextmanager
    def attempt(self, seconds: float) -> Iterator[None]:
        """Prepare the server for one request of this thread.

        Args:
            seconds: Time that is left for it.
        """
        yield

    def final_error(
        self, failure: Failure, text: str, chip: str, cancelled: threading.Event
    ) -> Exception:
        """Return the error to raise when no further try is made.

        Args:
            failure: The last try.
            text: Its description.
            chip: Name of the chip.
            cancelled: Gives up when set.
        """
        kind = ServerError if failure.status in _OF_THE_SERVER else SourceError
        return kind(f'{text}.')

    @property
    def traffic(self) -> Traffic:
        """Limit, threads and counters of this process."""
        key = (self.identity, self.limit)
        traffic = _shared.get(key)
        if traffic is None:
            traffic = _shared.setdefault(key, Traffic(self.share(), self.server))
        return traffic

    @property
    def limit(self) -> int:
        """Requests that this process may have in flight."""
        return max(1, int(self.max_concurrency) // _processes())

    def share(self) -> int:
        """Return :attr:`limit`; warn if all processes together exceed theirs."""
        processes = _processes()
        if processes > self.max_concurrency:
            warnings.warn(
                f'{processes} processes fetch at a time, more than max_concurrency='
                f'{self.max_concurrency}: each has one request in flight.',
                stacklevel=2,
            )
        return self.limit

    def request(
        self,
        ask: Callable[[], Any],
        parse: Callable[[Any], R],
        *,
        chip: str,
        cancelled: threading.Event,
        on_retry: Callable[[], None] = lambda: None,
    ) -> R:
        """Ask the server, and again where that may help.

        Args:
            ask: Asks once, and returns bytes or an array.
            parse: Makes the result of what was received, when the next request may be
                under way; raises :class:`~.failures.BrokenAnswerError` if it is not
                what was asked for.
            chip: Name of the chip that is fetched, for errors.
            cancelled: Gives up when set.
            on_retry: Called for each repetition.

        Returns:
            The result of *parse*.

        Raises:
            DynamicVisGeoError: As :meth:`final_error` has it, if it cannot be had.
            CancelledError: If *cancelled* was set meanwhile.
        """
        result: R = _Request(self, ask, parse, chip, cancelled, on_retry).run()
        return result

    def map(
        self,
        function: Callable[[T, threading.Event], R],
        items: Iterable[T],
        cancelled: threading.Event | None = None,
    ) -> Iterator[R]:
        """Apply *function* to items in the threads of this process, as they finish.

        Items are taken as threads become free, so that there may be any number. The
        first exception gives up the rest, and is raised.

        Args:
            function: Called with an item, and an event that is set when the item is
                given up.
            items: What to apply it to.
            cancelled: Gives up all items when set; others may share it.

        Raises:
            CancelledError: If *cancelled* was set meanwhile.
        """
        traffic = self.traffic
        given_up = threading.Event()
        queue = iter(items)
        # One more for each thread, so that none waits for this one to hand it work.
        ahead = 2 * traffic.threads
        running: set[Future[R]] = set()
        try:
            while True:
                if cancelled is not None and cancelled.is_set():
                    raise CancelledError
                for item in islice(queue, ahead - len(running)):
                    running.add(traffic.pool.submit(function, item, given_up))
                if not running:
                    return
                done, running = wait(running, POLL, FIRST_COMPLETED)
                if not done:
                    traffic.silence.look(self.retry_for)
                for future in done:
                    yield future.result()
        finally:
            given_up.set()
            for future in running:
                future.cancel()


@dataclass(frozen=True)
class WebClient(Client):
    """The limits of requests to any server, for a source of your own.

    Args:
        max_concurrency: As for :class:`Client`.
        timeout: As for :class:`Client`; for the source to keep to.
        retry_for: As for :class:`Client`.

    Raises:
        SpecError: If a number is not positive.
    """

    max_concurrency: int = 8
    timeout: float = 60.0
    retry_for: float = 300.0


class _Request:
    """All tries of one request."""

    def __init__(
        self,
        client: Client,
        ask: Callable[[], Any],
        parse: Callable[[Any], Any],
        chip: str,
        cancelled: threading.Event,
        on_retry: Callable[[], None],
    ) -> None:
        self.client = client
        self.ask = ask
        self.parse = parse
        self.chip = chip
        self.cancelled = cancelled
        self.on_retry = on_retry
        self.traffic = client.traffic
        self.started: float | None = None
        self.failure: Failure | None = None

    def run(self) -> Any:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(self.may_try_again),
            wait=self.wait,
            stop=self.out_of_time,
            sleep=tenacity.sleep_using_event(self.cancelled),
            reraise=True,
        )
        try:
            result = retrying(self.attempt)
        except Exception as error:
            failure = classify(error)
            if failure is None:
                raise
            if self.cancelled.is_set():
                raise CancelledError from error
            attempts = retrying.statistics.get('attempt_number', 1)
            raise self.final(failure, attempts) from error
        self.traffic.silence.broken()
        return result

    def attempt(self) -> Any:
        limiter = self.traffic.limiter
        with limiter.slot(self.cancelled):
            if self.cancelled.is_set():
                raise CancelledError
            if self.started is None:
                self.started = time.monotonic()
            self.traffic.count(1, 0, 0)
            try:
                with self.client.attempt(max(self.left, LEAST_TIME)):
                    answer = self.ask()
            except Exception as error:
                failure = classify(error)
                if failure is not None and failure.quota:
                    # Nobody waits longer than this request would.
                    asked, left = failure.retry_after, self.left
                    limiter.refused(asked if asked < left else 0.0)
                raise
            limiter.answered()
        size = answer.nbytes if isinstance(answer, np.ndarray) else len(answer)
        self.traffic.count(0, 0, size)
        return self.parse(answer)

    @property
    def elapsed(self) -> float:
        return 0.0 if self.started is None else time.monotonic() - self.started

    @property
    def left(self) -> float:
        return self.client.retry_for - self.elapsed

    def may_try_again(self, error: BaseException) -> bool:
        self.failure = classify(error)
        if self.failure is None or not self.failure.transient:
            return False
        self.traffic.silence.failed(self.failure.message)
        return True

    def wait(self, state: tenacity.RetryCallState) -> float:
        # Jitter keeps many processes from asking again at the same moment.
        longest = min(FIRST_WAIT * 2 ** (state.attempt_number - 1), LONGEST_WAIT)
        asked = 0.0 if self.failure is None else self.failure.retry_after
        return max(asked, random.uniform(longest / 2, longest))

    def out_of_time(self, state: tenacity.RetryCallState) -> bool:
        if self.cancelled.is_set():
            return True
        if state.upcoming_sleep >= self.left:
            return True
        self.traffic.count(0, 1, 0)
        self.on_retry()
        return False

    def final(self, failure: Failure, attempts: int) -> Exception:
        text = f'{self.chip}: {failure.message}'
        if failure.status is not None:
            text += f' (HTTP status {failure.status})'
        if failure.transient:
            text += f'; gave up after {attempts} tries in {self.elapsed:.1f} s'
        error = self.client.final_error(failure, text, self.chip, self.cancelled)
        if not isinstance(error, UnavailableError | ServerError):
            self.traffic.silence.broken()
        return error


def _processes() -> int:
    """Return how many processes of the job fetch, as this one does."""
    from torch.utils.data import get_worker_info

    worker = get_worker_info()
    return _ranks() * (1 if worker is None else worker.num_workers)


def _ranks() -> int:
    """Processes of a distributed run, all nodes together."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    world = os.environ.get('WORLD_SIZE', '1')
    return max(1, int(world)) if world.isdecimal() else 1
