"""Predictions on disk as they come, so that nothing that is done is lost."""

import logging
import math
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from dynamicvis_geo import termination
from dynamicvis_geo.callbacks.background import Background
from dynamicvis_geo.callbacks.existing import (
    check_place,
    check_settings,
    existing_provenance,
    remove_existing,
    remove_temporary,
)
from dynamicvis_geo.callbacks.failures import (
    failed_keys,
    failures_file_of,
    merge_failures,
)
from dynamicvis_geo.callbacks.formats import FORMATS, is_folder, resolve_format
from dynamicvis_geo.callbacks.predictions import (
    ChipTable,
    Predictions,
    find_chip_table,
    planned_chips,
)
from dynamicvis_geo.callbacks.run import Run, WithFailures
from dynamicvis_geo.callbacks.run_folder import RunFolder
from dynamicvis_geo.callbacks.sink import Job
from dynamicvis_geo.chip_keys import join_keys
from dynamicvis_geo.errors import OutputError, SpecError
from dynamicvis_geo.paths import output_path
from dynamicvis_geo.provenance import run_history

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSummary:
    """What became of a run, all processes together.

    Attributes:
        path: The output.
        written: Chips that this run has written.
        before: Chips that were finished before it.
        failed: Chips whose image could not be had, listed in `failures`.
        failures: File that lists them, if there are any.
        seconds: Time that it took.
    """

    path: Path
    written: int
    before: int
    failed: int
    failures: Path
    seconds: float


