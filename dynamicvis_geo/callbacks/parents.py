"""Whether the process that started this one is still there."""

import multiprocessing
import os

from dynamicvis_geo.errors import OutputError


class Parent:
    """The process that started this one, as it was when a run began.

    A killed parent leaves its children running. They would compute what the next run
    computes too.

    Args:
        rank: Number of this process in its run. The first one may well outlive its
            parent, a shell that was closed, unless Python's multiprocessing started it.
    """

    def __init__(self, rank: int) -> None:
        self._process = multiprocessing.parent_process()
        self._id = os.getppid() if rank > 0 else None

    def require(self) -> None:
        """Check that it is alive.

        Raises:
            OutputError: If it is gone.
        """
        gone = self._process is not None and not self._process.is_alive()
        if gone or (self._id is not None and os.getppid() != self._id):
            raise OutputError(
                'the process that started this one is gone, so this one ends: what is '
                'finished is kept, and the same command goes on from there'
            )
