"""Predictions on disk block by block, so that nothing that is done is lost."""

import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from dynamicvis_geo import termination
from dynamicvis_geo.callbacks.block_writer import BlockWriter
from dynamicvis_geo.callbacks.blocks import (
    BLOCK_CHIPS,
    DESCRIPTION_FILE,
    Ints,
    block_size,
    finished,
    read_description,
    share,
)
from dynamicvis_geo.callbacks.existing import remove_existing
from dynamicvis_geo.callbacks.output import Begun, Destination, RunSummary
from dynamicvis_geo.callbacks.peers import Peers
from dynamicvis_geo.callbacks.predictions import (
    find_chip_table,
    rows_behind,
    take_predictions,
)
from dynamicvis_geo.callbacks.shards import Shard
from dynamicvis_geo.errors import OutputError, SpecError
from dynamicvis_geo.formats.base import RunChips
from dynamicvis_geo.formats.block_files import SUFFIX
from dynamicvis_geo.paths import AnyPath, Place
from dynamicvis_geo.provenance import run_provenance

_logger = logging.getLogger(__name__)


@dataclass
class _Share:
    """The part of a run that is this process's."""

    begun: Begun
    mine: Ints
    peers: Peers
    started: float
    writer: BlockWriter | None = None


class EmbeddingWriter(BasePredictionWriter):
    """Lightning callback that writes embeddings with their place, time and provenance.

    * Pooled embeddings: one GeoParquet file or a folder of them, a row a chip, which
      GeoPandas, DuckDB and TorchGeo's embedding datasets read
      (:mod:`~dynamicvis_geo.formats.geoparquet` lists the columns), along a Hilbert
      curve.
    * Feature maps (``output='grid'``): a folder with one cloud-optimised GeoTIFF a
      chip, ``<chip_id>.tif`` with a band a feature, and ``metadata.json``; or a Zarr
      store with the chips of each UTM zone as one mosaic.

    The chips are cut into blocks, and each block is put on disk as soon as it is whole,
    in the folder ``<path>.partial`` beside the output. What is on disk is finished: a
    run that is killed, interrupted or fails is continued by running it again, which
    computes only the blocks that are missing. The output is made when all are there. A
    finished output may be extended in the same way, by more places or times; other
    settings are refused, with a table of the differences.

    Any number of processes write one output together: those of a Trainer, of torchrun,
    or shards that know nothing of each other.

    The predict dataloaders should be those of a
    :class:`~dynamicvis_geo.ChipDataModule`, which is told what there is to do. A
    DataLoader of your own over a :class:`~dynamicvis_geo.datasets.ChipDataset` (or a
    subset of one) serves in a single process, and computes finished chips again.
    Memory stays flat with ``trainer.predict(..., return_predictions=False)``: by
    default Lightning collects every prediction besides.

    Attributes:
        written: Number of chips that this process has taken in the current run.
        failed: Number of chips that have failed in this process in the current run.
        summary: A :class:`RunSummary` in the first process, when the run has ended.
    """

    def __init__(
        self,
        path: AnyPath,
        format: str | None = None,  # noqa: A002
        overwrite: bool = False,
        dtype: str = 'float32',
        block_chips: int | None = None,
        retry_failed: bool = False,
        shard: tuple[int, int] | str | None = None,
    ) -> None:
        """Check the arguments, and keep them.

        Args:
            path: File (``.parquet``), store (``.zarr``) or folder to write, or a URL of
                one that fsspec knows; missing parents are created.
            format: 'geoparquet', 'geotiff' or 'zarr'; None takes it from `path`, and
                'geotiff' for a folder.
            overwrite: Remove an existing output, and what an interrupted run has left,
                when the run starts. A folder is removed only if it holds nothing but
                such an output.
            dtype: Type in which embeddings are stored: 'float32', 'float16' (not for
                GeoTIFF), or 'int8' (GeoParquet only), rows of which are multiplied by
                their ``scale``.
            block_chips: Chips of a block, at most: as many are lost by a process that
                is killed. None takes the number with which the output was begun; else
                64 on a CPU, and on a GPU 4096, or 256 feature maps; fewer where their
                maps take more than 192 MiB, or there would not be some blocks for each
                process.
            retry_failed: Compute chips that are listed as failed again. Without it,
                these are left alone.
            shard: Which of several runs that share the work this is, counted from 1:
                ``(3, 10)`` or '3/10' for the third of ten, '/10' in an array job. None
                asks the array job (Slurm, AWS Batch, Google Batch, Kubernetes) that
                this is part of, if it is. The shard that finds all blocks done makes
                the output.

        Raises:
            OutputError: If `path` cannot be used, or `format` is unknown or does not
                fit it.
            SpecError: If another argument has a value that cannot be used.
        """
        super().__init__(write_interval='batch')
        self._output = Destination.of(path, format, dtype, retry_failed)
        if block_chips is not None and (
            isinstance(block_chips, bool)
            or not isinstance(block_chips, int)
            or block_chips < 1
        ):
            raise SpecError(
                f'block_chips={block_chips!r} must be a positive whole number of chips'
            )
        self.shard = Shard.of(shard)
        if self.shard.count > 1:
            _say_shard(self.shard, shard is None or str(shard).startswith('/'))
        if overwrite and self.shard.count > 1:
            raise SpecError(
                f'overwrite=True with shard {self.shard} would remove what '
                f"other shards have done: remove '{self.path}' and what lies beside it "
                'before you start them, and leave it out'
            )
        self.overwrite = overwrite
        self.block_chips = block_chips
        self.written = 0
        self.failed = 0
        self.summary: RunSummary | None = None
        self._run: _Share | None = None

    @property
    def path(self) -> Place:
        """The output: a Path, or a UPath for a URL."""
        return self._output.path

    @property
    def failures(self) -> Place:
        """File that lists chips whose image could not be had, if there are any."""
        return self._output.failures

    def check(self, output: str | None = None) -> None:
        """Refuse what cannot end well, before any work is done.

        Called when a run starts; call it earlier to spare the loading of a model.

        Args:
            output: 'pooled' or 'grid', what the task will give; None if unknown.

        Raises:
            SpecError: If it is to retry what it is to overwrite.
            OutputError: If the task's output does not fit the format, or the path
                cannot be written or holds something else.
        """
        self._output.check(self.overwrite, output)

    def chip_bytes(self, features: tuple[int, int, int]) -> int:
        """Bytes that a chip takes in the output, before compression.

        Args:
            features: Channels, height and width of the feature map of a chip.
        """
        pooled = self._output.format.output == 'pooled'
        numbers = features[0] if pooled else math.prod(features)
        return numbers * np.dtype(self._output.dtype).itemsize

    def remaining(self, chips: RunChips) -> NDArray[np.int64]:
        """Rows of the chips that are still to be computed, ascending.

        Args:
            chips: The chips of the run.

        Raises:
            OutputError: If what there is of the output cannot be read.
        """
        return self._output.remaining(chips, BLOCK_CHIPS['pooled', 'cpu'])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the output, and tell the data module what is to be done.

        Raises:
            OutputError: As :meth:`check` raises it; or if the output was made, or
                begun, with other settings.
        """
        super().setup(trainer, pl_module, stage)
        if stage != 'predict':
            return
        termination.join(trainer)
        self.written = self.failed = 0
        self.summary = self._run = None
        output = getattr(pl_module, 'output', None)
        self.check(output if isinstance(output, str) else None)
        # Not before all processes have looked at what is there.
        trainer.strategy.barrier('EmbeddingWriter: output checked')
        self._remove_existing(trainer)
        module = getattr(trainer, 'datamodule', None)
        if module is None or not hasattr(module, 'take'):
            return
        run = self._begin(trainer, pl_module, module.chips)
        plan = run.begun.plan
        module.take([plan.block(number) for number in run.mine.tolist()])

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to write.

        Raises:
            OutputError: If the predict dataloader is not over a ChipDataset.
            SpecError: If several processes should share a DataLoader of the user's.
        """
        termination.begin(trainer)
        if self._run is None:
            self._begin_late(trainer, pl_module)
        self._start()

    def _start(self) -> None:
        run = self._run
        if run is None:
            raise RuntimeError('EmbeddingWriter.setup() has not run')
        if run.writer is None:
            run.writer = BlockWriter(self._output, run.begun, run.mine.tolist())

    def _begin_late(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin a run over dataloaders that could not be told what to do."""
        loaders = trainer.predict_dataloaders
        chips = find_chip_table(loaders)
        if trainer.world_size > 1 or self.shard.count > 1:
            raise SpecError(
                f'{trainer.world_size} processes in shard {self.shard} cannot share '
                'this DataLoader, since a block is done by one of them: give the '
                'datasets and samplers to a ChipDataModule, '
                'trainer.predict(task, datamodule=ChipDataModule(pairs))'
            )
        run = self._begin(trainer, module, chips, rows_behind(loaders))
        plan = run.begun.plan
        left = sum(len(plan.block(number)) for number in run.mine.tolist())
        if left < len(plan.rows):
            _logger.warning(
                '%d chips are finished, and will be computed again, since a DataLoader '
                'gives all it has: ChipDataModule leaves them out',
                len(plan.rows) - left,
            )

    def _remove_existing(self, trainer: Trainer) -> None:
        """Remove what is to be overwritten, in the first process."""
        # A process that torchrun has started again goes on.
        again = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')) > 0
        error: str | None = None
        if self.overwrite and not again and trainer.is_global_zero:
            try:
                remove_existing(self.path)
            except OutputError as refused:
                error = str(refused)
        error = trainer.strategy.broadcast(error)
        if error is not None:
            raise OutputError(error)

    def _begin(
        self,
        trainer: Trainer,
        module: LightningModule,
        chips: RunChips,
        rows: Ints | None = None,
    ) -> _Share:
        """Find out what there is to do, and what of it is done."""
        provenance = run_provenance(trainer, module, chips.provenance)
        # For an output without a chip.
        provenance['emb:dimensions'] = getattr(module, 'embedding_dim', None)
        size = block_size(
            len(chips.table),
            self._output.format.output,
            trainer.strategy.root_device.type,
            trainer.world_size * self.shard.count,
            getattr(module, 'feature_shape', None),
        )
        begun = self._output.begin(
            chips,
            provenance,
            self.block_chips or size,
            fixed=self.block_chips is not None,
            rows=rows,
        )
        if trainer.is_global_zero:
            self._say(begun)
        shard = self.shard.within(trainer.global_rank, trainer.world_size)
        mine = share(begun.done, shard)
        self._run = _Share(begun, mine, Peers(), time.monotonic())
        return self._run

    def _say(self, begun: Begun) -> None:
        if self.shard.count > 1:
            _logger.info(
                'shard %s: %d of %d blocks are finished',
                self.shard,
                begun.done.sum(),
                len(begun.done),
            )
        if begun.failed:
            _logger.warning(
                '%d chips have failed before and are left alone (%s): retry_failed '
                '(--retry-failed) tries them again',
                begun.failed,
                self.failures,
            )

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
        if run is None or run.writer is None:
            raise RuntimeError('EmbeddingWriter.on_predict_start() has not run')
        predictions = take_predictions(prediction, self._output.format.output)
        done, failed = run.writer.add(predictions)
        self.written += done
        self.failed += failed

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the output."""
        self._finish(trainer)

    def teardown(
        self, trainer: Trainer, pl_module: LightningModule, stage: str
    ) -> None:
        """Complete the output if there were no chips: Lightning then runs no loop."""
        if stage == 'predict' and self._run is not None:
            self._start()
            self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        run = self._run
        if run is None or run.writer is None:
            return
        run.writer.close()
        missing = run.writer.missing
        written, missing = run.peers.total([self.written, missing])
        if missing:
            _logger.warning(
                '%d chips have not come, so that there is no %s yet: the Trainer has a '
                'limit_predict_batches, or the sampler of the DataLoader leaves them '
                'out (give a Subset of the dataset instead); whole blocks are kept',
                missing,
                self.path,
            )
        elif trainer.is_global_zero:
            self.summary = self._complete(run, written)
        # Nobody goes on before the output is there.
        run.peers.total([0])
        run.peers.close()
        self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        self._run = None
        module: Any = getattr(trainer, 'datamodule', None)
        if hasattr(module, 'take'):
            module.take(None)

    def _complete(self, run: _Share, written: int) -> RunSummary:
        """Make the output if all blocks are done, in the first process."""
        missing = self._output.finish(run.begun.run, self.shard.count > 1)
        return RunSummary(
            path=self.path,
            written=written,
            before=run.begun.before,
            failed=len(self._output.listed()),
            failures=self.failures,
            seconds=time.monotonic() - run.started,
            missing=missing,
        )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Put on disk the blocks that are whole, for the next run to go on from."""
        run = self._run
        self._end(trainer)
        with termination.ending():
            if run is not None and run.writer is not None:
                try:
                    run.writer.close()
                except Exception as error:
                    # What stopped the writing may be what is being handled already.
                    _logger.debug('the last blocks were not written: %s', error)
        if run is not None and trainer.is_global_zero:
            self._say_what_is_kept(run)

    def _say_what_is_kept(self, run: _Share) -> None:
        store, begun = self._output.store, run.begun
        there = read_description(store)
        if there is None or there.id != begun.run.id:
            return
        done = finished(store, begun.run, SUFFIX)
        if done.any() or self.shard.count > 1:
            _logger.warning(
                '%d of %d chips are finished and kept for %s: the same command goes on '
                'from there',
                np.diff(begun.plan.starts)[done].sum(),
                begun.run.chips,
                self.path,
            )
        elif run.begun.fresh:
            # Other settings may be tried.
            store.clear(DESCRIPTION_FILE)


@rank_zero_only
def _say_shard(shard: Shard, told: bool) -> None:
    text = ', as the array job says: --shard 1/1 (shard=(1, 1)) has it do everything'
    _logger.info('this is shard %s%s', shard, text if told else '')
