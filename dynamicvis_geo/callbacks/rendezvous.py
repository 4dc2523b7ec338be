"""How the processes of a run wait for each other, without a limit of time.

Collective operations of PyTorch give up after minutes, but one rank may well be done
hours before another. Here each process leaves small files in a folder that all of them
see, and looks for those of the others.
"""

import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from dynamicvis_geo.errors import OutputError

#: Seconds after which a process that gives no sign of life counts as dead.
PATIENCE = 300.0
#: Seconds between two looks.
POLL = 0.2


class Rendezvous:
    """One process' view of the others that write the same output.

    Args:
        folder: Folder of the run, which all processes see.
        run: A word that no other run has.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(self, folder: Path, run: str, rank: int, world_size: int) -> None:
        self.folder = folder
        self.run = run
        self.rank = rank
        self.world_size = world_size
        # What was last seen of the others, and when by the clock of this process: the
        # clocks of several machines differ.
        self._seen: dict[int, tuple[int, float]] = {}

    def beat(self) -> None:
        """Give a sign of life, and look whether another process has failed.

        Raises:
            OutputError: If one has.
            FileNotFoundError: If the folder is gone.
        """
        if self.world_size == 1:
            return
        self._file('alive', self.rank).write_text(socket.gethostname())
        self._raise_failures()

    def fail(self, reason: str) -> None:
        """Tell the others that this process ends."""
        if self.world_size > 1 and self.folder.is_dir():
            self._leave('failed', reason)

    def reach(self, stage: str, text: str = '') -> None:
        """Tell the others that this process has reached a stage, and a word more."""
        if self.world_size > 1:
            self._leave(stage, text)

    def texts(self, stage: str) -> list[str]:
        """Return what the others said when they reached a stage."""
        others = set(range(self.world_size)) - {self.rank}
        return [self._file(stage, rank).read_text(encoding='utf-8') for rank in others]

    def wait(self, stage: str, ranks: Iterable[int] | None = None) -> None:
        """Wait until other processes have reached a stage.

        Args:
            stage: The stage.
            ranks: Their numbers; all by default.

        Raises:
            OutputError: If one of them fails or dies instead.
        """
        waiting = set(range(self.world_size) if ranks is None else ranks) - {self.rank}
        while True:
            waiting = {r for r in waiting if not self._file(stage, r).exists()}
            if not waiting:
                return
            try:
                self.beat()
            except FileNotFoundError:
                # The first process removes the folder when all is done.
                return
            for rank in waiting:
                self._require_alive(rank)
            time.sleep(POLL)

    def _file(self, kind: str, rank: int) -> Path:
        return self.folder / f'.{self.run}-{kind}-{rank:05d}'

    def _leave(self, kind: str, text: str) -> None:
        # A name that appears with its content: others read it at once.
        temporary = self.folder / f'.{self.run}-{kind}-{self.rank:05d}.{os.getpid()}'
        temporary.write_text(text, encoding='utf-8')
        os.replace(temporary, self._file(kind, self.rank))

    def _raise_failures(self) -> None:
        prefix = f'.{self.run}-failed-'
        for entry in os.scandir(self.folder):
            if entry.name.startswith(prefix) and entry.name[len(prefix) :].isdecimal():
                rank = int(entry.name[len(prefix) :])
                if rank != self.rank:
                    reason = Path(entry.path).read_text(encoding='utf-8')
                    raise OutputError(f'process {rank} has failed: {reason}')

    def _require_alive(self, rank: int) -> None:
        now = time.monotonic()
        try:
            sign = self._file('alive', rank).stat().st_mtime_ns
        except FileNotFoundError:
            sign = 0
        last, since = self._seen.get(rank, (-1, now))
        if sign != last:
            self._seen[rank] = (sign, now)
        elif now - since > PATIENCE:
            raise OutputError(
                f'process {rank} has given no sign of life for {PATIENCE:.0f} s: it '
                'was killed, or its machine does not see the folder of the output; '
                'what is finished is kept, and the same command goes on from there'
            )
