"""How the work of a run is divided, so that nobody has to be asked.

Every process works out the same :class:`Plan` from the arguments of the run alone: the
chips in their order, cut into blocks. A block is done when its file is there, so what
is left is a listing, and who does what is arithmetic (:class:`Shard`). There are no
locks and no owners: a block done twice is the same file twice. Where that is,
:class:`Store` says: a folder, or any place that fsspec knows.

What a block's file holds is not known here.
"""

import errno
import hashlib
import itertools
import json
import operator
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Self

import fsspec
import numpy as np
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from pyproj import CRS

from dynamicvis_geo.callbacks.settings import differences, table
from dynamicvis_geo.datasets.chip_ids import crs_name
from dynamicvis_geo.datasets.chip_order import (
    Strides,
    along_curve,
    hilbert_order,
    slabs,
)
from dynamicvis_geo.errors import OutputError, SpecError
from dynamicvis_geo.provenance import jsonable, to_json

Ints = NDArray[np.int64]

#: File that says what is being made, in the folder of the blocks.
DESCRIPTION_FILE = 'run.json'

#: What a file system answers that has no hard links.
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

#: Variables in which array jobs tell a process its number, from 0, and their number;
#: AWS Batch and Kubernetes do not tell the second.
_ARRAYS = (
    ('BATCH_TASK_INDEX', 'BATCH_TASK_COUNT'),
    ('AWS_BATCH_JOB_ARRAY_INDEX', None),
    ('JOB_COMPLETION_INDEX', None),
)
_SLURM = tuple(f'SLURM_ARRAY_TASK_{name}' for name in ('ID', 'MIN', 'MAX', 'COUNT'))


@dataclass(frozen=True, eq=False)
class Plan:
    """The chips of a run in their order, cut into blocks.

    Attributes:
        rows: Rows of the chip table, in the order in which they are worked on and
            stand in the output. It does not depend on the size of the blocks.
        starts: Where in `rows` each block begins, and their end: ``[blocks + 1]``.
        fingerprint: Equal for plans of the same chips in the same order.
        block_chips: Chips that a block has at most.
    """

    rows: Ints
    starts: Ints
    fingerprint: str
    block_chips: int

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.starts) - 1

    def block(self, number: int) -> Ints:
        """Return the rows of the chip table that are a block's.

        Raises:
            IndexError: If there is no such block.
        """
        if not 0 <= number < len(self):
            raise IndexError(f'block {number} of {len(self)}')
        return self.rows[self.starts[number] : self.starts[number + 1]]

    def block_of(self, chips: int) -> Ints:
        """Return the block of every row of the chip table, -1 for those of none.

        Args:
            chips: Number of rows of the table.
        """
        blocks = np.full(chips, -1, np.int64)
        blocks[self.rows] = np.repeat(np.arange(len(self)), np.diff(self.starts))
        return blocks


def make_plan(
    chips: NDArray[np.void],
    crs: Sequence[CRS],
    block_chips: int,
    *,
    strides: Strides = (),
    point_ids: pa.StringArray | None = None,
    rows: Ints | None = None,
) -> Plan:
    """Bring chips into an order and cut it into blocks.

    The order is by source, by time window, and along a Hilbert curve. Of a grid, a
    block is an aligned square of the lattice of chips, ``2**k`` a side, in one time
    window; of other chips a run of `block_chips` along the curve. A block never has
    chips of two sources.

    Args:
        chips: The chip table, :attr:`.ChipDataset.table`.
        crs: CRS of each source, :attr:`.ChipDataset.source_crs`.
        block_chips: Chips that a block has at most; squares have the largest power of 4
            that this allows.
        strides: :attr:`.ChipDataset.strides`.
        point_ids: :attr:`.ChipDataset.point_ids`.
        rows: Rows of the table to plan, ascending; all by default.

    Raises:
        SpecError: If `block_chips` is not a positive whole number.
    """
    try:
        size = 0 if isinstance(block_chips, bool) else operator.index(block_chips)
    except TypeError:
        size = 0
    if size < 1:
        raise SpecError(
            f'block_chips={block_chips!r} (--block-chips) must be a positive whole '
            'number of chips'
        )
    planned = chips if rows is None else chips[rows]
    distance = along_curve(planned, strides)
    order = hilbert_order(planned, distance)
    starts = _starts(planned, order, distance[order], strides, size)
    if rows is not None:
        order = np.asarray(rows, np.int64)[order]
    return Plan(order, starts, _fingerprint(chips, crs, point_ids, order), size)


