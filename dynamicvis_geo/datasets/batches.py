"""Batches of the chips that a process has taken, in the order of its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from dynamicvis_geo.datasets.chip_order import slabs
from dynamicvis_geo.datasets.chips import ChipDataset
from dynamicvis_geo.datasets.read_ahead import read_ahead


class Batches(IterableDataset[list[Any]]):
    """Lists of samples, one a batch; for a DataLoader with ``batch_size=None``.

    A batch never has chips of two blocks, so that its features do not depend on who
    does the others. Of W workers of a DataLoader, worker w makes the batches
    ``w, w + W, ...``, which the DataLoader brings into order; each has the next ones
    under way if the chips are a :class:`~dynamicvis_geo.ChipDataset`.

    It is iterable so that Lightning leaves it alone: which process does what has been
    decided already.

    Attributes:
        dataset: The chips.
        chips: Number of chips in all batches.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        blocks: Sequence[NDArray[np.int64]],
        batch_size: int,
    ) -> None:
        """Cut blocks into batches.

        Args:
            dataset: The chips, a map-style dataset.
            blocks: Rows of the chips of each block.
            batch_size: Chips a batch; the last of a block may have fewer.
        """
        self.dataset = dataset
        # A tensor, which workers share however they are started.
        self._rows = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *blocks]))
        self._edges = np.cumsum([0, *map(len, cut(blocks, batch_size))])
        self.chips = len(self._rows)
        if isinstance(dataset, ChipDataset):
            dataset.count_retries_anew()

    def __len__(self) -> int:
        """Return the number of batches, those of all workers together."""
        return len(self._edges) - 1

    def rows(self, number: int) -> NDArray[np.int64]:
        """Return the rows of the chips of a batch.

        Args:
            number: Of the batch, from 0.

        Returns:
            int64 ``[B]``.
        """
        start, end = self._edges[number : number + 2]
        rows: NDArray[np.int64] = self._rows[start:end].numpy()
        return rows

    def __iter__(self) -> Iterator[list[Any]]:
        """Make the batches of this worker; without workers, all."""
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        batches = map(self.rows, range(first, len(self), step))
        if isinstance(self.dataset, ChipDataset):
            return read_ahead(batches, self.dataset.submit, self.dataset.chips_ahead)
        return (_samples(self.dataset, rows.tolist()) for rows in batches)


def cut(
    blocks: Sequence[NDArray[np.int64]], batch_size: int
) -> list[NDArray[np.int64]]:
    """Cut each block into batches, of which the last may be smaller.

    Args:
        blocks: Rows of the chips of each block.
        batch_size: Chips a batch.

    Returns:
        Rows of the chips of each batch.
    """
    return [batch for block in blocks for batch in slabs(block, batch_size)]


def _samples(dataset: Any, rows: list[int]) -> list[Any]:
    if not hasattr(dataset, '__getitems__'):
        return [dataset[row] for row in rows]
    samples: list[Any] = dataset.__getitems__(rows)
    return samples
