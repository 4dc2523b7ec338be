"""Which rows a process of a distributed run takes."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import numpy as np
import torch.distributed
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from dynamicvis_geo.errors import SpecError


class ContiguousSampler(DistributedSampler[int]):
    """One run of successive rows for each process: every row exactly once.

    The runs differ in length by one row at most, the longer ones come first; where
    there are more processes than rows, the last processes get none. PyTorch's own
    sampler deals rows out in turn, which tears neighbours apart, and repeats some to
    give all processes the same number.

    Lightning leaves it alone, because it derives from PyTorch's; a run in which a
    process may get no row needs a module or data module whose
    ``allow_zero_length_dataloader_with_multiple_devices`` is True, as those of this
    package are. Without a distributed run it gives all rows.
    """

    def __init__(
        self,
        rows: Sequence[int] | NDArray[np.int64],
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        """Keep the rows.

        Args:
            rows: What to divide, in this order, such as
                :attr:`~dynamicvis_geo.ChipDataset.remaining`.
            num_replicas: Number of processes; None asks ``torch.distributed`` when the
                sampler is used, so that it may be made before the processes are.
            rank: Number of this process, from 0; None asks ``torch.distributed``.

        Raises:
            SpecError: If only one of the numbers is given, or they are no process.
        """
        # PyTorch's constructor would ask for the processes now, and count with padding.
        self._place: tuple[int, int] | None = None
        if num_replicas is not None and rank is not None:
            self._place = operator.index(num_replicas), operator.index(rank)
            if not 0 <= rank < num_replicas:
                raise SpecError(
                    f'rank={rank} is not within 0 to {num_replicas - 1}, of '
                    f'num_replicas={num_replicas}'
                )
        elif num_replicas is not None or rank is not None:
            raise SpecError(
                f'num_replicas={num_replicas!r}, rank={rank!r}: give both, or neither'
            )
        self.rows = np.asarray(rows, dtype=np.int64)
        self.shuffle, self.drop_last, self.seed, self.epoch = False, False, 0, 0

    def __len__(self) -> int:
        """Return the number of rows of this process."""
        first, last = self._range()
        return last - first

    def __iter__(self) -> Iterator[int]:
        """Yield the rows of this process."""
        first, last = self._range()
        return map(int, self.rows[first:last])

    @property
    def num_replicas(self) -> int:  # type: ignore[override]
        """Number of processes."""
        return self._processes()[0]

    @property
    def rank(self) -> int:  # type: ignore[override]
        """Number of this process."""
        return self._processes()[1]

    @property
    def num_samples(self) -> int:  # type: ignore[override]
        """Number of rows of this process."""
        return len(self)

    @property
    def total_size(self) -> int:  # type: ignore[override]
        """Number of rows of all processes together: none is repeated."""
        return len(self.rows)

    def _processes(self) -> tuple[int, int]:
        if self._place is not None:
            return self._place
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size(), torch.distributed.get_rank()
        return 1, 0

    def _range(self) -> tuple[int, int]:
        processes, rank = self._processes()
        share, longer = divmod(len(self.rows), processes)
        first = rank * share + min(rank, longer)
        return first, first + share + (rank < longer)