def _starts(
    chips: NDArray[np.void],
    order: Ints,
    distance: NDArray[np.uint64],
    strides: Strides,
    size: int,
) -> Ints:
    """Return where blocks begin in the order, and its end."""
    # The largest square of 2**level a side that is not too large.
    level = (size.bit_length() - 1) // 2
    source = chips['source'][order]
    tile = _changes(distance >> np.uint64(2 * level))
    for name in ('start', 'end'):
        tile |= _changes(chips[name][order])
    first = np.flatnonzero(_changes(source))
    begins = np.zeros(len(order), dtype=bool)
    for low, high in itertools.pairwise([*first, len(order)]):
        stride = strides[source[low]] if source[low] < len(strides) else None
        if stride is None:
            begins[low:high:size] = True
        else:
            begins[low:high] = tile[low:high]
            begins[low] = True
    return np.append(np.flatnonzero(begins), len(order)).astype(np.int64)


def _changes(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Say which values differ from the one before."""
    changes = np.ones(len(values), dtype=bool)
    changes[1:] = values[1:] != values[:-1]
    return changes


def _fingerprint(
    chips: NDArray[np.void],
    crs: Sequence[CRS],
    point_ids: pa.StringArray | None,
    order: Ints,
) -> str:
    digest = hashlib.sha256(json.dumps([crs_name(one) for one in crs]).encode())
    for part in slabs(order):
        some = chips[part]
        for name in chips.dtype.names or ():
            # Adding 0 makes one zero of two.
            digest.update((some[name] + 0).tobytes())
        if point_ids is not None:
            ids = point_ids.take(pa.array(part)).to_pylist()
            digest.update(json.dumps(ids).encode())
    return digest.hexdigest()


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
                f'shard={self} (--shard) must be a number from 1 and how many there '
                'are, such as 3/10'
            )

    def __str__(self) -> str:
        """As on the command line, counted from 1."""
        return f'{self.index + 1}/{self.count}'

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
                f'shard={text!r} (--shard) must be I/N, such as 3/10 for the third of '
                'ten, or /N in an array job'
            )
        number, count = found[1], int(found[2])
        if number:
            return cls(int(number) - 1, count)
        told = _array_job(environ)
        if told is None:
            raise SpecError(
                f'shard={text!r} (--shard) leaves the number of this shard to an array '
                'job, and this is none that is known: give both, such as 3/10'
            )
        return cls(told[0], count)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Self | None:
        """Return what an array job says; None outside one.

        Known are arrays of Slurm, AWS Batch and Google Batch, and indexed jobs of
        Kubernetes.

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
                'many: give --shard /N (shard=), or --shard 1/1 if it does all alone'
            )
        return cls(index, count)

    def within(self, rank: int, world_size: int) -> 'Shard':
        """Return the share of one of the processes among which a shard is divided."""
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
            'gaps between them: use --array=1-N, or say --shard I/N'
        )
    return index, count


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, '')
    if not text.isdecimal():
        raise SpecError(
            f'{name}={text!r} must be a whole number, as an array job gives it: unset '
            'it, or say --shard I/N'
        )
    return int(text)


