"""Chips from the cache or from Earth Engine, many at a time."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dynamicvis_geo.earthengine.cache import ChipCache
from dynamicvis_geo.earthengine.client import EarthEngineClient
from dynamicvis_geo.earthengine.composite import (
    Pixels,
    build_request,
    max_pixels,
    no_pixels,
    parse_pixels,
)
from dynamicvis_geo.earthengine.sharing import Chip, Request, plan
from dynamicvis_geo.errors import (
    EarthEngineError,
    NoImageryError,
    RequestTooLargeError,
)
from dynamicvis_geo.grid import Grid, paste
from dynamicvis_geo.specs import SensorSpec

#: What became of a chip.
Outcome = Pixels | EarthEngineError

#: A request of at most this many pixels a side is not cut any further.
SMALLEST_SIDE = 64


class Survey(NamedTuple):
    """What fetching some chips will take.

    Attributes:
        cached: Chips that are in the cache already.
        requests: Requests for the others.
        bytes: Bytes of pixels that these receive.
    """

    cached: int
    requests: int
    bytes: int

    @classmethod
    def total(cls, parts: Sequence['Survey'], times: float = 1.0) -> 'Survey':
        """Add up, and take the sum so many times."""
        return cls(*(round(times * sum(part[i] for part in parts)) for i in range(3)))


@dataclass(frozen=True)
class Fetcher:
    """Fetches chips.

    Attributes:
        sensor: What imagery.
        client: How to reach Earth Engine.
        cache: Where chips are kept, if anywhere.
        block: Largest side of a request that neighbouring chips share, in pixels.
    """

    sensor: SensorSpec
    client: EarthEngineClient
    cache: ChipCache | None
    block: int

    def fetch(self, chips: Sequence[Chip]) -> Iterator[tuple[int, Pixels]]:
        """Fetch chips, each as soon as it is there.

        Memory does not grow with their number, except for chips of which a part is
        still on its way.

        Args:
            chips: What is wanted.

        Yields:
            Position of a chip and its pixels ``[bands, height, width]``, masked ones
            holding :data:`~.composite.MASKED`; all masked where there is no imagery.

        Raises:
            EarthEngineError: If a chip cannot be had.
            OutputError: If a chip cannot be kept in the cache.
        """
        for i, outcome in self.fetch_each(chips, lambda _: False):
            if isinstance(outcome, EarthEngineError):
                raise outcome
            yield i, outcome

    def fetch_each(
        self,
        chips: Sequence[Chip],
        keep: Callable[[EarthEngineError], bool],
        cancelled: threading.Event | None = None,
    ) -> Iterator[tuple[int, Outcome]]:
        """Fetch chips as :meth:`fetch` does, with errors in place of their pixels.

        Args:
            chips: What is wanted.
            keep: Whether an error takes the place of the pixels; others are raised.
                One of a request that chips share is that of each of them.
            cancelled: Gives up when set.

        Yields:
            Position of a chip, and its pixels or its error.

        Raises:
            EarthEngineError: The first one that is not to be kept.
            OutputError: If a chip cannot be kept in the cache.
            CancelledError: If *cancelled* was set meanwhile.
        """
        missing = []
        for i, chip in enumerate(chips):
            pixels = None if self.cache is None else self.cache.read(self.sensor, chip)
            if pixels is None:
                missing.append(i)
            else:
                yield i, pixels
        wanted = [chips[i] for i in missing]
        requests = plan(wanted, self.block, max_pixels(self.sensor))
        assembly = _Assembly(self, wanted, requests, keep)
        for done in self.client.map(assembly.download, requests, cancelled):
            for position, outcome in done:
                yield missing[position], outcome

    def survey(self, chips: Sequence[Chip]) -> Survey:
        """Count what :meth:`fetch` would do; nothing is fetched, nor read."""
        missing = [
            chip
            for chip in chips
            if self.cache is None or not self.cache.file(self.sensor, chip).exists()
        ]
        requests = plan(missing, self.block, max_pixels(self.sensor))
        pixels = sum(request.grid.size for request in requests)
        a_pixel = len(self.sensor.bands) * np.dtype(self.sensor.dtype).itemsize
        return Survey(len(chips) - len(missing), len(requests), pixels * a_pixel)

    def request(
        self, grid: Grid, window: tuple[str, str], name: str, cancelled: threading.Event
    ) -> Pixels:
        """Fetch the pixels of a grid, in parts if they are too many for one request.

        Args:
            grid: The pixels.
            window: First moment, and first moment after.
            name: What is fetched, for errors.
            cancelled: Gives up when set.
        """
        try:
            return self.client.request(
                lambda: build_request(self.sensor, window, grid),
                lambda body: parse_pixels(body, self.sensor, grid),
                chip=name,
                cancelled=cancelled,
            )
        except NoImageryError:
            return no_pixels(self.sensor, grid)
        except RequestTooLargeError:
            if max(grid.shape) <= SMALLEST_SIDE:
                raise
        half = (-(-side // 2) if side > SMALLEST_SIDE else side for side in grid.shape)
        pixels = no_pixels(self.sensor, grid)
        for part in grid.tiles(*half):
            paste(pixels, grid, self.request(part, window, name, cancelled), part)
        return pixels


class _Assembly:
    """Chips under way, put together from the requests that hold their pixels."""

    def __init__(
        self,
        fetcher: Fetcher,
        chips: Sequence[Chip],
        requests: Sequence[Request],
        keep: Callable[[EarthEngineError], bool],
    ) -> None:
        self.fetcher = fetcher
        self.chips = chips
        self.keep = keep
        # How many requests each chip still waits for.
        self.waiting = np.zeros(len(chips), np.int64)
        for request in requests:
            self.waiting[list(request.chips)] += 1
        self.partial: dict[int, Pixels] = {}
        self.failed: set[int] = set()
        self.lock = threading.Lock()

    def download(
        self, request: Request, cancelled: threading.Event
    ) -> Sequence[tuple[int, Outcome]]:
        """Fetch one request; return the chips that it completed, or that it ended."""
        fetcher = self.fetcher
        name = self.chips[request.chips[0]].id
        if len(request.chips) > 1:
            name += f' and {len(request.chips) - 1} more'
        try:
            pixels = fetcher.request(request.grid, request.window, name, cancelled)
        except EarthEngineError as error:
            if not self.keep(error):
                raise
            return self._fail(request, error)
        done = self._share_out(request, pixels)
        if fetcher.cache is not None:
            for i, chip_pixels in done:
                fetcher.cache.write(fetcher.sensor, self.chips[i], chip_pixels)
        return done

    def _fail(
        self, request: Request, error: EarthEngineError
    ) -> list[tuple[int, EarthEngineError]]:
        # A chip of several requests fails once, and is never complete after that.
        with self.lock:
            ended = [i for i in request.chips if i not in self.failed]
            self.failed.update(ended)
            for i in ended:
                self.partial.pop(i, None)
        return [(i, error) for i in ended]

    def _share_out(self, request: Request, pixels: Pixels) -> list[tuple[int, Pixels]]:
        if (
            len(request.chips) == 1
            and self.chips[request.chips[0]].grid == request.grid
        ):
            return [(request.chips[0], pixels)]
        done = []
        for i in request.chips:
            grid = self.chips[i].grid
            with self.lock:
                if i in self.failed:
                    continue
                if i not in self.partial:
                    self.partial[i] = no_pixels(self.fetcher.sensor, grid)
                target = self.partial[i]
            paste(target, grid, pixels, request.grid)
            with self.lock:
                self.waiting[i] -= 1
                if self.waiting[i] == 0:
                    done.append((i, self.partial.pop(i)))
        return done
