"""Pooled embeddings and their labels, divided for training, choosing and testing."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import DataLoader, Dataset

from dynamicvis_geo.datasets.embeddings import PooledEmbeddings
from dynamicvis_geo.datasets.source import Sample
from dynamicvis_geo.datasets.targets import Labels, Task, encode_labels
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.evaluation.ground import (
    choose_block,
    height_m,
    keep_apart,
    number_places,
    refuse_torn,
    sparse_blocks,
)
from dynamicvis_geo.evaluation.labels import JoinedLabels, join_labels
from dynamicvis_geo.evaluation.splits import (
    SPLITS,
    Splits,
    block_numbers,
    column_split,
    random_split,
    spatial_block_split,
    stratified_split,
)

#: Splits that are drawn; any other name is that of a column.
DRAWN = ('random', 'stratified', 'spatial', 'auto')

_CENTRE = ('centre_lon', 'centre_lat')


@dataclass(frozen=True)
class _Divided:
    """Labelled rows of the embeddings, the split of each, and its block or place."""

    dataset: PooledEmbeddings
    rows: NDArray[np.int64]
    labels: Labels
    splits: Splits
    groups: NDArray[np.int64]
    kind: str
    block_m: float | None
    left_out: int
    notes: tuple[str, ...]
    joined: JoinedLabels | None


class EmbeddingDataModule(LightningDataModule):
    """Pooled embeddings with labels, in splits.

    Files are read when something is first asked for, not when the object is made; it
    may be used with a Trainer or without (:meth:`arrays`). Batches hold ``embedding``
    float32 ``[B, D]``, ``label`` and ``index``, as
    :class:`~dynamicvis_geo.PooledEmbeddings` gives them.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        target: str,
        labels: str | os.PathLike[str] | pd.DataFrame | None = None,
        split: str = 'auto',
        fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
        block_m: float | None = None,
        how: str = 'auto',
        on: str | tuple[str, str] | None = None,
        max_distance_m: float | None = None,
        task: str | None = None,
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Keep the arguments.

        Args:
            path: A GeoParquet file of pooled embeddings, or a folder of its parts.
            target: Column of the labels.
            labels: File or table of labels, joined as
                :func:`~dynamicvis_geo.evaluation.join_labels` says, with a warning if
                some cannot be used; None if the labels are a column of the embeddings.
            split: 'spatial' (whole blocks of land), 'random' or 'stratified' (whole
                places, with all their dates), or the name of a column, of the labels or
                else of the embeddings, that says train, val or test; 'auto' is spatial
                where the places are known, else random. Chips that share ground across
                blocks are left out of training, and of validation; of other splits they
                are counted. :attr:`notes` says how many.
            fractions: Shares of train, val and test.
            block_m: Side of a block of the spatial split, metres on the ground; None
                chooses it, see :func:`~dynamicvis_geo.evaluation.ground.choose_block`.
            how: The way to join labels: 'auto', 'id', 'nearest' or 'within'.
            on: Column of ids, for labels that are joined by id.
            max_distance_m: Greatest distance of the nearest label, metres.
            task: 'binary', 'multiclass', 'multilabel' or 'regression'; None infers it
                from the labels.
            batch_size: Samples a batch.
            num_workers: Processes that read batches; 0 reads in this one, which is
                fastest where the vectors fit in memory.
            seed: Of the splits and of the order of training; the same seed gives the
                same ones.

        Raises:
            SpecError: If a number is out of range.
        """
        super().__init__()
        for name, value, least in (
            ('batch_size', batch_size, 1),
            ('num_workers', num_workers, 0),
        ):
            if value < least:
                raise SpecError(f'{name}={value} must be at least {least}')
        self.path, self.target, self.labels = path, target, labels
        self.split, self.fractions, self.block_m = split, fractions, block_m
        self.how, self.on, self.max_distance_m = how, on, max_distance_m
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._task = task

    def prepare_data(self) -> None:
        """Decode the vectors, once for all processes of a machine."""
        PooledEmbeddings(self.path)

    def setup(self, stage: str | None = None) -> None:
        """Read the labels and divide the samples, unless that was done.

        Args:
            stage: Not used: all splits come from one division.

        Raises:
            SourceError: If a file cannot be used.
            SpecError: If the labels do not fit, or are too few to divide.
        """
        _ = self._divided

    @property
    def dataset(self) -> PooledEmbeddings:
        """All chips of the file, without labels."""
        return self._divided.dataset

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers; none for regression."""
        return self._divided.labels.classes

    @property
    def num_classes(self) -> int:
        """Number of classes: 2 for binary, 0 for regression."""
        return len(self.classes)

    @property
    def task(self) -> Task:
        """'binary', 'multiclass', 'multilabel' or 'regression'."""
        return self._divided.labels.task

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.dataset.dim

    @property
    def provenance(self) -> dict[str, Any]:
        """Provenance of the embeddings, as their file has it."""
        return self.dataset.provenance

    @property
    def joined(self) -> JoinedLabels | None:
        """Labels as they were joined, and what was left over; None without a join."""
        return self._divided.joined

    @property
    def grouped_by(self) -> str:
        """The unit that was divided as a whole: 'block' of land, or 'place'."""
        return 'block' if self._divided.kind == 'spatial' else 'place'

    @property
    def division(self) -> dict[str, Any]:
        """The split: ``kind``, ``fractions``, ``block_m``, ``seed``, ``left_out``."""
        return {
            'kind': self._divided.kind,
            'fractions': self.fractions,
            'block_m': self._divided.block_m,
            'seed': self.seed,
            'left_out': self._divided.left_out,
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on the split that a reader of scores should know."""
        return self._divided.notes

    def groups(self, split: str) -> NDArray[np.int64]:
        """Return the blocks, or places, of a split: chips of one are alike.

        Args:
            split: 'train', 'val' or 'test'.

        Returns:
            int64 ``[n]``, in the order of :meth:`rows`; no number is in two splits.

        Raises:
            SpecError: If there is no such split.
        """
        return self._divided.groups[self._members(split)]

    def rows(self, split: str) -> NDArray[np.int64]:
        """Rows of a split in ``dataset.table``.

        Args:
            split: 'train', 'val' or 'test'.

        Returns:
            int64 ``[n]``, ascending; none if the split has no samples.

        Raises:
            SpecError: If there is no such split.
        """
        return self._divided.rows[self._members(split)]

    def subset(self, split: str) -> PooledEmbeddings:
        """Return a split as a dataset.

        Args:
            split: 'train', 'val' or 'test'.

        Returns:
            Its chips with their labels, in the order of :meth:`rows`.

        Raises:
            SpecError: If there is no such split.
        """
        labels, members = self._divided.labels, self._members(split)
        chosen = Labels(labels.values[members], labels.classes, labels.task)
        return self.dataset.select(self.rows(split), chosen)

    def arrays(self, split: str) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Return a split as arrays, as scikit-learn takes them.

        Args:
            split: 'train', 'val' or 'test'.

        Returns:
            The vectors, float32 ``[n, D]``, and the labels: int64 ``[n]`` for classes,
            float32 ``[n]`` for regression, float32 ``[n, C]`` for multilabel; in the
            order of :meth:`rows`.

        Raises:
            SpecError: If there is no such split, or it has no samples.
        """
        rows, members = self.rows(split), self._members(split)
        if not len(rows):
            raise SpecError(
                f'split {split!r} has no samples (split={self.split!r}, '
                f'fractions={self.fractions!r}): give it some'
            )
        return (
            np.array(self.dataset.embeddings[rows]),
            self._divided.labels.values[members],
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the training split in random order, all of the same size."""
        part = self.subset('train')
        return self._loader(
            part,
            shuffle=True,
            generator=torch.Generator().manual_seed(self.seed),
            # A rest of one sample has no variance, which batch normalisation needs.
            drop_last=len(part) > self.batch_size,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of the validation split."""
        return self._loader(self.subset('val'))

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test split."""
        return self._loader(self.subset('test'))

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of all chips of the file in order, labelled or not, without label."""
        return self._loader(self.dataset)

    def _loader(self, part: PooledEmbeddings, **settings: Any) -> DataLoader[Any]:
        return DataLoader(
            _Batches(part),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=_only,
            **settings,
        )

    def _members(self, split: str) -> NDArray[np.int64]:
        if split not in SPLITS:
            raise SpecError(f'split={split!r} is none of {", ".join(SPLITS)}')
        return np.flatnonzero(self._divided.splits == split)

    @cached_property
    def _divided(self) -> _Divided:
        dataset = PooledEmbeddings(self.path)
        joined, beside = None, None
        if self.labels is None:
            rows, values = dataset.labelled(self.target)
        else:
            joined = join_labels(
                dataset.table,
                self.labels,
                self.target,
                how=self.how,
                on=self.on,
                max_distance_m=self.max_distance_m,
            )
            if joined.unused or joined.missing:
                warnings.warn(joined.description, stacklevel=2)
            rows, values, beside = joined.rows, joined.values, joined.labels
        chips = _chips(dataset, rows)
        kind, block_m = self.split, self.block_m
        if kind == 'auto':
            kind = 'spatial' if set(_CENTRE) <= set(chips.columns) else 'random'
        places = number_places(chips)
        if kind in DRAWN:
            labels = encode_labels(values, self._task)
            _, first = np.unique(places, return_index=True)
            groups = places
            if kind == 'spatial':
                lon, lat = chips[list(_CENTRE)].to_numpy(np.float64)[first].T
                if block_m is None:
                    known = 'geometry' in chips
                    side = height_m(chips['geometry'].to_numpy()) if known else 0.0
                    block_m = choose_block(lon, lat, side)
                lon, lat = lon[places], lat[places]
                groups = block_numbers(lon, lat, block_m)
                splits = self._draw_blocks(lon, lat, block_m, labels)
            else:
                splits = self._draw_places(kind, labels, first)[places]
        else:
            splits, groups = self._read_splits(dataset, rows, beside), places
            given = splits != ''
            rows, splits, groups = rows[given], splits[given], groups[given]
            chips = chips[given]
            labels = encode_labels(values[given], self._task)
            refuse_torn(chips, groups, splits, kind)
        splits, notes = keep_apart(chips, splits, kind)
        kept, tested = splits != '', splits == 'test'
        if kind == 'spatial':
            notes += sparse_blocks(groups[tested], places[tested])
        return _Divided(
            dataset,
            rows[kept],
            Labels(labels.values[kept], labels.classes, labels.task),
            splits[kept],
            groups[kept],
            kind,
            block_m if kind == 'spatial' else None,
            int((~kept).sum()),
            notes,
            joined,
        )

    def _draw_blocks(
        self, lon: ArrayLike, lat: ArrayLike, block_m: float, labels: Labels
    ) -> Splits:
        single = labels.task in ('binary', 'multiclass')
        classes = labels.values if single else None
        return spatial_block_split(
            lon, lat, block_m, self.fractions, self.seed, classes
        )

    def _draw_places(
        self, kind: str, labels: Labels, first: NDArray[np.int64]
    ) -> Splits:
        if kind == 'random':
            return random_split(len(first), self.fractions, self.seed)
        if labels.task not in ('binary', 'multiclass'):
            raise SpecError(
                f"split='stratified' needs one class a sample: for {labels.task} use "
                "'random' or 'spatial'"
            )
        names = np.array(labels.classes)[labels.values[first]]
        return stratified_split(names, self.fractions, self.seed)

    def _read_splits(
        self,
        dataset: PooledEmbeddings,
        rows: NDArray[np.int64],
        beside: pd.DataFrame | None,
    ) -> Splits:
        name = self.split
        if beside is not None and name in beside.columns:
            column = beside[name]
        elif name in dataset.columns:
            column = dataset.read([name])[name].iloc[rows]
        else:
            columns = [*([] if beside is None else beside.columns), *dataset.columns]
            raise SpecError(
                f'split={name!r} is none of {", ".join(DRAWN)}, nor a column; there '
                f'are {", ".join(dict.fromkeys(map(str, columns)))}'
            )
        splits = column_split(column)
        without = int((splits == '').sum())
        if without:
            warnings.warn(
                f'{without} of {len(splits)} labelled chips have no value in column '
                f'{name!r} and are in no split',
                stacklevel=2,
            )
        return splits


def _chips(dataset: PooledEmbeddings, rows: NDArray[np.int64]) -> pd.DataFrame:
    """Read what tells the places of chips, as far as a file has it."""
    known = [name for name in ('point_id', *_CENTRE) if name in dataset.columns]
    names = ['id', *known, 'geometry']
    chips = dataset.read([name for name in names if name in dataset.columns])
    return pd.DataFrame(chips).iloc[rows].reset_index(drop=True)


class _Batches(Dataset[Sample]):
    """Gives whole batches to a DataLoader: joining single samples takes longer."""

    def __init__(self, part: PooledEmbeddings) -> None:
        self.part = part

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> Sample:
        return self.part[index]

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        return [self.part.batch(indices)]


def _only(batches: list[Sample]) -> Sample:
    return batches[0]
