"""Chips of any TorchGeo datasets for a prediction run."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import geopandas as gpd
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from torchgeo.datasets import GeoDataset
from upath import UPath

from dynamicvis_geo.callbacks.blocks import make_plan, share
from dynamicvis_geo.callbacks.shards import Shard
from dynamicvis_geo.datamodules.plan import Plan
from dynamicvis_geo.datasets import ChipDataset, collate, read_points
from dynamicvis_geo.datasets.batches import Batches, cut
from dynamicvis_geo.datasets.source import OnError, Survey, check_on_error
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.projections import crs_name
from dynamicvis_geo.termination import in_worker
from dynamicvis_geo.transfer import CopiesAhead

if TYPE_CHECKING:
    from dynamicvis_geo.callbacks import EmbeddingWriter

Pairs: TypeAlias = Sequence[tuple[GeoDataset, Iterable[Any]]]

#: Channels, height and width of the feature maps of arch b for images of 512 pixels.
FEATURES = (768, 16, 16)
#: Chips whose requests are counted one by one; of more, a part that is spread evenly.
COUNTED = 10_000
#: Batches of a block, where no writer says what this process does: the squares of a
#: grid then have whole batches if their size is a power of two.
BLOCK_BATCHES = 4

#: What Lightning says of iterable datasets, and of runs with nothing left to do.
_NOT_MEANT = (
    "Couldn't infer the batch indices",
    'Your `IterableDataset` has `__len__` defined',
    'Total length of `DataLoader` across ranks is zero',
)


class ChipDataModule(CopiesAhead):
    """The chips that samplers choose from datasets, divided among all processes.

    One DataLoader goes over the chips of all datasets in blocks of neighbours. An
    :class:`~dynamicvis_geo.EmbeddingWriter` says which blocks a process takes; without
    one they are dealt out among the processes of the Trainer, each chip once.

    Attributes:
        chips: The chips, once ``setup('predict')`` has run, as a Trainer does; it keeps
            those that were put here before.
    """

    chips: ChipDataset

    def __init__(
        self,
        pairs: Pairs = (),
        on_error: OnError = 'raise',
        batch_size: int = 4,
        num_workers: int = 0,
        persistent_workers: bool = False,
        prefetch_factor: int | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        """Keep the arguments.

        Args:
            pairs: Datasets, each with a sampler, as
                :class:`~dynamicvis_geo.ChipDataset` takes them.
            on_error: Whether a chip whose image cannot be had ends the run, as
                :class:`~dynamicvis_geo.ChipDataset` has it.
            batch_size: Chips a batch.
            num_workers: Processes that get images ahead, for each process that
                predicts; with 0 it gets them itself, and ahead only those of a
                :class:`~dynamicvis_geo.datasets.Source`.
            persistent_workers: Whether the workers live on between runs; without
                effect if there are none.
            prefetch_factor: Batches that each worker gets ahead; None leaves it to
                PyTorch (2). Without effect if there are no workers.
            pin_memory: Whether batches are put into page-locked memory, from which they
                reach a GPU while it computes; None does so where the Trainer has one.

        Raises:
            SpecError: If a number is out of range.
        """
        super().__init__()
        for name, value, least in (
            ('batch_size', batch_size, 1),
            ('num_workers', num_workers, 0),
            ('prefetch_factor', prefetch_factor, 1),
        ):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SpecError(f'{name}={value!r} must be a whole number from {least}')
        check_on_error(on_error)
        self.on_error = on_error
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.persistent_workers = persistent_workers
        self.prefetch_factor = prefetch_factor
        self.pin_memory = pin_memory
        # With more processes than chips, some get none.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._given = pairs
        self._pairs: Pairs | None = None
        self._taken: Sequence[NDArray[np.int64]] | None = None

    @property
    def pairs(self) -> Pairs:
        """The datasets and their samplers, laid out when they are first asked for.

        Raises:
            SpecError: If an argument has a value that cannot be used.
            SourceError: If a file cannot be used.
        """
        if self._pairs is None:
            self._pairs = self._make_pairs()
        return self._pairs

    def _make_pairs(self) -> Pairs:
        return self._given

    def take(self, blocks: Sequence[NDArray[np.int64]] | None) -> None:
        """Set the blocks that this process does, until the next time.

        Args:
            blocks: Rows of the chips of each block, in the order in which to do them;
                None for this process's share of all chips, as at first.
        """
        self._taken = blocks

    def _pins_memory(self) -> bool:
        if self.pin_memory is not None:
            return self.pin_memory
        trainer = self.trainer
        return trainer is not None and trainer.strategy.root_device.type == 'cuda'

    def setup(self, stage: str = 'predict') -> None:
        """Lay out the chips, the same ones in every process.

        Args:
            stage: Only ``'predict'`` needs them.

        Raises:
            SpecError: If an argument has a value that cannot be used.
            SourceError: If a file cannot be used.
        """
        if stage == 'predict' and not hasattr(self, 'chips'):
            self.chips = ChipDataset(
                self.pairs, order='hilbert', on_error=self.on_error
            )
            # The samplers of many chips take memory, and are not needed any more.
            self._pairs = None

    def plan(
        self,
        writer: EmbeddingWriter | None = None,
        features: tuple[int, int, int] = FEATURES,
    ) -> Plan:
        """Plan a prediction run, without images, model or network.

        Where the area alone tells that it is too much (:attr:`.Plan.excess`), nothing
        is laid out.

        Args:
            writer: Writes the output, which may hold finished chips; pooled vectors as
                float32 without one.
            features: Channels, height and width of the feature maps of the backbone.

        Returns:
            The plan.

        Raises:
            SpecError: If an argument has a value that cannot be used.
            SourceError: If a file cannot be used.
            OutputError: If what there is of the output cannot be read.
        """
        size = 4 * features[0] if writer is None else writer.chip_bytes(features)
        outline = self._outline(size)
        if outline is not None and outline.excess:
            return outline
        self.setup('predict')
        rows = np.arange(len(self.chips))
        if writer is not None and not writer.overwrite:
            rows = writer.remaining(self.chips)
        survey = self._survey(cut(self._blocks(rows), self.batch_size))
        return self._plan(len(self.chips) - len(rows), survey, size)

    def _outline(self, chip_bytes: int) -> Plan | None:
        """Plan from the area alone, roughly; None if that cannot be done."""
        return None

    def _blocks(
        self,
        rows: NDArray[np.int64] | None = None,
        shard: Shard = Shard(),  # noqa: B008 - frozen
    ) -> list[NDArray[np.int64]]:
        """Return the blocks of some chips, or of all, that are a shard's to do."""
        left_out = np.zeros(len(self.chips), dtype=bool)
        if rows is not None:
            left_out = ~np.isin(np.arange(len(self.chips)), rows)
        plan = make_plan(
            self.chips.table,
            self.chips.source_crs,
            BLOCK_BATCHES * self.batch_size,
            strides=self.chips.strides,
            point_ids=self.chips.point_ids,
            left_out=left_out,
        )
        mine = share(np.zeros(len(plan), dtype=bool), shard)
        return [plan.block(number) for number in mine]

    def _survey(self, batches: Sequence[NDArray[np.int64]]) -> Survey:
        """Count what fetching some chips takes, given the rows of each batch."""
        chips = sum(map(len, batches))
        some = batches[:: max(1, math.ceil(chips / COUNTED))]
        surveys = [self.chips.survey(rows) for rows in some]
        return Survey.total(surveys, len(batches) / max(len(some), 1))

    def _plan(self, finished: int, survey: Survey, chip_bytes: int) -> Plan:
        table = self.chips.table
        return Plan(
            chips=len(table),
            finished=finished,
            zones=tuple(dict.fromkeys(map(crs_name, self.chips.source_crs))),
            side=max(int(table[name].max(initial=0)) for name in ('width', 'height')),
            requests=survey.requests,
            fetch_bytes=survey.bytes,
            chip_bytes=chip_bytes,
        )

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return a DataLoader over the chips that this process takes."""
        self.setup('predict')
        blocks = self._taken
        if blocks is None:
            shard = Shard()
            if self.trainer is not None:
                shard = Shard(self.trainer.global_rank, self.trainer.world_size)
            blocks = self._blocks(shard=shard)
        for message in _NOT_MEANT:
            warnings.filterwarnings('ignore', message)
        workers = self.num_workers > 0
        return DataLoader(
            Batches(self.chips, blocks, self.batch_size),
            batch_size=None,
            collate_fn=collate,
            worker_init_fn=in_worker,
            num_workers=self.num_workers,
            persistent_workers=self.persistent_workers and workers,
            prefetch_factor=self.prefetch_factor if workers else None,
            pin_memory=self._pins_memory(),
        )


def points_of(points: Any) -> gpd.GeoDataFrame:
    """Return points as a table, read if they are the path of a file.

    Raises:
        SourceError: If the file cannot be used.
    """
    if isinstance(points, str | os.PathLike | UPath):
        return read_points(points)
    return points
