"""An output: what there is of it, and what remains to be done."""

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dynamicvis_geo.callbacks.blocks import (
    DESCRIPTION_FILE,
    BlockPlan,
    Description,
    Ints,
    block_name,
    describe,
    finished,
    make_plan,
    offer,
    read_description,
    require_same,
    sweep,
)
from dynamicvis_geo.callbacks.existing import check_place, check_settings, made_by
from dynamicvis_geo.errors import OutputError, SpecError
from dynamicvis_geo.formats import FORMATS, resolve_format
from dynamicvis_geo.formats.base import Format, RunChips
from dynamicvis_geo.formats.block_files import (
    SUFFIX,
    Blocks,
    has_failures,
    list_failures,
    listed_keys,
)
from dynamicvis_geo.paths import AnyPath, Place, output_path
from dynamicvis_geo.provenance import run_history
from dynamicvis_geo.settings import settings_of
from dynamicvis_geo.stac import update_stac
from dynamicvis_geo.store import Location, Store

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Begun:
    """A run that has begun, as one process sees it.

    Attributes:
        chips: All chips.
        plan: The blocks.
        run: The description of the run.
        done: Of each block, whether it needs no computing.
        before: Chips that need no computing, failed ones not among them.
        failed: Chips that have failed before and are left alone.
        fresh: Whether nothing had been begun before.
    """

    chips: RunChips
    plan: BlockPlan
    run: Description
    done: NDArray[np.bool_]
    before: int
    failed: int
    fresh: bool


@dataclass(frozen=True)
class Merged:
    """The outcome of a merge.

    Attributes:
        rows: Chips of these blocks in the output.
        failed: Chips in the list of failures.
        missing: Blocks that are not done, if that was asked for.
    """

    rows: int
    failed: int
    missing: int


@dataclass(frozen=True)
class RunSummary:
    """The outcome of a run, all processes of a Trainer together.

    Attributes:
        path: The output.
        written: Chips that this run has written.
        before: Chips that were finished before it.
        failed: Chips whose image could not be had, listed in `failures`.
        failures: File that lists them, if there are any.
        seconds: Time that it took.
        missing: Blocks that are left to other shards; the output is made when there are
            none.
    """

    path: Place
    written: int
    before: int
    failed: int
    failures: Place
    seconds: float
    missing: int = 0


