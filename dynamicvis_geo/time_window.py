"""Time windows: from a start on, up to but without an end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Ints = NDArray[np.int64]

#: Times that are no limit, as TorchGeo writes them, and their nanoseconds.
FIRST, LAST = pd.Timestamp.min, pd.Timestamp.max
_NO_START, _NO_END = FIRST.value, LAST.value

#: From the last moment of a window, where TorchGeo's closed intervals end, to its end.
STEP = pd.Timedelta(microseconds=1)
_STEP = STEP.value
_DAY = pd.Timedelta(days=1).value


@dataclass(frozen=True)
class TimeWindow:
    """A time window in UTC.

    Attributes:
        start: First moment; :data:`FIRST` for no limit.
        end: First moment after the window; :data:`LAST` for no limit.
    """

    start: pd.Timestamp = FIRST
    end: pd.Timestamp = LAST

    @classmethod
    def closed(cls, first: Any, last: Any) -> Self:
        """The window of a closed interval, as TorchGeo's indices and queries have it.

        Args:
            first: First moment; with a time zone or in UTC; NaT for no limit.
            last: Last moment, to the microsecond; NaT for no limit.
        """
        start, last = utc(first), utc(last)
        no_end = pd.isna(last) or last > LAST - STEP
        return cls(FIRST if pd.isna(start) else start, LAST if no_end else last + STEP)

    @classmethod
    def of_nanoseconds(cls, start: int, end: int) -> Self:
        """Make the window of a row of a chip table.

        Args:
            start: Nanoseconds since 1970: see :attr:`nanoseconds`.
            end: Nanoseconds since 1970.
        """
        return cls(pd.Timestamp(start), pd.Timestamp(end))

    @property
    def nanoseconds(self) -> tuple[int, int]:
        """Start and end since 1970."""
        return self.start.as_unit('ns').value, self.end.as_unit('ns').value

    @property
    def last(self) -> pd.Timestamp:
        """Last moment, to the microsecond."""
        return LAST if self.end == LAST else self.end - STEP

    @property
    def interval(self) -> pd.Interval[pd.Timestamp]:
        """The window as the index of a TorchGeo dataset has it: closed."""
        return pd.Interval(self.start, self.last, closed='both')

    @property
    def slice(self) -> slice:
        """The window as a TorchGeo dataset is asked for it."""
        return slice(self.start, self.last, 1)

    @property
    def is_limited(self) -> bool:
        """False for all of time, which has neither start nor end."""
        return self != ALWAYS

    @cached_property
    def milliseconds(self) -> tuple[str, str]:
        """Start and end in ISO form, as Earth Engine counts time: in milliseconds."""
        start = self.start.floor('ms')
        end = max(self.last.ceil('ms'), start + pd.Timedelta(milliseconds=1))
        return _iso(start), _iso(end)

    def overlaps(self, other: TimeWindow) -> bool:
        """Tell if the two have a moment in common.

        Args:
            other: A window.
        """
        return bool(self.start < other.end and other.start < self.end)

    def __str__(self) -> str:
        """The window as ids of chips have it; empty without limits.

        ``20220601-20220901`` are the dates of start and end, ``20220601`` is a day. A
        window that does not end with a day shows its last moment, with the time.
        """
        if not self.is_limited:
            return ''
        start, end = self.nanoseconds
        if start % _DAY == 0 and end - start == _DAY:
            return _stamp(start)
        if end % _DAY == 0:
            return f'{_stamp(start)}-{_stamp(end)}'
        last = self.last.as_unit('ns').value
        midnight = 'T000000' if last % _DAY == 0 else ''
        return f'{_stamp(start)}-{_stamp(last)}{midnight}'


#: All of time.
ALWAYS = TimeWindow()


def utc(time: Any) -> pd.Timestamp:
    """Read a time with a time zone, or in UTC; the result has no time zone."""
    stamp = pd.Timestamp(time)
    return stamp if stamp.tz is None else stamp.tz_convert(None)


def end_of(last: Ints) -> Ints:
    """Return the ends of windows.

    Args:
        last: Their last moments in nanoseconds since 1970.

    Returns:
        int64, of the same shape.
    """
    return np.where(last > _NO_END - _STEP, _NO_END, last + _STEP)


def last_of(end: Ints) -> Ints:
    """Return the last moments of windows.

    Args:
        end: Their ends in nanoseconds since 1970.

    Returns:
        int64, of the same shape.
    """
    return np.where(end == _NO_END, _NO_END, end - _STEP)


def recorded(start: Ints, end: Ints) -> tuple[NDArray[Any], NDArray[Any]]:
    """First and last moments as tables and files have them.

    Args:
        start: Of each window, in nanoseconds.
        end: Of each window, in nanoseconds.

    Returns:
        datetime64[ns], NaT for no limit.
    """
    none = np.datetime64('NaT', 'ns')
    first, last = (times.view('datetime64[ns]') for times in (start, last_of(end)))
    return (
        np.where(start == _NO_START, none, first),
        np.where(end == _NO_END, none, last),
    )


def _iso(time: pd.Timestamp) -> str:
    if time == time.normalize():
        return str(time.date())
    return time.isoformat(timespec='milliseconds')


def _stamp(nanoseconds: int) -> str:
    """A date, and the time of day unless it is midnight."""
    if nanoseconds in (_NO_START, _NO_END):
        return 'open'
    stamp = pd.Timestamp(nanoseconds)
    text = stamp.strftime('%Y%m%d')
    if nanoseconds % _DAY:
        text += stamp.strftime('T%H%M%S')
        fraction = nanoseconds % 1_000_000_000
        if fraction:
            text += f'{fraction:09d}' if fraction % 1000 else f'{fraction // 1000:06d}'
    return text
