import numpy as np
import pandas as pd
import pytest

from dynamicvis_geo.specs import TemporalSpec
from dynamicvis_geo.time_window import (
    ALWAYS,
    FIRST,
    LAST,
    TimeWindow,
    end_of,
    last_of,
    recorded,
)

SUMMER = TimeWindow(pd.Timestamp('2022-06-01'), pd.Timestamp('2022-09-01'))


@pytest.mark.parametrize(
    'window',
    [
        SUMMER,
        TimeWindow(pd.Timestamp('2022-06-01 10:30:00.5'), pd.Timestamp('2022-06-02')),
        TimeWindow(FIRST, pd.Timestamp('2022-06-02')),
        TimeWindow(pd.Timestamp('2022-06-02'), LAST),
        ALWAYS,
    ],
)
def test_there_and_back_from_the_closed_intervals_of_torchgeo(
    window: TimeWindow,
) -> None:
    interval = window.interval
    assert interval.closed == 'both'
    assert TimeWindow.closed(interval.left, interval.right) == window
    assert (window.slice.start, window.slice.stop) == (interval.left, interval.right)
    end = np.array([window.end.as_unit('ns').value])
    assert (end_of(last_of(end)) == end).all()
    assert last_of(end)[0] == window.last.as_unit('ns').value


def test_windows_that_meet_do_not_overlap() -> None:
    after = TimeWindow(SUMMER.end, pd.Timestamp('2023-01-01'))
    assert not SUMMER.overlaps(after)
    assert not after.overlaps(SUMMER)
    day = pd.Timestamp('2022-08-31 23:59:59.999999')
    assert SUMMER.overlaps(TimeWindow.closed(day, day))
    assert not SUMMER.overlaps(TimeWindow.closed(SUMMER.end, SUMMER.end))
    assert SUMMER.overlaps(ALWAYS)
    assert TemporalSpec.range('2022-06-01', '2022-09-01').window == SUMMER


def test_no_limit_is_nat_in_tables_and_files() -> None:
    start = np.array([FIRST.value, SUMMER.start.as_unit('ns').value])
    end = np.array([LAST.value, SUMMER.end.as_unit('ns').value])
    first, last = (pd.DatetimeIndex(times) for times in recorded(start, end))
    assert first.isna().tolist() == last.isna().tolist() == [True, False]
    assert first[1] == pd.Timestamp('2022-06-01')
    assert last[1] == pd.Timestamp('2022-08-31 23:59:59.999999')
    assert TimeWindow.closed(pd.NaT, pd.NaT) == ALWAYS


def test_earth_engine_counts_milliseconds() -> None:
    assert SUMMER.milliseconds == ('2022-06-01', '2022-09-01')
    moment = pd.Timestamp('2022-06-01 10:30:00.000400', tz='Europe/Berlin')
    assert TimeWindow.closed(moment, moment).milliseconds == (
        '2022-06-01T08:30:00.000',
        '2022-06-01T08:30:00.001',
    )