@dataclass(frozen=True)
class Store:
    """A folder, on this machine or behind any URL that fsspec knows.

    Files are listed, read and put whole; nothing else is asked of the place. It is
    plain text, so that any process may have it.

    Attributes:
        url: Path or URL of the folder.
    """

    url: str

    def names(self) -> list[str]:
        """Return the names of all files, in no order; none if there is no folder.

        Raises:
            OutputError: If they cannot be listed.
        """
        system, folder = self._place()
        with self._errors('list', ''):
            # Others write, too: what was listed before is not asked again.
            system.invalidate_cache(folder)
            try:
                if isinstance(system, LocalFileSystem):
                    return os.listdir(folder)
                paths = system.ls(folder, detail=False)
            except FileNotFoundError:
                return []
        return [path.rsplit('/', 1)[-1] for path in paths]

    def read(self, name: str) -> bytes | None:
        """Return what a file holds; None if there is none.

        Raises:
            OutputError: If it cannot be read.
        """
        system, folder = self._place()
        with self._errors('read', name):
            try:
                content: bytes = system.cat_file(f'{folder}/{name}')
            except FileNotFoundError:
                return None
        return content

    def put(self, name: str, content: bytes | memoryview) -> None:
        """Write a file, which appears whole, also in the place of another.

        Raises:
            OutputError: If it cannot be written.
        """
        system, folder = self._place()
        with self._errors('write', name):
            if isinstance(system, LocalFileSystem):
                with _temporary(Path(folder), name) as temporary:
                    temporary.write_bytes(content)
                    _replace(temporary, Path(folder, name))
            else:
                system.pipe_file(f'{folder}/{name}', content)

    @contextmanager
    def whole(self, name: str) -> Iterator[Path]:
        """Give a local file to write to, which is put whole when that is over.

        Raises:
            OutputError: If it cannot be written.
        """
        system, folder = self._place()
        local = isinstance(system, LocalFileSystem)
        with self._errors('write', name), ExitStack() as stack:
            scratch = folder if local else stack.enter_context(TemporaryDirectory())
            temporary = stack.enter_context(_temporary(Path(scratch), name))
            yield temporary
            if local:
                _replace(temporary, Path(folder, name))
            else:
                system.put_file(str(temporary), f'{folder}/{name}')

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open a file to read parts of it.

        Raises:
            OutputError: If it cannot be read.
        """
        system, folder = self._place()
        with self._errors('read', name), system.open(f'{folder}/{name}') as file:
            yield file

    def remove(self, name: str) -> None:
        """Remove a file, if there is one.

        Raises:
            OutputError: If it cannot be removed.
        """
        system, folder = self._place()
        with self._errors('remove', name), suppress(FileNotFoundError):
            system.rm_file(f'{folder}/{name}')

    def put_new(self, name: str, content: bytes) -> bool:
        """Write a file unless there is one; of several at once, one does.

        Returns:
            Whether it was written.

        Raises:
            OutputError: If it cannot be written.
        """
        system, folder = self._place()
        with self._errors('write', name):
            try:
                if isinstance(system, LocalFileSystem):
                    _link_new(Path(folder), name, content)
                else:
                    system.pipe_file(f'{folder}/{name}', content, mode='create')
            except FileExistsError:
                return False
        return True

    def _place(self) -> tuple[Any, str]:
        """Return file system and folder, which fsspec keeps for each process."""
        if '://' not in self.url:
            # A path, which may hold what fsspec would take for a chain of URLs.
            return LocalFileSystem(), os.path.abspath(os.path.expanduser(self.url))
        try:
            system, folder = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise OutputError(f"cannot use '{self.url}': {error}") from error
        return system, folder.rstrip('/')

    @contextmanager
    def _errors(self, doing: str, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = f'{self.url.rstrip("/")}/{name}' if name else self.url
            raise OutputError(f"cannot {doing} '{place}': {error}") from error


@contextmanager
def _temporary(folder: Path, name: str) -> Iterator[Path]:
    """Give a name that no process on any machine has; what is left of it goes."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f'.{name}.{secrets.token_hex(8)}.partial'
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _replace(temporary: Path, path: Path) -> None:
    """Give a file its name when it is on disk."""
    with temporary.open('rb') as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _link_new(folder: Path, name: str, content: bytes) -> None:
    with _temporary(folder, name) as temporary:
        temporary.write_bytes(content)
        try:
            os.link(temporary, folder / name)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with (folder / name).open('xb') as file:
                file.write(content)