@dataclass(frozen=True)
class Destination:
    """An output to be: its place, its format, and the runs that make it.

    Attributes:
        path: File or folder to be, or a URL.
        format_name: Name of the format.
        dtype: Type in which embeddings are stored.
        retry_failed: Whether chips that have failed are computed again.
    """

    path: Place
    format_name: str
    dtype: str
    retry_failed: bool = False

    @classmethod
    def of(
        cls, path: AnyPath, name: str | None, dtype: str, retry_failed: bool
    ) -> 'Destination':
        """Check where an output is to be, and how.

        Args:
            path: File or folder.
            name: Name of the format; None takes it from *path*.
            dtype: Type in which embeddings are stored.
            retry_failed: Whether chips that have failed are computed again.

        Raises:
            OutputError: If *path* cannot be used, or the format is unknown or does not
                fit it.
            SpecError: If the format cannot store the type.
        """
        place = output_path(path, 'path').resolve()
        resolved = resolve_format(str(place), name)
        dtypes = FORMATS[resolved].dtypes
        if dtype not in dtypes:
            raise SpecError(
                f'dtype={dtype!r} cannot be stored as {resolved}: choose one of '
                f'{", ".join(dtypes)}'
            )
        return cls(place, resolved, dtype, retry_failed)

    @cached_property
    def format(self) -> Format:
        """The format, of this output."""
        return FORMATS[self.format_name](str(self.path), self.dtype)

    @property
    def location(self) -> Location:
        """Its name, and the folder that it is in."""
        return Location.of(str(self.path))

    @property
    def store(self) -> Store:
        """Folder of the blocks until the output is made."""
        return self.location.blocks

    @property
    def failures(self) -> Place:
        """File that lists the chips that have failed, if there are any."""
        return self.path.parent / self.location.failures

    def check(self, overwrite: bool, output: str | None = None) -> None:
        """Refuse a place that cannot be written, or holds something else.

        Args:
            overwrite: Whether what is there will be removed.
            output: 'pooled' or 'grid', what is to be written; None if unknown.

        Raises:
            SpecError: If failed chips of an output are wanted that will be removed.
            OutputError: If it is one, or the format is for other output.
        """
        if overwrite and self.retry_failed:
            raise SpecError(
                'retry_failed=True goes on with an output that overwrite=True removes: '
                'leave out one of them'
            )
        needed = self.format.output
        if output is not None and output != needed:
            raise OutputError(
                {
                    'pooled': f"'{self.path}' is the name of a file of pooled "
                    'embeddings, and this run gives feature maps: name a folder, or '
                    "leave out output='grid'",
                    'grid': f"'{self.path}' is the name of feature maps, and this run "
                    'gives pooled embeddings: end it in .parquet, or ask for feature '
                    "maps (output='grid')",
                }[needed]
            )
        check_place(self.path, self.format, overwrite)

    def is_there(self) -> bool:
        """Tell if there is a finished output."""
        return self.path.exists() and made_by(self.path) is not None

    def listed(self) -> pa.StringArray:
        """Keys of the chips that are listed as failed."""
        return listed_keys(self.location)

    def begin(
        self,
        chips: RunChips,
        provenance: dict[str, Any],
        block_chips: int,
        fixed: bool,
        rows: Ints | None = None,
    ) -> Begun:
        """Begin a run, or join one that has begun.

        Args:
            chips: The chips.
            provenance: What makes the embeddings.
            block_chips: Chips of a block at most, if nothing has been begun.
            fixed: Whether it must be this number.
            rows: Rows of the chips that will come; all by default.

        Raises:
            OutputError: If the format cannot hold the chips, or something else was
                begun or made there.
        """
        self.format.check(chips)
        existing = made_by(self.path)
        if existing is not None:
            check_settings(self.path, existing, provenance, self.dtype)
        provenance = {**provenance, 'runs': run_history(existing or {}, provenance)}
        settings = {**settings_of(provenance, self.dtype), 'format': self.format_name}

        def planned(there: Description | None) -> tuple[BlockPlan, Description]:
            size = block_chips if there is None or fixed else there.block_chips
            plan = self._plan(chips, there, size, rows)
            return plan, describe(plan, settings, provenance)

        there = read_description(self.store)
        plan, mine = planned(there)
        fresh = there is None
        if there is None and (len(plan) or not self.is_there()):
            there = offer(self.store, mine)
            if there.id != mine.id:
                # Another process was first.
                plan, mine = planned(there)
        if there is not None:
            require_same(self.store, there, mine)
        done = self._done(there or mine)
        left_out = plan.block_of(len(chips.table)) < 0
        failed = 0
        if not self.retry_failed:
            failed = int(chips.among(self.listed()).sum())
        before = int(np.diff(plan.starts)[done].sum()) - failed
        before += int((left_out if rows is None else left_out[rows]).sum())
        return Begun(chips, plan, there or mine, done, before, failed, fresh)

    def remaining(self, chips: RunChips, block_chips: int) -> Ints:
        """Rows of the chips that are still to be computed, ascending.

        Args:
            chips: The chips.
            block_chips: Chips of a block at most, if nothing has been begun.

        Raises:
            OutputError: If what there is of the output cannot be read.
        """
        there = read_description(self.store)
        size = block_chips if there is None else there.block_chips
        plan = self._plan(chips, there, size)
        rows = plan.rows
        if there is not None and there.plan == plan.fingerprint:
            rows = rows[~np.repeat(self._done(there), np.diff(plan.starts))]
        return np.sort(rows)

    def _plan(
        self,
        chips: RunChips,
        there: Description | None,
        block_chips: int,
        rows: Ints | None = None,
    ) -> BlockPlan:
        """Plan the chips, as the first process of the run has if there was one."""
        left_out: NDArray[np.bool_] | str
        if there is None:
            left_out = self._left_out(chips)
            if rows is not None:
                wanted = np.zeros(len(chips.table), dtype=bool)
                wanted[rows] = True
                left_out |= ~wanted
        else:
            left_out = there.left_out
        return make_plan(
            chips.table,
            chips.source_crs,
            block_chips,
            strides=chips.strides,
            point_ids=chips.point_ids,
            left_out=left_out,
            origins=self.format.origins(chips),
        )

    def _left_out(self, chips: RunChips) -> NDArray[np.bool_]:
        """Say which chips need no computing, of an output that is finished or new."""
        failed = chips.among(self.listed())
        held = chips.among(self.format.held())
        return held | ~failed if self.retry_failed else held | failed

    def _done(self, run: Description) -> NDArray[np.bool_]:
        """Say which blocks need no computing."""
        done = finished(self.store, run, SUFFIX)
        if self.retry_failed:
            for number in np.flatnonzero(done).tolist():
                name = block_name(run, number, SUFFIX)
                done[number] = not has_failures(self.store, name)
        return done

    def finish(self, run: Description, wait: bool) -> int:
        """Make the output if all its blocks are done, and remove them.

        Another process may do the same at the same time.

        Args:
            run: The description of the run.
            wait: Whether blocks may be missing: others do them.

        Returns:
            Number of blocks that are missing.

        Raises:
            OutputError: If blocks are missing that may not, or something cannot be read
                or written.
        """
        if not run.blocks and self.is_there():
            # Whoever made it may have been killed while removing the blocks.
            sweep(self.store)
            return 0
        missing = int((~finished(self.store, run, SUFFIX)).sum())
        if missing and wait:
            if read_description(self.store) is not None:
                return missing
        elif _end(self.format, self.location, run, partial=False) is not None:
            return 0
        _logger.info('another process has made %s meanwhile', self.path)
        sweep(self.store)
        return 0


