"""Datasets whose images a server sends, each for exactly what is asked."""

from __future__ import annotations

import logging
import os
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import geopandas as gpd
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pyproj import CRS
from torchgeo.datasets import GeoDataset

from dynamicvis_geo.datasets._torchgeo import georeference, in_one_line
from dynamicvis_geo.datasets.footprints import project_area
from dynamicvis_geo.datasets.prefetch import FetchReport, fetch_ahead
from dynamicvis_geo.datasets.queries import read_queries
from dynamicvis_geo.datasets.requests import (
    Area,
    Window,
    local_crs,
    read_area,
    read_crs,
    read_resolution,
    read_windows,
)
from dynamicvis_geo.datasets.source import (
    ChipFailure,
    Found,
    GeoSlice,
    OnError,
    Pending,
    Sample,
    Survey,
    check_on_error,
    concerns_one_chip,
)
from dynamicvis_geo.earthengine import ChipCache
from dynamicvis_geo.earthengine.composite import MASKED, Pixels, no_imagery, no_pixels
from dynamicvis_geo.earthengine.failures import BrokenAnswerError
from dynamicvis_geo.earthengine.fetch import Assembly, Chip, Outcome, Request, plan
from dynamicvis_geo.earthengine.threads import in_background
from dynamicvis_geo.earthengine.web import Client, WebClient
from dynamicvis_geo.errors import NoImageryError, SpecError
from dynamicvis_geo.grid import Grid
from dynamicvis_geo.specs import SensorSpec
from dynamicvis_geo.time_window import TimeWindow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Says if an error takes the place of what it is about.
Keep = Callable[[Exception], bool]

#: Most pixels of a request, where a server names no limit.
NO_LIMIT = 2**62

_logger = logging.getLogger(__name__)