@dataclass(frozen=True)
class Description:
    """What is being made, as the first process of a run writes it down for all others.

    Attributes:
        settings: What decides the numbers, as plain values by name.
        plan: Fingerprint of the plan.
        chips: Chips of the plan.
        blocks: Blocks of the plan.
        block_chips: Chips that a block has at most.
        provenance: What goes into the output; it is kept, and not compared.
    """

    settings: Mapping[str, Any]
    plan: str
    chips: int
    blocks: int
    block_chips: int
    provenance: Mapping[str, Any]

    @property
    def compared(self) -> dict[str, Any]:
        """What must be equal in all processes that work on one output."""
        return {
            **self.settings,
            'block_chips': self.block_chips,
            'chips': f'{self.chips}, fingerprint {self.plan[:12]}',
        }

    @property
    def word(self) -> str:
        """Stands in the names of the blocks, so that no others are taken for them."""
        text = json.dumps(jsonable(self.compared), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def describe(
    plan: Plan, settings: Mapping[str, Any], provenance: Mapping[str, Any]
) -> Description:
    """Describe a run by its plan, what decides its numbers, and where all came from."""
    return Description(
        settings,
        plan.fingerprint,
        len(plan.rows),
        len(plan),
        plan.block_chips,
        provenance,
    )


def read_description(store: Store) -> Description | None:
    """Return what is being made in a store; None if nothing is.

    Raises:
        OutputError: If that cannot be read.
    """
    content = store.read(DESCRIPTION_FILE)
    if content is None:
        return None
    try:
        return Description(**json.loads(content))
    except (ValueError, TypeError) as error:
        raise OutputError(
            f"'{store.url}/{DESCRIPTION_FILE}' is damaged ({error}): remove the folder "
            f"'{store.url}' to start anew"
        ) from error


def begin(store: Store, description: Description) -> Description:
    """Begin a run, or join one that has begun.

    Returns:
        The description in the store: that of the process that was the first.

    Raises:
        OutputError: If another run has begun there; the message holds a table of the
            differences.
    """
    content = to_json(description.__dict__, indent=2).encode()
    new = store.put_new(DESCRIPTION_FILE, content)
    there = read_description(store)
    if there is None:
        raise OutputError(
            f"'{store.url}/{DESCRIPTION_FILE}' is gone: another process has ended or "
            'removed this run'
        )
    rows = [] if new else differences(there.compared, jsonable(description.compared))
    if rows:
        raise OutputError(
            f"'{store.url}' holds what was begun with other settings:\n"
            + table(rows, ('setting', 'there', 'now'))
            + '\nfinish it with the same settings, choose another output, or start '
            'anew with --overwrite (overwrite=True)'
        )
    return there


def block_name(description: Description, number: int, suffix: str) -> str:
    """Return the name of a block's file.

    Args:
        description: Of the run.
        number: Of the block, from 0.
        suffix: Of the format, such as '.parquet'.
    """
    return f'block-{description.word}-{number:08d}{suffix}'


def finished(store: Store, description: Description, suffix: str) -> NDArray[np.bool_]:
    """Say of every block whether it is done: one listing.

    Args:
        store: Where the blocks are.
        description: Of the run.
        suffix: Of the format, such as '.parquet'.

    Raises:
        OutputError: If the store cannot be listed.
    """
    start, end = f'block-{description.word}-', suffix
    middle = slice(len(start), -len(end) or None)
    numbers = [
        int(name[middle])
        for name in store.names()
        if name.startswith(start) and name.endswith(end) and name[middle].isdecimal()
    ]
    done = np.zeros(description.blocks, dtype=bool)
    done[numbers] = True
    return done


def share(done: NDArray[np.bool_], shard: Shard) -> Ints:
    """Return the numbers of the blocks that are a shard's to do.

    They are dealt out by their own numbers, and not by their places among those that
    are left: shards look at different times, and would leave some to each other.

    Args:
        done: Of every block, as :func:`finished` says.
        shard: Whose.
    """
    numbers = np.arange(shard.index, len(done), shard.count)
    return numbers[~done[numbers]]
