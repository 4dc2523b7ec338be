"""Any place, any dates: composites from Google Earth Engine as a TorchGeo dataset."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import ee
from pyproj import CRS

from dynamicvis_geo.datasets.remote import RemoteDataset
from dynamicvis_geo.datasets.requests import Area, Window
from dynamicvis_geo.datasets.source import GeoSlice, Sample
from dynamicvis_geo.earthengine import ChipCache, EarthEngineClient
from dynamicvis_geo.earthengine.composite import (
    Pixels,
    build_request,
    build_scene_count,
    max_pixels,
    no_pixels,
    parse_pixels,
    parse_scene_count,
)
from dynamicvis_geo.earthengine.fetch import Chip, Request, plan
from dynamicvis_geo.errors import RequestTooLargeError, SpecError
from dynamicvis_geo.grid import Grid, paste
from dynamicvis_geo.specs import SensorSpec

#: Seconds that a question beside the run may take.
PATIENCE = 30.0
#: A request of at most this many pixels a side is not cut any further.
SMALLEST_SIDE = 64


class EarthEngineDataset(RemoteDataset):
    """Composites of satellite scenes, made by Earth Engine for exactly what is asked.

    A query gives the CRS, the origin and the number of pixels; the composite is made
    from the scenes of the whole window that the query's time overlaps (of several, from
    the start of the first to the end of the last), as a file is read whole: labels of
    one day, joined by ``&``, go with the composite of their season. Nothing is fetched,
    and neither network nor credentials are needed, before the first query that is not
    in the cache.

    A sample holds ``image``, float32 ``[bands, height, width]``, the values of the
    collection as they are (surface reflectance of Sentinel-2: 0 to 10000) with masked
    pixels set to ``sensor.fill_value``; ``valid_fraction``, float32 ``[1]``, the share
    of pixels that no band masks; and the georeference keys of the installed TorchGeo.
    """

    client: EarthEngineClient
    default_client = EarthEngineClient

    def __init__(
        self,
        roi: Area,
        time: Window | Sequence[Window],
        sensor: SensorSpec = SensorSpec(),  # noqa: B008 - frozen
        *,
        crs: CRS | str | int | None = None,
        res: float | tuple[float, float] | None = None,
        transforms: Callable[[Sample], Sample] | None = None,
        cache: ChipCache | str | os.PathLike[str] | None = None,
        client: EarthEngineClient | None = None,
        on_missing: Literal['raise', 'fill', 'skip'] = 'raise',
        block_size: int = 1024,
    ) -> None:
        """Describe what there is to fetch.

        Args:
            roi: The area: a shapely geometry (EPSG:4326), a GeoSeries or GeoDataFrame,
                a spec, the path of a vector file, or text (WKT in EPSG:4326, or
                ``minlon,minlat,maxlon,maxlat``).
            time: A (start, end) pair of dates, the end exclusive, or a TemporalSpec; or
                a list of them, each for one composite.
            sensor: What imagery, and how it is composed.
            crs: CRS of the pixels; the UTM zone in the middle of *roi* (UPS at the
                poles) by default.
            res: Size of a pixel in units of the CRS, ``sensor.scale_m`` by default.
            transforms: A function of a sample that returns a transformed sample.
            cache: Folder that keeps what was fetched, or a :class:`ChipCache`.
            client: How to reach Earth Engine.
            on_missing: What happens to a chip without a single valid pixel:
                ``'raise'`` an error, ``'fill'`` it with ``sensor.fill_value``, or
                ``'skip'`` it: its sample is None, which
                :func:`~dynamicvis_geo.datasets.collate` leaves out of the batch (in a
                :class:`~dynamicvis_geo.datasets.ChipDataset` it is a
                :class:`~dynamicvis_geo.datasets.ChipFailure`, which is written).
            block_size: Largest side, in pixels, of a request that chips of one batch
                share when they touch or overlap; 1 keeps to a request a chip.

        Raises:
            SpecError: If an argument cannot be used.
        """
        if isinstance(block_size, bool) or not isinstance(block_size, int):
            raise SpecError(f'block_size={block_size!r} is not a whole number.')
        if block_size < 1:
            raise SpecError(f'block_size={block_size!r} is not positive.')
        super().__init__(
            roi,
            time,
            sensor,
            crs=crs,
            res=res,
            transforms=transforms,
            cache=cache,
            client=client,
            on_missing=on_missing,
        )
        self.block_size = block_size

    def count_scenes(self, query: GeoSlice) -> int:
        """Count the scenes that a chip is composed of, in one request.

        It is tried for half a minute at most.

        Args:
            query: As for a single chip.

        Raises:
            IndexError: As for a single chip.
            EarthEngineError: If Earth Engine does not tell.
        """
        client = replace(self.client, timeout=PATIENCE, retry_for=PATIENCE)
        (chip,) = self._chips([query])[1]
        return client.request(
            lambda: ee.data.computePixels(
                build_scene_count(self.sensor, chip.window, chip.grid)
            ),
            parse_scene_count,
            chip=chip.id,
            cancelled=threading.Event(),
        )

    def download(self, grid: Grid, window: tuple[str, str]) -> bytes:
        """Have an image computed, once; see :class:`RemoteDataset`.

        Args:
            grid: The pixels.
            window: First moment, and first moment after, in ISO form.

        Returns:
            A NumPy file, as :meth:`decode` takes it.
        """
        body: bytes = ee.data.computePixels(build_request(self.sensor, window, grid))
        return body

    def decode(self, answer: bytes, grid: Grid) -> Pixels:
        """Read the answer, and check it; see :class:`RemoteDataset`.

        Args:
            answer: A NumPy file.
            grid: The pixels that were asked for.

        Returns:
            The pixels ``[bands, height, width]`` of ``sensor.dtype``.

        Raises:
            BrokenAnswerError: If it is anything else.
        """
        return parse_pixels(answer, self.sensor, grid)

    def _plan(self, chips: Sequence[Chip]) -> list[Request]:
        return plan(chips, self.block_size, max_pixels(self.sensor))

    def _ask(
        self, grid: Grid, window: tuple[str, str], name: str, cancelled: threading.Event
    ) -> Pixels:
        """Fetch a request, in parts if its pixels are too many for one."""
        try:
            return super()._ask(grid, window, name, cancelled)
        except RequestTooLargeError:
            if max(grid.shape) <= SMALLEST_SIDE:
                raise
        half = (-(-side // 2) if side > SMALLEST_SIDE else side for side in grid.shape)
        pixels = no_pixels(self.sensor, grid)
        for part in grid.tiles(*half):
            paste(pixels, grid, self._ask(part, window, name, cancelled), part)
        return pixels

    @property
    def _cache_source(self) -> str:
        # The names of cached chips date from before there were other sources.
        return ''
