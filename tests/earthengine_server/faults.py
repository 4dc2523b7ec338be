"""Which requests fail, and how, and how many there were."""

import random
import threading
import time
from collections import deque
from contextlib import contextmanager
from typing import Any

#: Ways to fail besides HTTP statuses.
KINDS = (
    *('reset', 'close', 'truncated', 'short', 'html'),
    *('hang', 'dripping head', 'dripping body'),
)

#: Requests of which the log knows.
KEPT = 10_000


class Faults:
    """Decides on each request for pixels, and keeps count."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.set()

    def set(
        self,
        latency: Any = 0.0,
        limit: Any = None,
        script: Any = (),
        kinds: Any = (),
        rate: Any = 0.0,
        seed: Any = 0,
        retry_after: Any = None,
        message: Any = None,
        hang_s: Any = 30.0,
        sick: Any = (),
    ) -> None:
        """Start anew.

        Args:
            latency: Seconds before each answer, or a pair: at random between them.
            limit: Requests at a time; more are answered with 429.
            script: What happens to the first requests: None, a status, or a kind.
            kinds: What happens to a share of the others, at random.
            rate: That share.
            seed: Of the randomness.
            retry_after: Value of the header of that name in all failures.
            message: The words of failures with a status.
            hang_s: Seconds after which a hanging or dripping request is let go.
            sick: Left edges of grids, in their CRS, that always get the first kind.
        """
        with self.lock:
            self.latency, self.limit, self.retry_after = latency, limit, retry_after
            self.message, self.hang_s = message, hang_s
            self.script = deque(script)
            self.kinds, self.rate, self.sick = tuple(kinds), rate, tuple(sick)
            self.random = random.Random(seed)
            self.counts = {'requests': 0, 'served': 0, 'peak': 0, 'refused': 0}
            self.counts['initialized'] = 0
            self.log: deque[dict] = deque(maxlen=KEPT)
            self.in_flight = 0

    @contextmanager
    def request(self, grid: dict) -> Any:
        """Count a request in and out; gives what shall happen to it."""
        with self.lock:
            # What ends after a new start belongs to the old one.
            counts = self.counts
            self.in_flight += 1
            self.counts['requests'] += 1
            self.counts['peak'] = max(self.counts['peak'], self.in_flight)
            left = grid.get('affineTransform', {}).get('translateX')
            fault = self.kinds[0] if left in self.sick else self._next()
            if self.limit is not None and self.in_flight > self.limit:
                fault = 429
                self.counts['refused'] += 1
            self.log.append({'grid': grid, 'fault': fault})
        try:
            yield fault
        finally:
            with self.lock:
                self.in_flight -= counts is self.counts
                counts['served'] += fault is None

    def wait(self) -> None:
        """Let the latency of an answer pass."""
        with self.lock:
            latency = self.latency
            if isinstance(latency, list | tuple):
                latency = self.random.uniform(*latency)
        time.sleep(latency)

    def _next(self) -> Any:
        if self.script:
            return self.script.popleft()
        if self.kinds and self.random.random() < self.rate:
            return self.random.choice(self.kinds)
        return None