class RemoteDataset(GeoDataset):
    """A dataset of a server's images, for subclasses that download one: a source.

    All else is here: many requests at a time, tried again and counted, ahead of their
    use; a cache; and failures of single chips.

    A query gives the CRS, the origin and the number of pixels, and the image is that of
    the whole window that the query's time overlaps (of several, from the start of the
    first to the end of the last), as a file is read whole: labels of one day, joined by
    ``&``, go with the composite of their season. Nothing is fetched before the first
    query that is not in the cache.

    A sample holds ``image``, float32 ``[bands, height, width]``, the values as they
    are sent, with masked pixels set to ``sensor.fill_value``; ``valid_fraction``,
    float32 ``[1]``, the share of pixels that no band masks; and the georeference keys
    of the installed TorchGeo.
    """

    #: Client of a source that is given none.
    default_client: Callable[[], Client] = WebClient

    def __init__(
        self,
        roi: Area,
        time: Window | Sequence[Window],
        sensor: SensorSpec,
        *,
        crs: CRS | str | int | None = None,
        res: float | tuple[float, float] | None = None,
        transforms: Callable[[Sample], Sample] | None = None,
        cache: ChipCache | str | os.PathLike[str] | None = None,
        client: Client | None = None,
        on_missing: Literal['raise', 'fill', 'skip'] = 'raise',
    ) -> None:
        """Describe what there is to fetch.

        Args:
            roi: The area, as :class:`~dynamicvis_geo.EarthEngineDataset` takes it.
            time: Its time windows, as well.
            sensor: The imagery. Its ``collection`` is a name or an address that tells
                it from other imagery of this class; ``dtype`` that of the pixels.
            crs: CRS of the pixels; the UTM zone in the middle of *roi* (UPS at the
                poles) by default.
            res: Size of a pixel in units of the CRS, ``sensor.scale_m`` by default.
            transforms: A function of a sample that returns a transformed sample.
            cache: Folder that keeps what was fetched, or a :class:`ChipCache`.
            client: Limits of the requests.
            on_missing: As for :class:`~dynamicvis_geo.EarthEngineDataset`.

        Raises:
            SpecError: If an argument cannot be used.
        """
        if on_missing not in ('raise', 'fill', 'skip'):
            raise SpecError(
                f"on_missing={on_missing!r} is not one of 'raise', 'fill', 'skip'."
            )
        area, windows = read_area(roi), read_windows(time)
        target = local_crs(area) if crs is None else read_crs(crs)
        area = project_area(area, target)
        intervals = [window.interval for window in windows for _ in area]
        self.index = gpd.GeoDataFrame(
            geometry=np.tile(area.to_numpy(), len(windows)),
            index=pd.IntervalIndex(intervals, closed='both', name='datetime'),
            crs=target,
        )
        self.sensor = sensor
        self._res = read_resolution(res, sensor.scale_m, target)
        self.transforms = transforms
        if cache is not None and not isinstance(cache, ChipCache):
            cache = ChipCache(cache)
        self.cache = cache
        self.client = self.default_client() if client is None else client
        self.on_missing = on_missing
        # A list grows by one in any number of threads, without a lock that a fork
        # could leave held.
        self._retried: list[None] = []

    def __repr__(self) -> str:
        """Count the places and time windows, and say where they are."""
        return in_one_line(self)

    @abstractmethod
    def download(self, grid: Grid, window: tuple[str, str]) -> Any:
        """Ask the server for an image, once.

        It is called in many threads. After an error of the network, or an HTTP status
        of 429 or from 500 on, raised by ``urllib`` or ``requests``, it is called again;
        any other error is that of the chip. It should wait for ``client.timeout``
        seconds at most.

        Args:
            grid: CRS, place and shape of the image.
            window: First moment, and first moment after, in ISO form.

        Returns:
            The image, as :meth:`decode` returns it; or anything with a length that a
            :meth:`decode` of yours makes one of, while the next request is under way.

        Raises:
            NoImageryError: If there is no pixel of it.
        """

    def decode(self, answer: Any, grid: Grid) -> Pixels:
        """Check what was received.

        Args:
            answer: The result of :meth:`download`.
            grid: The pixels that were asked for.

        Returns:
            The image, ``[bands, height, width]`` of ``sensor.dtype``; masked pixels
            hold 65535 if that is uint16, -1e30 if float32.

        Raises:
            BrokenAnswerError: If it is anything else; it is then asked for again.
        """
        shape = (len(self.sensor.bands), *grid.shape)
        if answer.shape != shape or answer.dtype != self.sensor.dtype:
            raise BrokenAnswerError(
                f'the image is {answer.shape} of {answer.dtype}, instead of {shape} of '
                f'{self.sensor.dtype}'
            )
        pixels: Pixels = answer
        return pixels

    def __getitem__(self, query: GeoSlice) -> Sample | None:  # type: ignore[override]
        """Fetch one chip.

        Args:
            query: ``[xmin:xmax:xres, ymin:ymax:yres, tmin:tmax]`` to index; what is
                left out is that of the whole dataset.

        Returns:
            The sample; None if it has no imagery and ``on_missing='skip'``.

        Raises:
            IndexError: If *query* does not touch the area, or lies outside its windows.
            NoImageryError: If it has no imagery and ``on_missing='raise'``.
            EarthEngineError: If it cannot be fetched.
        """
        return self.__getitems__([query])[0]

    def __getitems__(self, queries: Sequence[GeoSlice]) -> list[Sample | None]:
        """Fetch a batch of chips concurrently.

        Args:
            queries: As for a single chip.

        Returns:
            The samples, in the order of the queries; None, which TorchGeo's users leave
            out, as for a single chip.

        Raises:
            DynamicVisGeoError: As for a single chip.
            IndexError: As for a single chip.
        """
        samples: list[Sample | None] = []
        for found in self.submit(queries, 'raise')():
            if isinstance(found, ChipFailure):
                _logger.warning('skipped: %s', found.message)
            samples.append(found if isinstance(found, dict) else None)
        return samples

    def submit(
        self,
        queries: Sequence[GeoSlice],
        on_error: OnError = 'skip',
        cancelled: threading.Event | None = None,
    ) -> Pending:
        """Start to fetch a batch in the background, as :class:`.Source` has it.

        That there is no imagery is a failure in any case if ``on_missing='skip'``.
        Transforms run in the thread that waits for the samples.
        """
        check_on_error(on_error)
        keep = concerns_one_chip if on_error == 'skip' else _keep_none

        def fetch() -> tuple[list[GeoSlice], list[Chip], list[tuple[int, Outcome]]]:
            resolved, chips = self._chips(queries)
            return resolved, chips, list(self._fetch(chips, keep, cancelled))

        future = in_background(fetch)
        return lambda: self._found(*future.result(), keep)

    @property
    def concurrency(self) -> int:
        """Requests that this process may have in flight."""
        return self.client.limit

    @property
    def retries(self) -> int:
        """Requests that this dataset has repeated in this process."""
        return len(self._retried)

    def survey(self, queries: Sequence[GeoSlice]) -> Survey:
        """Count the requests that fetching a batch of chips takes; none is made."""
        chips = self._chips(queries)[1]
        missing = self._missing(chips)
        requests = self._plan(missing)
        pixels = sum(request.grid.size for request in requests)
        a_pixel = len(self.sensor.bands) * np.dtype(self.sensor.dtype).itemsize
        return Survey(len(chips) - len(missing), len(requests), pixels * a_pixel)

    def prefetch(
        self, queries: Iterable[GeoSlice], *, progress: bool = True
    ) -> FetchReport:
        """Fetch chips into the cache ahead of their use.

        Chips that are there already are left alone, so an interrupted run continues
        where it stopped.

        Args:
            queries: A sampler, or any number of queries.
            progress: Whether to draw a progress bar.

        Returns:
            The work that was done.

        Raises:
            SpecError: If the dataset has no cache.
            IndexError: If a query lies outside the dataset.
            DynamicVisGeoError: If a chip cannot be fetched, or not be kept.
        """
        if self.cache is None:
            raise SpecError('There is no cache to fetch into: give cache= a folder.')
        return fetch_ahead(queries, self._into_cache, self.client, progress)

    def plot(
        self, sample: Sample, show_titles: bool = True, suptitle: str | None = None
    ) -> Figure:
        """Draw a sample.

        Args:
            sample: A sample of this dataset.
            show_titles: Whether to write the bands above the image.
            suptitle: Title of the figure.

        Returns:
            The first three bands as red, green and blue (the first alone, in grey, if
            there are fewer), stretched as
            :func:`~dynamicvis_geo.plotting.stretch_rgb` does.
        """
        from dynamicvis_geo.plotting import plot_rgb

        image = sample['image'].detach().cpu().float().numpy()
        shown = image[:3] if len(image) >= 3 else image[:1]
        figure = plot_rgb(shown, title=suptitle)
        if show_titles:
            figure.axes[0].set_title(', '.join(self.sensor.bands[: len(shown)]))
        return figure

    @property
    def provenance(self) -> dict[str, Any]:
        """Sensor, time windows and extent of the area, as plain values for JSON."""
        windows = self.index.index.drop_duplicates()
        return {
            'sensor': asdict(self.sensor),
            'windows': [
                list(TimeWindow.closed(w.left, w.right).milliseconds) for w in windows
            ],
            'roi': self.index.total_bounds.tolist(),
            'on_missing': self.on_missing,
        }

    def _chips(self, queries: Sequence[GeoSlice]) -> tuple[list[GeoSlice], list[Chip]]:
        return read_queries(self, queries, self._cache_source)

    def _plan(self, chips: Sequence[Chip]) -> list[Request]:
        """Choose requests that hold the pixels of chips: one a chip."""
        return plan(chips, block=1, max_pixels=NO_LIMIT)

    def _ask(
        self, grid: Grid, window: tuple[str, str], name: str, cancelled: threading.Event
    ) -> Pixels:
        """Fetch the pixels of a request, with all its tries."""
        try:
            return self.client.request(
                lambda: self.download(grid, window),
                lambda answer: self.decode(answer, grid),
                chip=name,
                cancelled=cancelled,
                on_retry=self._count_retry,
            )
        except NoImageryError:
            return no_pixels(self.sensor, grid)

    def _into_cache(self, queries: Sequence[GeoSlice]) -> Iterator[bool | None]:
        """Fetch what the cache lacks; give None for the rest, else if it is valid."""
        chips = self._chips(queries)[1]
        wanted = self._missing(chips)
        yield from (None for _ in range(len(chips) - len(wanted)))
        for _, outcome in self._fetch(wanted, _keep_none):
            if isinstance(outcome, Exception):
                raise outcome
            yield bool(self._valid(outcome).any())

    def _count_retry(self) -> None:
        self._retried.append(None)

    def _fetch(
        self,
        chips: Sequence[Chip],
        keep: Keep,
        cancelled: threading.Event | None = None,
    ) -> Iterator[tuple[int, Outcome]]:
        """Fetch chips, each as soon as it is there.

        Memory does not grow with their number, except for chips of which a part is
        still on its way.

        Args:
            chips: The chips.
            keep: Says if an error takes the place of the pixels; others are raised.
                One of a request that chips share is that of each of them.
            cancelled: Gives up when set.

        Yields:
            Position of a chip, and its pixels ``[bands, height, width]``, masked ones
            holding :data:`~.composite.MASKED`, or its error.

        Raises:
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
        requests = self._plan(wanted)
        assembly = Assembly(wanted, requests, self._ask, keep, self._store)
        for done in self.client.map(assembly.download, requests, cancelled):
            for position, outcome in done:
                yield missing[position], outcome

    def _store(self, chip: Chip, pixels: Pixels) -> None:
        if self.cache is not None:
            self.cache.write(self.sensor, chip, pixels)

    def _missing(self, chips: Sequence[Chip]) -> list[Chip]:
        """Return the chips that are not in the cache; they are not read."""
        cache = self.cache
        return [
            chip
            for chip in chips
            if cache is None or not cache.file(self.sensor, chip).exists()
        ]

    def _valid(self, pixels: Pixels) -> NDArray[np.bool_]:
        """Tell the values that are not masked."""
        masked = pixels.dtype.type(MASKED[self.sensor.dtype])
        valid: NDArray[np.bool_] = pixels != masked
        return valid

    @property
    def _cache_source(self) -> str:
        """Name that tells cached images from those of other classes."""
        return type(self).__qualname__

    def _found(
        self,
        queries: Sequence[GeoSlice],
        chips: Sequence[Chip],
        outcomes: Iterable[tuple[int, Outcome]],
        keep: Keep,
    ) -> list[Found]:
        """Turn outcomes into samples and failures, in the order of the queries."""
        found: dict[int, Found] = {}
        for i, outcome in outcomes:
            if isinstance(outcome, np.ndarray) and self._is_missing(outcome):
                chip = chips[i]
                outcome = no_imagery(
                    chip.id,
                    self.sensor,
                    chip.window,
                    "Widen the window, raise cloudy_pct, or set on_missing to 'fill' "
                    "or 'skip'.",
                    chip.id,
                )
                if self.on_missing != 'skip' and not keep(outcome):
                    raise outcome
            found[i] = (
                ChipFailure.of(i, outcome)
                if isinstance(outcome, Exception)
                else self._sample(queries[i], outcome)
            )
        return [found[i] for i in range(len(chips))]

    def _is_missing(self, pixels: Pixels) -> bool:
        return self.on_missing != 'fill' and not self._valid(pixels).any()

    def _sample(self, query: GeoSlice, pixels: Pixels) -> Sample:
        valid = self._valid(pixels)
        image = pixels.astype(np.float32)
        image[~valid] = self.sensor.fill_value
        sample: Sample = {
            'image': torch.from_numpy(image),
            'valid_fraction': torch.tensor(
                [valid.all(axis=0).mean()], dtype=torch.float32
            ),
            **georeference(self, query),
        }
        return sample if self.transforms is None else self.transforms(sample)


def _keep_none(error: Exception) -> bool:
    return False
