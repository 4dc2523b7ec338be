"""Blocks on disk as soon as they are whole, while the model computes."""

import logging
import queue
import threading
from collections.abc import Iterable
from datetime import UTC, datetime

import numpy as np

from dynamicvis_geo.callbacks.blocks import block_name, read_description, sweep
from dynamicvis_geo.callbacks.output import Begun, Destination
from dynamicvis_geo.errors import OutputError, RunEndedError
from dynamicvis_geo.formats.base import OpenRun, Predictions
from dynamicvis_geo.formats.block_files import SUFFIX, encode_block

_logger = logging.getLogger(__name__)

#: Blocks that wait to be written, at most, beside the one that is being written.
WAITING = 1


class BlockWriter:
    """Gathers predictions, in any order, and writes each block when it is whole.

    Writing is done by a thread. At most :data:`WAITING` blocks wait for it: then the
    model waits, so that memory stays flat.
    """

    def __init__(
        self, destination: Destination, begun: Begun, mine: Iterable[int]
    ) -> None:
        """Start the thread.

        Args:
            destination: Where features go.
            begun: The run.
            mine: Numbers of the blocks to write; chips of others are dropped.
        """
        self._format, self._dtype = destination.format, destination.dtype
        self._plan, self._description = begun.plan, begun.run
        self._block_of = begun.plan.block_of(len(begun.chips.table))
        self._run = OpenRun(
            destination.store,
            begun.run.id,
            begun.run.provenance,
            begun.chips,
            self._block_of,
            begun.plan.square,
        )
        self._wanted = np.isin(self._block_of, list(mine))
        self._held: dict[int, list[Predictions]] = {}
        self._queue: queue.Queue[tuple[int, list[Predictions]] | None] = queue.Queue(
            WAITING
        )
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._write_blocks, name='embedding-writer', daemon=True
        )
        self._thread.start()

    @property
    def missing(self) -> int:
        """Number of chips of the blocks to write that have not come."""
        return int(self._wanted.sum())

    def add(self, predictions: Predictions) -> tuple[int, int]:
        """Take a batch; waits while too many blocks are waiting already.

        Args:
            predictions: Features and failures of the batch.

        Returns:
            Numbers of chips and of failures in it that are to be written, and were not
            taken before.

        Raises:
            Exception: What stopped the writing, if it has stopped.
        """
        self.check()
        done = failed = 0
        for part in self._parts(predictions):
            rows = part.rows
            number = int(self._block_of[rows[0]])
            self._wanted[rows] = False
            held = self._held.setdefault(number, [])
            held.append(part)
            done += len(part.chip)
            failed += len(part.failures)
            block = self._plan.block(number)
            if not self._wanted[block].any():
                self._queue.put((number, self._held.pop(number)))
        return done, failed

    def check(self) -> None:
        """Raise what stopped the writing, if it has stopped."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Have all whole blocks on disk, and end the thread.

        Raises:
            Exception: What stopped the writing.
        """
        self._queue.put(None)
        self._thread.join()
        self.check()

    def _parts(self, predictions: Predictions) -> list[Predictions]:
        """Cut a batch into what is wanted of it, block by block."""
        _, first = np.unique(predictions.chip, return_index=True)
        wanted = np.zeros(len(predictions.chip), dtype=bool)
        wanted[first] = True
        wanted &= self._wanted[predictions.chip]
        failures = {
            one.chip: one for one in predictions.failures if self._wanted[one.chip]
        }
        rows = np.concatenate(
            [predictions.chip[wanted], np.array(list(failures), np.int64)]
        )
        return [
            predictions.part(
                wanted & (self._block_of[predictions.chip] == number),
                [f for row, f in failures.items() if self._block_of[row] == number],
            )
            for number in np.unique(self._block_of[rows])
        ]

    def _write_blocks(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is not None:
                continue
            try:
                self._write(*item)
            except BaseException as error:  # Raised where the next batch is added.
                _logger.debug('writing has stopped', exc_info=True)
                self._error = error

    def _write(self, number: int, parts: list[Predictions]) -> None:
        self._require_run()
        try:
            self._put(number, parts)
        except OutputError:
            # The folder may have been removed meanwhile.
            self._require_run()
            raise

    def _require_run(self) -> None:
        """Check that the run is the one that there is.

        Raises:
            RunEndedError: If it is not.
        """
        store = self._run.store
        there = read_description(store)
        if there is None:
            sweep(store)
        if there is None or there.id != self._description.id:
            raise RunEndedError(
                f"the run in '{store.url}' is gone: another process has finished it, "
                'removed it, or begun another one there'
            )

    def _put(self, number: int, parts: list[Predictions]) -> None:
        run, pooled = self._run, self._format.output == 'pooled'
        given = [part for part in parts if len(part.chip)]
        if given and not pooled:
            self._format.write_maps(run, number, given)
        content = encode_block(
            run.chips,
            self._plan.block(number),
            parts,
            datetime.now(UTC),
            self._dtype if pooled else None,
        )
        run.store.put(
            block_name(self._description, number, SUFFIX), memoryview(content)
        )
