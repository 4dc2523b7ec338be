"""How often requests were repeated, in a process and the workers of its DataLoaders."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import get_worker_info

#: Workers that have a number of their own.
_SLOTS = 256


class RetryCount:
    """A count in memory that the workers of a DataLoader share with their parent.

    Datasets that repeat requests have ``traffic``, see
    :class:`~dynamicvis_geo.earthengine.client.Traffic`.
    """

    def __init__(self) -> None:
        self._of_workers = torch.zeros(_SLOTS, dtype=torch.int64).share_memory_()
        self._reported = 0

    def report(self, datasets: Iterable[Any]) -> None:
        """Add what a worker repeated since it last reported."""
        worker = get_worker_info()
        if worker is not None:
            count = _of_this_process(datasets)
            # Only this worker writes here, so that nothing is lost.
            self._of_workers[worker.id % _SLOTS] += count - self._reported
            self._reported = count

    def total(self, datasets: Iterable[Any]) -> int:
        """What this process and its workers repeated so far."""
        own = _of_this_process(datasets) - self._reported
        return own + int(self._of_workers.sum())


def _of_this_process(datasets: Iterable[Any]) -> int:
    # Datasets of equal clients share one count.
    found = (getattr(dataset, 'traffic', None) for dataset in datasets)
    shared = {id(traffic): traffic for traffic in found if traffic is not None}
    return sum(traffic.counts.retries for traffic in shared.values())