class EmbeddingWriter(BasePredictionWriter):
    """Lightning callback that writes embeddings with their place, time and provenance.

    * Pooled embeddings: one GeoParquet file or a folder of them, a row a chip, which
      GeoPandas, DuckDB and TorchGeo's embedding datasets read
      (:mod:`~dynamicvis_geo.callbacks.geoparquet` lists the columns), in the order of a
      Hilbert curve.
    * Feature maps (``output='grid'``): a folder with one cloud-optimised GeoTIFF a
      chip, ``<chip_id>.tif`` with a band a feature, and ``metadata.json``; or a Zarr
      store with the chips of each UTM zone as one mosaic.

    Any number of processes write one output together. Chips are put on disk as the run
    goes on, in a folder ``<path>.partial`` beside the output (or, one file a chip, in
    the output itself). What is on disk is finished: a run that is killed, interrupted
    or fails is continued by running it again, which computes only what is missing and
    ends with the same rows. A finished output may be extended in the same way, by more
    places or times; other settings are refused, with a table of the differences.

    The predict dataloader must be over a :class:`~dynamicvis_geo.datasets.ChipDataset`
    (or a subset of one), from which each embedding's place and time are taken. Memory
    stays flat with ``trainer.predict(..., return_predictions=False)``: by default
    Lightning collects every prediction besides.

    Attributes:
        written: Number of chips that this process has written in the current run.
        failed: Number of chips that have failed in this process in the current run.
        summary: A :class:`RunSummary` in the first process, when the run has ended.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        format: str | None = None,  # noqa: A002
        overwrite: bool = False,
        dtype: str = 'float32',
        flush_chips: int = 4096,
        flush_seconds: float = 60.0,
        retry_failed: bool = False,
    ) -> None:
        """Initialize a new EmbeddingWriter.

        Args:
            path: File (``.parquet``), store (``.zarr``) or folder to write; missing
                parents are created.
            format: 'geoparquet', 'geotiff' or 'zarr'; None takes it from `path`, and
                'geotiff' for a folder.
            overwrite: Remove an existing output, and what an interrupted run has left,
                when the run starts. A folder is removed only if it holds nothing but
                such an output.
            dtype: Type in which embeddings are stored: 'float32', 'float16' (not for
                GeoTIFF), or 'int8' (GeoParquet only), rows of which are multiplied by
                their ``scale``.
            flush_chips: Chips that may be lost when a process is killed.
            flush_seconds: Seconds for which a chip may wait before it is put on disk.
            retry_failed: Compute just the chips that are listed as failed. Without it,
                these are left alone.

        Raises:
            OutputError: If `path` is a URL or no path, or `format` is unknown or does
                not fit it.
            SpecError: If another argument has a value that cannot be used.
        """
        super().__init__(write_interval='batch')
        self.path = output_path(path, 'path').resolve()
        self.format = resolve_format(self.path, format)
        self._kind = FORMATS[self.format]
        if dtype not in self._kind.dtypes:
            raise SpecError(
                f'dtype={dtype!r} cannot be stored as {self.format}: choose one of '
                f'{", ".join(self._kind.dtypes)}'
            )
        for name, value in (
            ('flush_chips', flush_chips),
            ('flush_seconds', flush_seconds),
        ):
            if isinstance(value, bool) or not value > 0:
                raise SpecError(f'{name}={value!r} must be positive')
        if overwrite and retry_failed:
            raise SpecError(
                'retry_failed (--retry-failed) goes on with an output that overwrite '
                '(--overwrite) removes: leave out one of them'
            )
        self.overwrite = overwrite
        self.dtype = dtype
        self.flush_chips = flush_chips
        self.flush_seconds = flush_seconds
        self.retry_failed = retry_failed
        self.written = 0
        self.failed = 0
        self.summary: RunSummary | None = None
        self._folder = RunFolder(self.path)
        self._run: Run | None = None

    @property
    def failures(self) -> Path:
        """File that lists chips whose image could not be had, if there are any."""
        return failures_file_of(self.path)

    def check(self, output: str | None = None) -> None:
        """Refuse what cannot end well, before any work is done.

        Called when a run starts; call it earlier to spare the loading of a model.

        Args:
            output: 'pooled' or 'grid', what the task will give; None if unknown.

        Raises:
            OutputError: If the task's output does not fit the format, or the path
                cannot be written or holds something else.
        """
        needed = self._kind.output
        if output is not None and output != needed:
            raise OutputError(
                {
                    'pooled': f"'{self.path}' is the name of a file of pooled "
                    'embeddings, and this run gives feature maps: name a folder, or '
                    "leave out --grid (output='grid')",
                    'grid': f"'{self.path}' is the name of feature maps, and this run "
                    'gives pooled embeddings: end it in .parquet, or ask for feature '
                    "maps by --grid (output='grid')",
                }[needed]
            )
        folder = is_folder(self.path, self.format)
        check_place(self._folder, folder, self._kind.members, self.overwrite)

    def finished(self) -> pa.StringArray:
        """Keys of the chips that need no computing: finished ones and failed ones.

        :class:`~dynamicvis_geo.datasets.ChipDataset` takes them as ``skip``. That is
        needed only where this callback cannot see the chips before the run: where a
        data module of your own makes the DataLoader.
        """
        done = self._kind.finished(self.path)
        return done if self.retry_failed else join_keys([done, failed_keys(self.path)])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the output, and leave out of the run what is finished.

        Raises:
            OutputError: As :meth:`check` raises it; or if the output was made with
                other settings, or is being written by another run.
        """
        super().setup(trainer, pl_module, stage)
        if stage != 'predict':
            return
        termination.join(trainer)
        self.written = self.failed = 0
        self.summary = None
        output = getattr(pl_module, 'output', None)
        self.check(output if isinstance(output, str) else None)
        # Not before all processes have looked at what is there.
        trainer.strategy.barrier('EmbeddingWriter: output checked')
        token = self._take(trainer)
        chips = planned_chips(trainer)
        self._run = Run(token, trainer, pl_module, chips)
        self._begin(self._run)
        if chips is not None:
            before = self._restrict(chips)
            self._run.before = before

    def _take(self, trainer: Trainer) -> str:
        """Take the output for this run, in the first process; return its token."""
        error: str | None = None
        token = ''
        if trainer.is_global_zero:
            try:
                self._folder.acquire()
                if self.overwrite:
                    remove_existing(self._folder)
                with self._folder.errors():
                    self._kind.recover(self.path)
                remove_temporary(self._folder)
                if is_folder(self.path, self.format):
                    with self._folder.errors():
                        self.path.mkdir(parents=True, exist_ok=True)
                token = secrets.token_hex(4)
            except OutputError as refused:
                error = str(refused)
        token, error = trainer.strategy.broadcast((token, error))
        if error is not None:
            raise OutputError(error)
        return token

    def _begin(self, run: Run) -> None:
        """Check the settings, and say in the folder what is being made."""
        run.interrupted = self._folder.read() is not None
        existing = run.existing = existing_provenance(self._folder)
        if existing is not None:
            if run.chips is not None:
                check_settings(self._folder, existing, run.provenance, self.dtype)
            run.provenance['runs'] = run_history(existing, run.provenance)
        else:
            run.fresh = True
            run.provenance['runs'] = run_history({}, run.provenance)
        # Not before all processes have read what was there.
        run.trainer.strategy.barrier('EmbeddingWriter: settings checked')
        if run.trainer.is_global_zero:
            self._say_what_is_made(run)

    def _say_what_is_made(self, run: Run) -> None:
        stored = {**run.provenance, 'data_type': self.dtype}
        self._folder.begin(run.token, stored)

    def chip_bytes(self, features: tuple[int, int, int]) -> int:
        """Bytes that a chip takes in the output, before compression.

        Args:
            features: Channels, height and width of the feature map of a chip.
        """
        numbers = features[0] if self._kind.output == 'pooled' else math.prod(features)
        return numbers * np.dtype(self.dtype).itemsize

    def set_aside(self, chips: ChipTable) -> tuple[int, int]:
        """Leave out of the chips what is finished or, unless asked for, has failed.

        Returns:
            Numbers of chips that are finished, and that are listed as failed.
        """
        done = self._kind.finished(self.path)
        failed = failed_keys(self.path)
        if self.retry_failed:
            chips.restrict(leave_out=done, only=failed)
        else:
            chips.restrict(leave_out=join_keys([done, failed]))
        return len(done), len(failed)

    def _restrict(self, chips: ChipTable) -> int:
        """Leave out of the run what needs no computing; return how many are done."""
        done, failed = self.set_aside(chips)
        if failed and not self.retry_failed:
            _logger.warning(
                '%d chips have failed before and are left alone (%s): retry_failed '
                '(--retry-failed) tries them again',
                failed,
                self.failures,
            )
        return done

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to write.

        Raises:
            OutputError: If the predict dataloader is not over a ChipDataset.
        """
        termination.begin(trainer)
        self._open(trainer)

    def _open(self, trainer: Trainer) -> Run:
        run = self._run
        if run is None:
            raise RuntimeError('EmbeddingWriter.setup() has not run')
        if run.background is not None:
            return run
        loaders = trainer.predict_dataloaders
        if run.chips is None and loaders is not None:
            self._find_chips(run, loaders)
        job = Job(
            self.path,
            trainer.global_rank,
            trainer.world_size,
            run.token,
            run.chips,
            run.provenance,
            getattr(run.module, 'embedding_dim', None),
            self.dtype,
        )
        sink = WithFailures(self._kind(job), job)
        run.sink = sink
        run.background = Background(
            sink, self.flush_chips, self.flush_seconds, self._pulse
        )
        return run

    def _find_chips(self, run: Run, loaders: Any) -> None:
        """Make up for what could not be done before there were dataloaders."""
        run.chips = find_chip_table(loaders)
        run.provenance['source'] = dict(run.chips.provenance)
        if run.existing is not None:
            check_settings(self._folder, run.existing, run.provenance, self.dtype)
        if run.trainer.is_global_zero:
            self._say_what_is_made(run)
        finished = len(self._kind.finished(self.path))
        if finished and run.trainer.is_global_zero:
            _logger.warning(
                '%d chips are finished, and may be computed again: the data module '
                'shows its chips only when the run has begun. Give it an attribute '
                'chips, or its ChipDataset skip=writer.finished()',
                finished,
            )

    def _pulse(self) -> None:
        """Make sure that this process should still write."""
        run = self._run
        if run is not None:
            run.parent.require()
            self._folder.require(run.token)
            if not run.ending:
                run.others(self._folder).beat()

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Take the embeddings of one batch.

        Raises:
            OutputError: If they are not what the format needs, or cannot be written.
        """
        termination.check()
        run = self._run
        if run is None or run.background is None:
            raise RuntimeError('EmbeddingWriter.on_predict_start() has not run')
        predictions = Predictions.from_step(prediction, self._kind.output)
        with self._folder.errors():
            if len(predictions):
                run.background.put(predictions)
            else:
                run.background.check()
        self.written += len(predictions.chip)
        self.failed += len(predictions.failures)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the output."""
        self._finish(trainer)

    def teardown(
        self, trainer: Trainer, pl_module: LightningModule, stage: str
    ) -> None:
        """Complete the output if there were no chips: Lightning then runs no loop."""
        if stage == 'predict':
            self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        if self._run is None:
            return
        run = self._open(trainer)
        others = run.others(self._folder)
        if run.background is None or run.sink is None:
            raise RuntimeError('EmbeddingWriter has not been opened')
        with self._folder.errors():
            run.background.close()
            others.reach('flushed', f'{self.written}')
            others.wait('flushed')
            run.sink.assemble()
            others.reach('assembled')
            if trainer.is_global_zero:
                others.wait('assembled')
                self._complete(run, run.sink)
            else:
                others.wait('complete', [0])
        self._end(run)

    def _complete(self, run: Run, sink: WithFailures) -> None:
        """Put the output in place, in the first process."""
        self._folder.require(run.token)
        others = run.others(self._folder)
        written = self.written + sum(map(int, others.texts('flushed')))
        if written or run.interrupted or not self._is_complete():
            sink.complete()
        failed = merge_failures(self.path, lambda: self._kind.finished(self.path))
        self.summary = RunSummary(
            path=self.path,
            written=written,
            before=run.before,
            failed=failed,
            failures=self.failures,
            seconds=time.monotonic() - run.started,
        )
        others.reach('complete')
        self._folder.remove()

    def _is_complete(self) -> bool:
        """Whether there is an output with its provenance, which comes last."""
        if self.path.is_dir():
            return (self.path / self._kind.metadata).exists()
        return self.path.exists()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Put on disk what is done, for the next run to go on from."""
        run = self._run
        with termination.ending():
            if run is not None:
                self._flush_the_rest(run)
        if run is None:
            self._folder.release()
            return
        try:
            if not termination.first_knows(exception):
                run.others(self._folder).fail(_first_line(exception))
        except OSError as error:
            _logger.warning('cannot tell the other processes: %s', error)
        if trainer.is_global_zero:
            self._say_what_is_kept(run)
        self._end(run)

    def _flush_the_rest(self, run: Run) -> None:
        # Others that fail at the same time are no reason to lose what is done.
        run.ending = True
        if run.background is not None:
            try:
                run.background.close()
            except Exception as error:
                # What stopped the writing may be what is being handled already.
                _logger.warning('the last chips were not written: %s', error)

    def _say_what_is_kept(self, run: Run) -> None:
        if run.background is None and not run.fresh:
            # Refused before it began: what was there is as it was.
            if self._folder.read() is None:
                self._folder.remove()
            return
        kept = len(self._kind.finished(self.path))
        if kept or len(failed_keys(self.path)):
            _logger.warning(
                '%d chips are finished and kept for %s: the same command goes on from '
                'there',
                kept,
                self.path,
            )
            return
        with self._folder.errors():
            if is_folder(self.path, self.format) and self.path.is_dir():
                self.path.rmdir()
        self._folder.remove()

    def _end(self, run: Run) -> None:
        if run.chips is not None and hasattr(run.chips, 'restrict'):
            run.chips.restrict()
        self._folder.release()
        self._run = None


def _first_line(exception: BaseException) -> str:
    lines = str(exception).strip().splitlines()
    return lines[0] if lines else type(exception).__name__
