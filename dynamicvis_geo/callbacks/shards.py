"""Shares of a run: given on the command line, or told by an array job."""

import operator
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from dynamicvis_geo.errors import SpecError

#: Variables in which array jobs tell a process its number, from 0, and their number;
#: AWS Batch and Kubernetes do not tell the second.
_ARRAYS = (
    ('BATCH_TASK_INDEX', 'BATCH_TASK_COUNT'),
    ('AWS_BATCH_JOB_ARRAY_INDEX', None),
    ('JOB_COMPLETION_INDEX', None),
)
_SLURM = tuple(f'SLURM_ARRAY_TASK_{name}' for name in ('ID', 'MIN', 'MAX', 'COUNT'))


@dataclass(frozen=True)
class Shard:
    """One of several processes, or machines, that do a run together.

    Attributes:
        index: Its number, from 0.
        count: How many there are.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Refuse numbers that are no shard.

        Raises:
            SpecError: If `index` is not one of `count` numbers.
        """
        if not 0 <= self.index < self.count:
            raise SpecError(
                f'shard={self} must be a number from 1 and how many there '
                'are, such as 3/10'
            )

    def __str__(self) -> str:
        """As on the command line, counted from 1."""
        return f'{self.index + 1}/{self.count}'

    @classmethod
    def of(cls, given: tuple[int, int] | str | None) -> Self:
        """Return the shard that a user has named.

        Args:
            given: Number from 1 and how many there are; or as :meth:`parse` reads it;
                None for what an array job says, alone outside one.

        Raises:
            SpecError: If that is no shard, or an array job does not say enough.
        """
        if given is None:
            return cls.from_environment() or cls()
        if isinstance(given, str):
            return cls.parse(given)
        try:
            number, count = map(operator.index, given)
        except (TypeError, ValueError) as error:
            raise SpecError(
                f'shard={given!r} must be a number from 1 and how many there '
                'are, such as (3, 10)'
            ) from error
        return cls(number - 1, count)

    @classmethod
    def parse(cls, text: str, environ: Mapping[str, str] = os.environ) -> Self:
        """Read ``I/N``, counted from 1, or ``/N``: an array job tells its index.

        Args:
            text: What to read.
            environ: Environment of the process.

        Raises:
            SpecError: If it is neither, or there is no array job.
        """
        found = re.fullmatch(r'(\d*)/(\d+)', text.strip())
        if found is None:
            raise SpecError(
                f'shard={text!r} must be I/N, such as 3/10 for the third of '
                'ten, or /N in an array job'
            )
        number, count = found[1], int(found[2])
        if number:
            return cls(int(number) - 1, count)
        told = _array_job(environ)
        if told is None:
            raise SpecError(
                f'shard={text!r} leaves the number of this shard to an array '
                'job, and this is none that is known: give both, such as 3/10'
            )
        return cls(told[0], count)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Self | None:
        """Read the shard that an array job tells.

        Known are arrays of Slurm, AWS Batch and Google Batch, and indexed jobs of
        Kubernetes.

        Args:
            environ: Environment of the process.

        Returns:
            The shard; None outside an array job.

        Raises:
            SpecError: If it does not say how many there are, or its numbers have gaps.
        """
        told = _array_job(environ)
        if told is None:
            return None
        index, count, name = told
        if count is None:
            raise SpecError(
                f'{name}={index} says that this is one of several, but not of how '
                "many: give shard='/N', or shard='1/1' if it does all alone"
            )
        return cls(index, count)

    def within(self, rank: int, world_size: int) -> 'Shard':
        """Return the share of one of the processes among which a shard is divided.

        Args:
            rank: Number of the process, from 0.
            world_size: Number of processes.

        Returns:
            The share.
        """
        return Shard(self.index * world_size + rank, self.count * world_size)


def _array_job(environ: Mapping[str, str]) -> tuple[int, int | None, str] | None:
    """Return the index from 0, the count if it is told, and who told."""
    if _SLURM[0] in environ:
        return *_slurm(*(_number(environ, name) for name in _SLURM)), _SLURM[0]
    for name, total in _ARRAYS:
        if name in environ:
            count = None if total is None else _number(environ, total)
            return _number(environ, name), count, name
    return None


def _slurm(task: int, least: int, most: int, count: int) -> tuple[int, int]:
    step, rest = divmod(most - least, max(1, count - 1))
    index, off = divmod(task - least, max(1, step))
    if rest or off or not 0 <= index < count:
        # Of an array with gaps at least one task comes here, whatever its numbers.
        raise SpecError(
            f'SLURM_ARRAY_TASK_ID={task} is one of {count} from {least} to {most} with '
            "gaps between them: use --array=1-N, or say shard='I/N'"
        )
    return index, count


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, '')
    if not text.isdecimal():
        raise SpecError(
            f'{name}={text!r} must be a whole number, as an array job gives it: unset '
            "it, or say shard='I/N'"
        )
    return int(text)
