"""A progress bar that counts chips."""

import logging
import sys
from collections.abc import Mapping, Sized
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from dynamicvis_geo.callbacks.predictions import find_chip_table
from dynamicvis_geo.datasets import ChipDataset
from dynamicvis_geo.datasets.batches import Batches
from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.formats.base import RunChips

_logger = logging.getLogger(__name__)


class ChipProgress(ProgressBar):
    """Progress bar that shows chips, chips a second, retries and failures.

    The first process draws it, for its own share of the chips: all shares are of one
    size. Every process logs a line when it begins and when it has done its share. In
    the place of Lightning's own bar: ``Trainer(callbacks=[ChipProgress()])``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Any = None
        self._table: RunChips | None = None
        self._chips = 0
        self._failed = 0

    def enable(self) -> None:
        """Draw the bar."""
        self._enabled = True

    def disable(self) -> None:
        """Draw nothing; Lightning asks for this in all processes but the first."""
        self._enabled = False

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        self._chips = self._failed = 0
        self._table = _chips_of(trainer)
        total = _share(trainer)
        rank, world = trainer.global_rank, trainer.world_size
        _logger.info(
            'process %d of %d: %s chips on %s',
            rank,
            world,
            'an unknown number of' if total is None else total,
            trainer.strategy.root_device,
        )
        self._bar = tqdm(
            total=total,
            unit='chip',
            desc='embed' if world == 1 else f'embed, 1 of {world} processes',
            disable=not self._enabled,
            file=sys.stderr,
            dynamic_ncols=True,
            smoothing=0.05,
        )

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the chips of a batch."""
        done, failed = _count(outputs)
        self._chips += done
        self._failed += failed
        if self._bar is None or not done + failed:
            return
        table = self._table
        retries = {'retries': table.retries} if isinstance(table, ChipDataset) else {}
        self._bar.set_postfix({**retries, 'failed': self._failed}, refresh=False)
        self._bar.update(done + failed)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar as it is."""
        self._close()
        _logger.info(
            'process %d of %d: done, %d chips, %d failed',
            trainer.global_rank,
            trainer.world_size,
            self._chips,
            self._failed,
        )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let messages begin on a line of their own."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _share(trainer: Trainer) -> int | None:
    """Chips that this process will do; None if that is not known."""
    loaders = trainer.predict_dataloaders
    if not isinstance(loaders, list | tuple):
        loaders = [loaders]
    total = 0
    for loader in loaders:
        batches = getattr(loader, 'dataset', None)
        if isinstance(batches, Batches):
            total += batches.chips
            continue
        # Lightning's own batch sampler carries the sampler of the one that it wraps.
        sampler = getattr(getattr(loader, 'batch_sampler', None), 'sampler', None)
        if not isinstance(sampler, Sized):
            return None
        total += len(sampler)
    return total


def _chips_of(trainer: Trainer) -> RunChips | None:
    try:
        return find_chip_table(trainer.predict_dataloaders)
    except OutputError:
        return None


def _count(outputs: Any) -> tuple[int, int]:
    """Chips done and failed in the result of a ``predict_step``."""
    if not isinstance(outputs, Mapping):
        return 0, 0
    embedding = outputs.get('embedding')
    done = len(embedding) if isinstance(embedding, torch.Tensor) else 0
    return done, len(outputs.get('failures', ()))
