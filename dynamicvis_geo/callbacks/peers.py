"""The other processes of a Trainer's run."""

import atexit
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from dynamicvis_geo.errors import OutputError

#: One process may be done days before another. It ends at once where one has died.
PATIENCE = timedelta(days=30)
#: Time to find each other.
MEETING = timedelta(minutes=10)


class Peers:
    """All processes of a run, if a Trainer has started several.

    They wait for each other in a group of gloo, which needs no GPU: that of the Trainer
    if it is one, else one of their own. To be made by all of them at the same time.

    Raises:
        OutputError: If they do not reach each other.
    """

    def __init__(self) -> None:
        self._group: Any = None
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        if distributed.get_backend() == 'gloo':
            self._group = distributed.group.WORLD
            # As Lightning does for NCCL alone.
            atexit.register(_leave_world)
            return
        try:
            self._group = distributed.new_group(backend='gloo', timeout=MEETING)
        except RuntimeError as error:
            raise OutputError(
                f'the processes of this run do not reach each other '
                f'({_last_line(error)}): GLOO_SOCKET_IFNAME names the network '
                'interface between them, such as eth0'
            ) from error

    def total(self, numbers: Sequence[int]) -> list[int]:
        """Wait for all, and return the sums of what they give.

        Args:
            numbers: Of this process, as many as of each other.

        Raises:
            OutputError: If one of them has ended.
        """
        if self._group is None:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.int64)
        try:
            # What follows has the patience of the group, half an hour by default.
            distributed.monitored_barrier(self._group, timeout=PATIENCE)
            distributed.all_reduce(tensor, group=self._group)
        except RuntimeError as error:
            raise OutputError(
                f'another process of this run has ended ({_last_line(error)}): what is '
                'finished is kept, and the same command goes on from there'
            ) from error
        totals: list[int] = tensor.tolist()
        return totals

    def close(self) -> None:
        """Let go of the others: nobody waits for this process any more."""
        if self._group is not None and self._group is not distributed.group.WORLD:
            _leave(self._group)
        self._group = None


def _leave_world() -> None:
    if distributed.is_initialized():
        _leave(distributed.group.WORLD)


def _leave(group: Any) -> None:
    """Leave a group, whose threads would abort Python if they lived to its end."""
    distributed.destroy_process_group(group)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1][:200]
