"""Division of the work of a run into blocks, so that nobody has to be asked.

Every process works out the same :class:`BlockPlan` from the arguments of the run alone:
the chips in their order, cut into blocks. A block is done when its file is there, so
what is left is a listing, and who does what is arithmetic (:func:`share`). There are no
locks and no owners: a block done twice is the same file twice.

What a block's file holds is not known here.
"""

import base64
import hashlib
import itertools
import json
import math
import operator
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyproj import CRS

from dynamicvis_geo.callbacks.shards import Shard
from dynamicvis_geo.datasets.chip_order import (
    Origins,
    Strides,
    along_curve,
    hilbert_order,
    slabs,
)
from dynamicvis_geo.errors import OutputError, RunEndedError, SpecError
from dynamicvis_geo.projections import crs_name
from dynamicvis_geo.provenance import jsonable, to_json
from dynamicvis_geo.settings import difference_table, differences
from dynamicvis_geo.store import Store
from dynamicvis_geo.time_window import last_of

Ints = NDArray[np.int64]

#: File that says what is being made, in the folder of the blocks.
DESCRIPTION_FILE = 'run.json'

#: Chips of a block if nothing else is said, at most: about a minute of a CPU, and as
#: many feature maps as are held in memory without harm.
BLOCK_CHIPS = {
    ('pooled', 'cpu'): 64,
    ('pooled', 'gpu'): 4096,
    ('grid', 'cpu'): 64,
    ('grid', 'gpu'): 256,
}
#: Bytes of the feature maps of a block: those of 256 of the last stage, 512 pixels.
BLOCK_BYTES = 192 * 2**20
#: Blocks that each process should have at least, to be done at the same time.
LEAST_BLOCKS = 4


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """The chips of a run in their order, cut into blocks.

    Attributes:
        rows: Rows of the chip table, in the order in which they are worked on and
            stand in the output. It does not depend on the size of the blocks.
        starts: Where in `rows` each block begins, and their end: ``[blocks + 1]``.
        fingerprint: Equal for plans of the same chips in the same order, whatever is
            left out.
        block_chips: Chips that a block has at most.
        left_out: Of all chips, in the order of the plan, whether they are left out.
    """

    rows: Ints
    starts: Ints
    fingerprint: str
    block_chips: int
    left_out: NDArray[np.bool_]

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.starts) - 1

    @property
    def square(self) -> int:
        """Chips a side of the squares into which a grid is cut."""
        return 1 << _level(self.block_chips)

    def block(self, number: int) -> Ints:
        """Return the rows of the chip table that are a block's.

        Args:
            number: Of the block, from 0.

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
    origins: Origins = (),
    point_ids: pa.StringArray | None = None,
    left_out: NDArray[np.bool_] | str = '',
) -> BlockPlan:
    """Bring chips into an order and cut it into blocks.

    The order is by source, by time window, and along a Hilbert curve. Of a grid, a
    block is an aligned square of chips, ``2**k`` a side, in one time
    window; of other chips a run of `block_chips` along the curve. A block never has
    chips of two sources.

    Args:
        chips: The chip table, :attr:`.ChipDataset.table`.
        crs: CRS of each source, :attr:`.ChipDataset.source_crs`.
        block_chips: Chips that a block has at most; squares have the largest power of 4
            that this allows.
        strides: :attr:`.ChipDataset.strides`.
        origins: A corner of the squares of each source, in its CRS; None, or nothing,
            for the origin of the CRS.
        point_ids: :attr:`.ChipDataset.point_ids`.
        left_out: Of every row of the table, whether the plan is without it, such as
            what an output holds already; or :attr:`Description.left_out`.

    Raises:
        SpecError: If `block_chips` is not a positive whole number.
    """
    try:
        size = 0 if isinstance(block_chips, bool) else operator.index(block_chips)
    except TypeError:
        size = 0
    if size < 1:
        raise SpecError(
            f'block_chips={block_chips!r} must be a positive whole number of chips'
        )
    distance = along_curve(chips, strides, origins)
    order = hilbert_order(chips, distance)
    if isinstance(left_out, str):
        gone = _unpack(left_out, len(chips))
    else:
        gone = left_out[order]
    rows = order[~gone]
    starts = _starts(chips, rows, distance[rows], strides, size)
    return BlockPlan(
        rows, starts, _fingerprint(chips, crs, point_ids, order), size, gone
    )


def block_size(
    chips: int,
    output: str,
    device: str,
    workers: int,
    shape: tuple[int, int, int] | None = None,
) -> int:
    """Return the chips that a block should have at most.

    Args:
        chips: Number of chips.
        output: 'pooled' or 'grid'.
        device: Type of the device that computes, such as 'cpu'.
        workers: Number of processes that share the work.
        shape: Channels, height and width of the feature map of a chip, if known.
    """
    most = BLOCK_CHIPS[output, 'cpu' if device == 'cpu' else 'gpu']
    if output == 'grid' and shape is not None:
        most = min(most, BLOCK_BYTES // (4 * math.prod(shape)))
    return max(1, min(most, chips // (LEAST_BLOCKS * workers)))


def _pack(flags: NDArray[np.bool_]) -> str:
    """Write flags as a short text; none of them set as an empty one."""
    if not flags.any():
        return ''
    return base64.b64encode(zlib.compress(np.packbits(flags).tobytes())).decode()


def _unpack(text: str, count: int) -> NDArray[np.bool_]:
    if not text:
        return np.zeros(count, dtype=bool)
    bits = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    # Of another table, which its fingerprint will tell.
    flags = np.zeros(count, dtype=bool)
    known = np.unpackbits(bits, count=min(count, 8 * len(bits)))
    flags[: len(known)] = known
    return flags


def _starts(
    chips: NDArray[np.void],
    order: Ints,
    distance: NDArray[np.uint64],
    strides: Strides,
    size: int,
) -> Ints:
    """Return where blocks begin in the order, and its end."""
    source = chips['source'][order]
    tile = _changes(distance >> np.uint64(2 * _level(size)))
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


def _level(size: int) -> int:
    """Return the largest level whose square, 2**level a side, is not too large."""
    return (size.bit_length() - 1) // 2


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
        # Plans of unfinished outputs were told by the last moments of windows.
        some['end'] = last_of(some['end'])
        for name in chips.dtype.names or ():
            # Adding 0 makes one zero of two.
            digest.update((some[name] + 0).tobytes())
        if point_ids is not None:
            ids = point_ids.take(pa.array(part)).to_pylist()
            digest.update(json.dumps(ids).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Description:
    """A run, as its first process writes it down for all others.

    Attributes:
        settings: What decides the numbers, as plain values by name.
        plan: Fingerprint of the plan.
        total: Chips of the table, those left out among them.
        chips: Chips of the plan.
        blocks: Blocks of the plan.
        block_chips: Chips that a block has at most.
        left_out: Which chips of the table are not in the plan, as a text: others who
            plan later may find more of them done.
        provenance: What goes into the output; it is kept, and not compared.
    """

    settings: Mapping[str, Any]
    plan: str
    total: int
    chips: int
    blocks: int
    block_chips: int
    left_out: str
    provenance: Mapping[str, Any]

    @property
    def compared(self) -> dict[str, Any]:
        """Settings that must be equal in all processes that work on one output."""
        return {
            **self.settings,
            'block_chips': self.block_chips,
            'chips': f'{self.total}, fingerprint {self.plan[:12]}',
        }

    @cached_property
    def id(self) -> str:
        """Stands in the names of the blocks, so that no others are taken for them."""
        text = json.dumps(jsonable([self.compared, self.left_out]), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def chip_set(self) -> str:
        """Equal for runs of the same chips, whatever the size of their blocks."""
        text = f'{self.plan} {self.left_out}'
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def describe(
    plan: BlockPlan, settings: Mapping[str, Any], provenance: Mapping[str, Any]
) -> Description:
    """Describe a run, for the processes that join it and for its output.

    Args:
        plan: The chips and their blocks.
        settings: What decides the numbers, as plain values by name.
        provenance: What goes into the output.
    """
    return Description(
        settings,
        plan.fingerprint,
        len(plan.left_out),
        len(plan.rows),
        len(plan),
        plan.block_chips,
        _pack(plan.left_out),
        provenance,
    )


def read_description(store: Store) -> Description | None:
    """Read the description of the run that is being made in a store.

    Args:
        store: Folder of the blocks.

    Returns:
        The description; None if nothing has been begun.

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
            f"'{store.url}/{DESCRIPTION_FILE}' is damaged, or of another version of "
            f'dynamicvis_geo ({error}): finish the run with that one, or remove the '
            f"folder '{store.url}' to start anew"
        ) from error


