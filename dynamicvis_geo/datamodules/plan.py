"""The plan of a run: its chips, requests and bytes, before it starts."""

from __future__ import annotations

from dataclasses import dataclass

#: What a run may have without being asked whether it is meant: chips, pixels of the
#: side of a chip, and bytes of output.
MOST_CHIPS, LARGEST_SIDE, MOST_BYTES = 10**6, 4096, 10**12


@dataclass(frozen=True)
class Plan:
    """The size of a run.

    Attributes:
        chips: Chips of the run; at least so many if not :attr:`laid_out`.
        finished: Those of them that need no work: they are in the output (for ``fetch``
            in the cache), or earlier runs have listed them as failed.
        zones: CRS of the chips, one a UTM zone.
        side: The longer side of a chip in pixels.
        requests: Requests to Earth Engine for the others, if none has to be repeated;
            of many chips they are counted for a part.
        fetch_bytes: Bytes of pixels that these receive.
        chip_bytes: Bytes of one chip in the output, before compression.
        laid_out: Whether chips were laid out and counted; else their number is told
            from the area, and all other figures from that number.
        scenes: Scenes that one of the chips is composed of, if they were counted.
    """

    chips: int
    finished: int
    zones: tuple[str, ...]
    side: int
    requests: int
    fetch_bytes: int
    chip_bytes: int
    laid_out: bool = True
    scenes: int | None = None

    @property
    def write_bytes(self) -> int:
        """Bytes to write, before compression."""
        return (self.chips - self.finished) * self.chip_bytes

    @property
    def output_bytes(self) -> int:
        """Bytes of the whole output, before compression."""
        return self.chips * self.chip_bytes

    @property
    def excess(self) -> tuple[str, ...]:
        """Sizes beyond what a run should have by mistake; empty for most."""
        found = (
            (self.chips > MOST_CHIPS, f'more than {MOST_CHIPS:,} chips'),
            (self.side > LARGEST_SIDE, f'chips above {LARGEST_SIDE} pixels a side'),
            (
                self.output_bytes > MOST_BYTES,
                f'more than {_size(MOST_BYTES)} of output',
            ),
        )
        return tuple(text for over, text in found if over)

    def __str__(self) -> str:
        """All figures in one line."""
        utm = all(name.startswith(('EPSG:326', 'EPSG:327')) for name in self.zones)
        least = '' if self.laid_out else 'at least '
        text = (
            f'{least}{_count(self.chips, "chip")} of {self.side} pixels in '
            f'{_count(len(self.zones), "UTM zone" if utm else "CRS")}, '
            f'{self.finished:,} of them finished already; '
            f'{_count(self.requests, "request")}, '
            f'{_size(self.fetch_bytes)} to fetch; {_size(self.write_bytes)} to write'
        )
        if self.scenes is None:
            return text
        return (
            f'{text}; {_count(self.scenes, "scene")} a chip, counted for one: the '
            'budget of Earth Engine counts the scenes that it reads, about '
            f'{self.scenes * (self.chips - self.finished):,} here'
        )


def _count(number: int, noun: str) -> str:
    return f'{number:,} {noun}{"" if number == 1 else "s"}'


def _size(number: float) -> str:
    """Bytes in the unit in which they are read most easily."""
    for unit in ('B', 'kB', 'MB', 'GB'):
        if number < 1000:
            return f'{number:.3g} {unit}'
        number /= 1000
    return f'{number:,.3g} TB' if number < 1000 else f'{number:,.0f} TB'
