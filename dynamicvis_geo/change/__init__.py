"""Change: how much the embeddings of each place differ between two dates.

``distance`` is the cosine distance of the two. ``change`` scales it against the places
that did not change: what changed everywhere is taken off, and the rest is measured by
its spread among all places.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import pandas as pd

from dynamicvis_geo.change.pairs import (
    CellPairs,
    PooledPairs,
    match_places,
    own_cells,
    window_text,
    windows_of,
)
from dynamicvis_geo.change.result import Change, describe
from dynamicvis_geo.change.scores import (
    SAMPLE,
    THRESHOLD,
    common_shift,
    distances,
    robust_scores,
)
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.outputs import Output, open_output
from dynamicvis_geo.paths import AnyPath
from dynamicvis_geo.settings import check_same_settings
from dynamicvis_geo.specs import TemporalSpec
from dynamicvis_geo.time_window import TimeWindow

#: A time window as START/END or as a spec.
Window: TypeAlias = str | TemporalSpec

__all__ = ('THRESHOLD', 'Change', 'find_change')


def find_change(
    first: AnyPath,
    second: AnyPath | None = None,
    *,
    before: Window | None = None,
    after: Window | None = None,
) -> Change:
    """Find what has changed between two dates.

    Chips are matched that have the same CRS and bounds and, if both outputs know of
    points, the same point; of feature maps, their cells. What is in one output only is
    left out and counted.

    Args:
        first: Pooled embeddings or feature maps of the earlier date, or of both.
        second: The same of the later date, made with the same settings; only places and
            dates may differ. None if *first* has two time windows, or *before* and
            *after* choose them.
        before: The earlier time window, 'START/END': chips are taken whose own windows
            lie within. All chips by default.
        after: The later one.

    Returns:
        Distances and scores.

    Raises:
        SpecError: If settings differ, windows cannot be told apart or are in the wrong
            order, or no place is in both.
        SourceError: If an output cannot be read.
    """
    one, other = _open(first, second, before, after)
    if one.kind != other.kind:
        raise SpecError(
            f'{one.path} holds {one.kind} features, {other.path} {other.kind}: compare '
            'pooled embeddings with pooled ones, and feature maps with feature maps'
        )
    if second is not None:
        check_same_settings(
            one.path, one.provenance, other.path, other.provenance, images=True
        )
    if one.dimensions != other.dimensions:
        raise SpecError(
            f'{other.path} has features of {other.dimensions} numbers, {one.path} of '
            f'{one.dimensions}: compare those of one model'
        )
    rows = match_places(one, other)
    chips = describe(one.chips.iloc[rows[0]], other.chips.iloc[rows[1]])
    _refuse_order(one, other, chips)
    pairs: PooledPairs | CellPairs
    cell = None
    if one.kind == 'pooled':
        place = np.arange(len(chips))
        # Chips that were chosen have kept their numbers.
        pairs = PooledPairs(
            one,
            other,
            (
                one.chips.index.to_numpy()[rows[0]],
                other.chips.index.to_numpy()[rows[1]],
            ),
        )
    else:
        cells = own_cells(chips)
        pairs = CellPairs(one, other, rows, cells)
        place = np.repeat(np.arange(len(chips)), [each.sum() for each in cells])
        cell = np.concatenate([np.flatnonzero(each) for each in cells])
    shift = common_shift(pairs.sample(SAMPLE))
    if shift is None:
        raise SpecError(
            f'no place has a vector in both {one.path} and {other.path}: all that they '
            'have in common are zero or not finite; embed them again'
        )
    distance, rest = distances(pairs, shift)
    score, reason = robust_scores(rest)
    unmatched = tuple(
        output.total - len(np.unique(some))
        for output, some in zip((one, other), rows, strict=True)
    )
    return Change(
        chips,
        place,
        cell,
        distance,
        score,
        reason,
        (str(one.path), str(other.path)),
        (unmatched[0], unmatched[1]),
        (one.provenance, other.provenance),
    )


def _open(
    first: AnyPath,
    second: AnyPath | None,
    before: Window | None,
    after: Window | None,
) -> tuple[Output, Output]:
    """Open what is compared, without the chips of other dates."""
    one = open_output(first, sys.maxsize)
    if second is not None:
        other = open_output(second, sys.maxsize)
        if other.path.resolve() == one.path.resolve():
            raise SpecError(
                f'{one.path} is named twice: name another output, or name it once if '
                'it has two time windows'
            )
    elif before is None and after is None:
        return _halves(one)
    elif before is None or after is None:
        raise SpecError(
            f'{one.path}: before= and after= choose among its time windows together: '
            f'{", ".join(windows_of(one.chips))}'
        )
    else:
        other = one
    return _within(one, before, 'before'), _within(other, after, 'after')


def _halves(output: Output) -> tuple[Output, Output]:
    """Divide an output that has two time windows."""
    windows = windows_of(output.chips)
    if len(windows) != 2:
        several = (
            f"choose with before='START/END' and after='START/END' among its "
            f'{len(windows)} time windows: {", ".join(windows)}'
        )
        alone = (
            f'has one time window ({"".join(windows)}), and change takes two: name '
            'the output of the other date, too'
        )
        raise SpecError(f'{output.path}: {alone if len(windows) == 1 else several}')
    times = output.chips.groupby(['start', 'end'], dropna=False)
    number = times.ngroup().to_numpy()
    return _some(output, number == 0), _some(output, number == 1)


def _within(output: Output, window: Window | None, name: str) -> Output:
    """Keep the chips whose time window lies within another."""
    if window is None:
        return output
    wanted = _window(window, name)
    start, end = (
        output.chips[side].dt.tz_localize(None).to_numpy() for side in ('start', 'end')
    )
    inside = (start >= wanted.start.to_datetime64()) & (
        end < wanted.end.to_datetime64()
    )
    if not inside.any():
        raise SpecError(
            f"{name}='{'/'.join(wanted.milliseconds)}' contains none of the time "
            f'windows of {output.path}: {", ".join(windows_of(output.chips))}'
        )
    return _some(output, inside)


def _window(window: Window, name: str) -> TimeWindow:
    if isinstance(window, TemporalSpec):
        return window.window
    start, slash, end = window.partition('/')
    if not slash:
        raise SpecError(
            f'{name}={window!r} is no time window: give START/END, such as '
            '2022-06-01/2022-09-01'
        )
    try:
        return TemporalSpec(start, end).window
    except SpecError as error:
        raise SpecError(f'{name}={window!r}: {error}') from error


def _some(output: Output, chosen: np.ndarray) -> Output:
    """Return an output with some of its chips, which keep their numbers."""
    return replace(output, chips=output.chips[chosen], total=int(chosen.sum()))


def _refuse_order(before: Output, after: Output, chips: pd.DataFrame) -> None:
    if (chips['before_start'] > chips['start']).all():
        chip = chips.iloc[0]
        one = window_text(chip['before_start'], chip['before_end'])
        other = window_text(chip['start'], chip['end'])
        raise SpecError(
            f'{before.path} ({one}) is later than {after.path} ({other}): give the '
            'earlier one first'
        )
    if before.path == after.path and (
        windows_of(before.chips) == windows_of(after.chips)
    ):
        raise SpecError(
            f'before= and after= choose the same time windows of {before.path}: '
            f'{", ".join(windows_of(before.chips))}'
        )