def offer(store: Store, description: Description) -> Description:
    """Write down what is to be made, unless another process has done so already.

    Args:
        store: Folder of the blocks.
        description: Of what is to be made.

    Returns:
        The description in the store: that of the process that was the first.

    Raises:
        OutputError: If it cannot be written or read.
        RunEndedError: If it is removed meanwhile.
    """
    content = to_json(asdict(description), indent=2).encode()
    store.put_new(DESCRIPTION_FILE, content)
    there = read_description(store)
    if there is None:
        raise RunEndedError(
            f"'{store.url}/{DESCRIPTION_FILE}' is gone: another process has ended or "
            'removed this run'
        )
    return there


def require_same(store: Store, there: Description, mine: Description) -> None:
    """Refuse to go on with what was begun in another way.

    Args:
        store: Where it was begun.
        there: What was begun there.
        mine: What is to be made now.

    Raises:
        OutputError: If they differ; the message holds a table of the differences.
    """
    rows = differences(there.compared, jsonable(mine.compared))
    if not rows:
        return
    ways = (
        'finish it with the same settings, choose another output, or start anew with '
        'overwrite=True'
    )
    if [name for name, *_ in rows] == ['chips']:
        ways = (
            'finish it with the same places and times first, and extend it then; or '
            "make an output of what is done with 'dynamicvis-geo merge --partial', and "
            'remove this folder; or start anew with overwrite=True'
        )
    raise OutputError(
        f"'{store.url}' holds what was begun with other settings:\n"
        + difference_table(rows)
        + f'\n{ways}'
    )


def block_name(description: Description, number: int, suffix: str) -> str:
    """Return the name of a block's file.

    Args:
        description: Of the run.
        number: Of the block, from 0.
        suffix: Of the format, such as '.parquet'.
    """
    return f'block-{description.id}-{number:08d}{suffix}'


def sweep(store: Store) -> None:
    """Remove what is left of runs that have ended, unless another has begun.

    Args:
        store: Folder of the blocks.
    """
    # In this order: what a run writes that begins now is not among them.
    names = store.names()
    if read_description(store) is None:
        for name in names:
            store.remove(name)
        store.remove_if_empty()


def finished(store: Store, description: Description, suffix: str) -> NDArray[np.bool_]:
    """Tell of every block if it is done, from one listing.

    Args:
        store: Where the blocks are.
        description: Of the run.
        suffix: Of the format, such as '.parquet'.

    Returns:
        bool ``[blocks]``.

    Raises:
        OutputError: If the store cannot be listed.
    """
    start, end = f'block-{description.id}-', suffix
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
