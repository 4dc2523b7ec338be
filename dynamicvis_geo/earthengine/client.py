"""The client: pixels of one grid, with limits, deadlines and retries."""

import logging
import mmap
import os
import pickle
import random
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import ee
import numpy as np
import tenacity
import torch.distributed
import torch.utils.data

from dynamicvis_geo.earthengine.failures import REMEDIES, Failure, classify
from dynamicvis_geo.earthengine.limiter import POLL, CancelledError, Limiter
from dynamicvis_geo.earthengine.session import (
    is_loopback,
    session,
    time_limit,
    users_session,
)
from dynamicvis_geo.earthengine.threads import DaemonPool
from dynamicvis_geo.errors import (
    ComputationError,
    EarthEngineError,
    SpecError,
    UnavailableError,
)
from dynamicvis_geo.grid import Grid

T = TypeVar('T')
R = TypeVar('R')

#: First and longest wait between tries, in seconds, when the server names none.
FIRST_WAIT, LONGEST_WAIT = 0.25, 30.0

#: What the last try gets at least, in seconds.
LEAST_TIME = 1.0

#: Seconds without an answer after which a user is told: when requests fail and are
#: tried again, and when nothing comes back at all.
TELL_OF_FAILURES, TELL_OF_SILENCE = 10.0, 60.0

#: Share of the time for all tries that is spent to tell a server that is away from one
#: that fails on one request.
PROBE_SHARE = 0.05

_logger = logging.getLogger(__name__)

#: Limiters and counters of this process, by client: equal clients share theirs.
_shared: dict[Any, 'Traffic'] = {}


class Counts(NamedTuple):
    """What a process has sent and received.

    Attributes:
        requests: Requests sent.
        retries: How many of them were repetitions.
        received: Bytes received.
    """

    requests: int = 0
    retries: int = 0
    received: int = 0


class Silence:
    """Tells a user once that Earth Engine has not answered for a while.

    Forked workers of a DataLoader speak with one voice.
    """

    #: When a silence was told of last, for a process and all that it forks.
    _told = mmap.mmap(-1, 8)

    def __init__(self) -> None:
        self._failure: str | None = None
        self._since = self._looked = 0.0

    def failed(self, words: str) -> None:
        """Note why a request is to be tried again."""
        self._failure = words

    def broken(self) -> None:
        """Note that the server has answered."""
        self._since, self._failure = 0.0, None

    def look(self, retry_for: float) -> None:
        """Tell if it has been long; to be called again and again while waiting."""
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
            'Earth Engine has not answered since %s%s; waiting for it until %s',
            _time_of_day(since),
            '' if self._failure is None else f', trying again: {self._failure}',
            _time_of_day(since + retry_for),
        )


class Traffic:
    """What all equal clients of one process share.

    Attributes:
        limiter: Admits requests.
        pool: Threads that make them.
        threads: Number of these threads.
        counts: What was sent and received so far.
        silence: Tells of it if it lasts.
    """

    def __init__(self, share: int) -> None:
        self.limiter = Limiter(share)
        # More threads than requests in flight: the others decode what has arrived,
        # or wait before they try again.
        self.threads = share + share // 2 + 4
        self.pool = DaemonPool(self.threads, 'earth-engine')
        self.counts = Counts()
        self.silence = Silence()
        self._lock = threading.Lock()

    def count(self, *more: int) -> None:
        """Add to the counts, in their order."""
        with self._lock:
            self.counts = Counts(*map(sum, zip(self.counts, more, strict=True)))


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_shared.clear)


