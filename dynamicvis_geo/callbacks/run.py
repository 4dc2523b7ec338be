"""What belongs to one run of a writer."""

import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from dynamicvis_geo.callbacks.background import Background
from dynamicvis_geo.callbacks.failures import FailureLog
from dynamicvis_geo.callbacks.parents import Parent
from dynamicvis_geo.callbacks.predictions import ChipTable, Predictions
from dynamicvis_geo.callbacks.rendezvous import Rendezvous
from dynamicvis_geo.callbacks.run_folder import RunFolder
from dynamicvis_geo.callbacks.sink import Job, Sink
from dynamicvis_geo.provenance import run_provenance


class Run:
    """What one process knows of the run that it is part of."""

    def __init__(
        self,
        token: str,
        trainer: Trainer,
        module: LightningModule,
        chips: ChipTable | None,
    ) -> None:
        self.token = token
        self.trainer = trainer
        self.module = module
        self.chips = chips
        source = {} if chips is None else chips.provenance
        self.provenance = run_provenance(trainer, module, source)
        #: What made the output that was there before.
        self.existing: Mapping[str, Any] | None = None
        #: Whether nothing was there before.
        self.fresh = False
        #: Whether a run was there that did not end: it may have left finished parts.
        self.interrupted = False
        #: Whether it has failed, and what is done is being put on disk.
        self.ending = False
        self.before = 0
        self.started = time.monotonic()
        self.parent = Parent(trainer.global_rank)
        self.sink: WithFailures | None = None
        self.background: Background | None = None
        self._others: Rendezvous | None = None

    def others(self, folder: RunFolder) -> Rendezvous:
        """Return the other processes of the run."""
        if self._others is None:
            rank, count = self.trainer.global_rank, self.trainer.world_size
            self._others = Rendezvous(folder.path, self.token, rank, count)
        return self._others


class WithFailures:
    """A sink, and the list of failures, on disk at the same moments."""

    def __init__(self, sink: Sink, job: Job) -> None:
        self.assemble = sink.assemble
        self.complete = sink.complete
        self._sink = sink
        self._chips = job.chips
        self._failures = FailureLog(job.target, job.run, job.rank)

    def write(self, predictions: Predictions) -> None:
        """Take one batch."""
        self._failures.add(predictions.failures)
        if len(predictions.chip):
            self._sink.write(predictions)

    def flush(self) -> None:
        """Have on disk all that was taken."""
        self._sink.flush()
        self._failures.flush(self._chips)
