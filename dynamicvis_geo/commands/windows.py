"""Several time windows, as options name them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dynamicvis_geo.commands.options import reader
from dynamicvis_geo.errors import SpecError

if TYPE_CHECKING:
    from dynamicvis_geo.specs import TemporalSpec


def _read_windows(text: str) -> list[TemporalSpec]:
    from dynamicvis_geo.specs import TemporalSpec

    found = []
    for part in text.split(','):
        start, slash, end = part.strip().partition('/')
        if not slash:
            raise SpecError(
                f'{part!r} is no window: write START/END, such as '
                '2022-06-01/2022-09-01, and a comma between two of them'
            )
        found.append(TemporalSpec.range(start, end))
    return _each_once(text, found)


def _read_years(text: str) -> list[TemporalSpec]:
    from dynamicvis_geo.specs import TemporalSpec

    found = []
    for part in text.split(','):
        years = re.fullmatch(r'(\d{4})(?:-(\d{4}))?', part.strip())
        if years is None:
            raise SpecError(
                f'{part!r} is no year: write 2018,2020 or 2018-2024, which has them all'
            )
        first, last = years.groups(years[1])
        found += TemporalSpec.years(int(first), int(last))
    return _each_once(text, found)


def _each_once(text: str, found: list[TemporalSpec]) -> list[TemporalSpec]:
    for i, window in enumerate(found):
        if window in found[:i]:
            raise SpecError(
                f'{text!r} has {window.start}/{window.end} twice: leave out one'
            )
    return found


#: The windows of ``START/END,...``, and of ``2018-2024`` or ``2018,2020``.
windows = reader(_read_windows)
years = reader(_read_years)
