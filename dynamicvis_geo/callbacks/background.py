"""A thread that writes while the model computes."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from dynamicvis_geo.callbacks.predictions import Predictions

_logger = logging.getLogger(__name__)


class Flushable(Protocol):
    """What takes batches, and puts them on disk when told to."""

    def write(self, predictions: Predictions) -> None:
        """Take one batch."""

    def flush(self) -> None:
        """Have on disk all that was taken."""


#: Seconds between two calls of ``pulse``.
PULSE = 2.0


class Background:
    """Hands batches to a sink from a thread of its own, and flushes it in time.

    At most ``flush_chips`` chips (and one batch) are taken and not yet on disk at any
    time: one half in the sink, one half waiting for it. None waits longer than
    ``flush_seconds`` before the sink starts to put it on disk, also while the model
    waits for images.

    Args:
        sink: What writes.
        flush_chips: Chips that may be lost if the process is killed.
        flush_seconds: Seconds of which the chips may be lost.
        pulse: Called every few seconds, and before every flush; what it raises stops
            the writing.
    """

    def __init__(
        self,
        sink: Flushable,
        flush_chips: int,
        flush_seconds: float,
        pulse: Callable[[], None],
    ) -> None:
        self._sink = sink
        self._half = max(1, flush_chips // 2)
        self._seconds = flush_seconds
        self._pulse = pulse
        self._queue: queue.Queue[Predictions | None] = queue.Queue()
        self._room = threading.Condition()
        self._queued = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, name='embedding-writer', daemon=True
        )
        self._thread.start()

    def put(self, predictions: Predictions) -> None:
        """Take one batch; waits while too much is waiting already.

        Raises:
            Exception: What stopped the writing, if it has stopped.
        """
        with self._room:
            self._room.wait_for(
                lambda: self._queued < self._half or self._error is not None
            )
            self._queued += len(predictions)
        self.check()
        self._queue.put(predictions)

    def check(self) -> None:
        """Raise what stopped the writing, if it has stopped."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Have everything on disk and end the thread.

        Raises:
            Exception: What stopped the writing.
        """
        self._queue.put(None)
        self._thread.join()
        self.check()

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            _logger.debug('writing has stopped', exc_info=True)
            with self._room:
                self._error = error
                self._room.notify_all()

    def _serve(self) -> None:
        held, due, beat = 0, float('inf'), time.monotonic() + PULSE
        while True:
            now = time.monotonic()
            try:
                batch = self._queue.get(timeout=max(0.0, min(due, beat) - now))
            except queue.Empty:
                pass
            else:
                if batch is None:
                    break
                if not held:
                    due = time.monotonic() + self._seconds
                held += len(batch)
                self._sink.write(batch)
                with self._room:
                    self._queued -= len(batch)
                    self._room.notify_all()
            now = time.monotonic()
            if now >= beat:
                self._pulse()
                beat = time.monotonic() + PULSE
            if held >= self._half or now >= due:
                self._pulse()
                self._sink.flush()
                held, due = 0, float('inf')
        self._pulse()
        self._sink.flush()
