"""Chips from the cache or from Earth Engine, many at a time."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
from dynamicvis_geo.earthengine.grid import Grid, paste
from dynamicvis_geo.earthengine.sharing import Chip, Request, plan
from dynamicvis_geo.errors import NoImageryError, RequestTooLargeError
from dynamicvis_geo.specs import SensorSpec

#: A request of at most this many pixels a side is not cut any further.
SMALLEST_SIDE = 64


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
        missing = []
        for i, chip in enumerate(chips):
            pixels = None if self.cache is None else self.cache.read(self.sensor, chip)
            if pixels is None:
                missing.append(i)
            else:
                yield i, pixels
        wanted = [chips[i] for i in missing]
        for done in self._download(wanted):
            for position, pixels in done:
                yield missing[position], pixels

    def _download(self, chips: Sequence[Chip]) -> Iterator[list[tuple[int, Pixels]]]:
        requests = plan(chips, self.block, max_pixels(self.sensor))
        return self.client.map(_Assembly(self, chips, requests).download, requests)

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
        self, fetcher: Fetcher, chips: Sequence[Chip], requests: Sequence[Request]
    ) -> None:
        self.fetcher = fetcher
        self.chips = chips
        # How many requests each chip still waits for.
        self.waiting = np.zeros(len(chips), np.int64)
        for request in requests:
            self.waiting[list(request.chips)] += 1
        self.partial: dict[int, Pixels] = {}
        self.lock = threading.Lock()

    def download(
        self, request: Request, cancelled: threading.Event
    ) -> list[tuple[int, Pixels]]:
        """Fetch one request; return the chips that it completed."""
        fetcher = self.fetcher
        name = self.chips[request.chips[0]].id
        if len(request.chips) > 1:
            name += f' and {len(request.chips) - 1} more'
        pixels = fetcher.request(request.grid, request.window, name, cancelled)
        done = self._share_out(request, pixels)
        if fetcher.cache is not None:
            for i, chip_pixels in done:
                fetcher.cache.write(fetcher.sensor, self.chips[i], chip_pixels)
        return done

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
                if i not in self.partial:
                    self.partial[i] = no_pixels(self.fetcher.sensor, grid)
                target = self.partial[i]
            paste(target, grid, pixels, request.grid)
            with self.lock:
                self.waiting[i] -= 1
                if self.waiting[i] == 0:
                    done.append((i, self.partial.pop(i)))
        return done