@dataclass(frozen=True)
class EarthEngineClient:
    """How to reach Earth Engine; holds plain values only, so it pickles.

    Earth Engine is initialised when the first pixels are needed, once a process. A
    session that the user initialised is used as it is. One process can talk to one
    server as one project at a time, which is how the client library is made.

    Args:
        project: Google Cloud project; by default that of the environment
            (``EARTHENGINE_PROJECT``, ``GOOGLE_CLOUD_PROJECT``) or of the credentials.
        url: Server; by default the high-volume endpoint.
        credentials: A google-auth object, the path of a service-account key, or None
            for the stored ones (``earthengine authenticate``, or the application-
            default ones). A server on this machine needs none.
        max_concurrency: Requests in flight for the whole job: divided by the ranks of
            a distributed run and by the workers of a DataLoader, at least 1 each. A
            project may have 40 (see "Earth Engine quotas").
        timeout: Seconds for one request.
        retry_for: Seconds for all tries of one request.

    Raises:
        SpecError: If a number is not positive, or a name or address is none.
    """

    project: str | None = None
    url: str | None = None
    credentials: Any = None
    max_concurrency: int = 32
    timeout: float = 300.0
    retry_for: float = 600.0

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
        if self.project is not None and not str(self.project).strip():
            raise SpecError(
                f'project={self.project!r} is empty: give the id of a Google Cloud '
                'project, or leave it out for that of the environment.'
            )
        if self.url is not None:
            if not _is_address(self.url):
                raise SpecError(
                    f'url={self.url!r} is not the address of a server: '
                    f'write it as {ee.data.HIGH_VOLUME_API_BASE_URL}, or leave it out.'
                )
            object.__setattr__(self, 'url', self.url.rstrip('/'))
        if isinstance(self.credentials, Path):
            object.__setattr__(self, 'credentials', str(self.credentials))

    def __getstate__(self) -> dict[str, Any]:
        """The values, completed by a session that the user initialised here."""
        state = dict(self.__dict__)
        for name, value in users_session().items():
            if state[name] is None and _pickles(value):
                state[name] = value
        return state

    @property
    def is_local(self) -> bool:
        """Whether the server runs on this machine, so that nothing else is needed."""
        return is_loopback(self.url)

    @property
    def traffic(self) -> Traffic:
        """Limit, threads and counters of this process."""
        share = self.share()
        # Credentials other than a path have no equality of their own.
        given = self.credentials
        identity = given if isinstance(given, str) else id(given)
        key = (self.project, self.url, identity, share)
        traffic = _shared.get(key)
        return _shared.setdefault(key, Traffic(share)) if traffic is None else traffic

    def share(self) -> int:
        """Requests that this process may have in flight."""
        worker = torch.utils.data.get_worker_info()
        processes = _ranks() * (1 if worker is None else worker.num_workers)
        if processes > self.max_concurrency:
            warnings.warn(
                f'{processes} processes fetch at a time, more than max_concurrency='
                f'{self.max_concurrency}: each has one request in flight.',
                stacklevel=2,
            )
        return max(1, int(self.max_concurrency) // processes)

    def request(
        self,
        build: Callable[[], dict[str, Any]],
        parse: Callable[[bytes], R],
        *,
        chip: str,
        cancelled: threading.Event,
    ) -> R:
        """Compute pixels, trying again where that may help.

        Args:
            build: Makes the arguments of ``ee.data.computePixels``; called when Earth
                Engine is initialised.
            parse: Makes the result of what was received; raises
                :class:`~.failures.BrokenAnswerError` if it is not what was asked for.
            chip: What is fetched, for errors.
            cancelled: Gives up when set.

        Returns:
            What *parse* returned.

        Raises:
            EarthEngineError: Its subclass that fits, if it cannot be had.
            CancelledError: If *cancelled* was set meanwhile.
        """
        result: R = _Request(self, build, parse, chip, cancelled).run()
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


class _Request:
    """All tries of one request."""

    def __init__(
        self,
        client: EarthEngineClient,
        build: Callable[[], dict[str, Any]],
        parse: Callable[[bytes], Any],
        chip: str,
        cancelled: threading.Event,
    ) -> None:
        self.client = client
        self.build = build
        self.parse = parse
        self.chip = chip
        self.cancelled = cancelled
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
            try:
                body = self.send(self.build, max(self.left, LEAST_TIME))
            except Exception as error:
                failure = classify(error)
                if failure is not None and failure.quota:
                    # Nobody waits longer than this request would.
                    asked, left = failure.retry_after, self.left
                    limiter.refused(asked if asked < left else 0.0)
                raise
            limiter.answered()
        return self.parse(body)

    def send(self, build: Callable[[], dict[str, Any]], seconds: float) -> bytes:
        with time_limit(min(self.client.timeout, seconds)), session(self.client):
            self.traffic.count(1, 0, 0)
            body: bytes = ee.data.computePixels(build())
        self.traffic.count(0, 0, len(body))
        return body

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
        return False

    def final(self, failure: Failure, attempts: int) -> EarthEngineError:
        kind = failure.error
        text = f'{self.chip}: {failure.message}'
        if failure.status is not None:
            text += f' (HTTP status {failure.status})'
        if failure.transient:
            text += f'; gave up after {attempts} tries in {self.elapsed:.1f} s'
        if kind is UnavailableError and failure.transient and self.answers_others():
            kind = ComputationError
            text += ', though Earth Engine answers another request'
        if kind is not UnavailableError:
            self.traffic.silence.broken()
        remedy = REMEDIES.get(kind)
        return kind(
            f'{text}. {remedy}' if remedy else text,
            chip=self.chip,
            status=failure.status,
            server_message=failure.message,
        )

    def answers_others(self) -> bool:
        """Whether the server is there, so that it is this request that it fails on."""
        seconds = max(PROBE_SHARE * self.client.retry_for, LEAST_TIME)
        try:
            with self.traffic.limiter.slot(self.cancelled):
                body = self.send(_build_probe, seconds)
        except Exception as error:
            if classify(error) is None:
                raise
            return False
        return body.startswith(np.lib.format.MAGIC_PREFIX)


def _build_probe() -> dict[str, Any]:
    """The arguments of a request that any server can answer that can answer at all."""
    grid = Grid('EPSG:4326', 0.0, 0.0, width=1, height=1, xres=1.0, yres=1.0)
    return {
        'expression': ee.Image.constant(0),
        'fileFormat': 'NPY',
        'bandIds': ['constant'],
        'grid': grid.to_ee(),
    }


def _ranks() -> int:
    """Processes of a distributed run, all nodes together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    world = os.environ.get('WORLD_SIZE', '1')
    return max(1, int(world)) if world.isdecimal() else 1


def _time_of_day(seconds: float) -> str:
    return time.strftime('%H:%M:%S', time.localtime(seconds))


def _is_address(url: Any) -> bool:
    try:
        address = urlsplit(url)
        # Reading the port checks it.
        return (
            address.scheme in ('http', 'https')
            and bool(address.hostname)
            and address.port != 0
        )
    except (ValueError, TypeError, AttributeError):
        return False


def _pickles(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except (pickle.PicklingError, TypeError, AttributeError):
        return False
    return True