def join_blocks(
    made: Format, location: Location, run: Description, partial: bool = False
) -> Merged:
    """Make an output of the blocks of a run, which stay.

    Args:
        made: Format of the output.
        location: Where it is to be.
        run: The description of the run.
        partial: Whether to join what there is, if blocks are missing.

    Raises:
        OutputError: If blocks are missing that may not, or something cannot be read or
            written.
    """
    store = location.blocks
    done = finished(store, run, SUFFIX)
    missing = int((~done).sum())
    if missing and not partial:
        raise OutputError(
            f"'{store.url}' lacks {missing} of {run.blocks} blocks: go on with the run "
            'to have all of them, or join what there is with partial=True'
        )
    names = [block_name(run, n, SUFFIX) for n in np.flatnonzero(done).tolist()]
    blocks = Blocks(store, names, run.id, run.chip_set, run.chips, run.provenance)
    made.merge(blocks)
    failed = list_failures(location, blocks)
    update_stac(made, location, blocks)
    return Merged(blocks.count, failed, missing)


def _end(
    made: Format, location: Location, run: Description, partial: bool
) -> Merged | None:
    """Join blocks, and remove them if none is missing.

    Returns:
        What was joined; None if another process has ended the run meanwhile.

    Raises:
        OutputError: As :func:`join_blocks` raises it.
    """
    try:
        merged = join_blocks(made, location, run, partial)
        if not merged.missing:
            location.blocks.clear(DESCRIPTION_FILE)
    except OutputError:
        if read_description(location.blocks) is not None:
            raise
        return None
    return merged


def merge(path: AnyPath, partial: bool = False) -> Merged:
    """Make an output of the blocks that unfinished runs have left.

    When all blocks are there they are removed afterwards. A partial output may be read
    as any other; the blocks stay, and the run may go on.

    Args:
        path: The output, or what it is to be.
        partial: Whether to join what there is, if blocks are missing.

    Returns:
        What was joined; nothing if the output is finished already.

    Raises:
        OutputError: If there are neither blocks nor an output, blocks are missing that
            may not, or something cannot be read or written.
    """
    place = output_path(path, 'path').resolve()
    location = Location.of(str(place))
    run = read_description(location.blocks)
    if run is not None:
        made = FORMATS[run.settings['format']](str(place), run.settings['dtype'])
        merged = _end(made, location, run, partial)
        if merged is not None:
            return merged
    if not (place.exists() and made_by(place) is not None):
        raise OutputError(
            f"'{place}' has no blocks to join: there is no unfinished run in "
            f"'{location.blocks.url}'"
        )
    sweep(location.blocks)
    return Merged(0, len(listed_keys(location)), 0)
