"""Any place, any dates: composites from Google Earth Engine as a TorchGeo dataset."""

from __future__ import annotations

import logging
import os
import threading
import time as clock
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
import torch
from numpy.typing import NDArray
from pyproj import CRS
from torchgeo.datasets import GeoDataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dynamicvis_geo.datasets._torchgeo import georeference
from dynamicvis_geo.datasets.areas import (
    Area,
    Window,
    local_crs,
    project_area,
    read_area,
    read_crs,
    read_resolution,
    read_windows,
)
from dynamicvis_geo.datasets.chip_ids import chip_id
from dynamicvis_geo.datasets.failures import (
    OnError,
    check_on_error,
    concerns_one_chip,
)
from dynamicvis_geo.earthengine import ChipCache, EarthEngineClient
from dynamicvis_geo.earthengine.client import Traffic
from dynamicvis_geo.earthengine.composite import MASKED, Pixels
from dynamicvis_geo.earthengine.fetch import Fetcher, Outcome, Survey
from dynamicvis_geo.earthengine.scenes import count_scenes
from dynamicvis_geo.earthengine.sharing import Chip
from dynamicvis_geo.earthengine.threads import in_background
from dynamicvis_geo.errors import EarthEngineError, NoImageryError, SpecError
from dynamicvis_geo.grid import Grid, crs_text
from dynamicvis_geo.specs import SensorSpec
from dynamicvis_geo.time_window import TimeWindow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Sample = dict[str, Any]
#: What selects a chip: slices of x, y and time.
Query = tuple[slice, slice, slice]
#: Which errors take the place of what they are about.
Keep = Callable[[EarthEngineError], bool]

#: Queries that `prefetch` plans at a time.
SLAB = 20_000
#: Seconds that a question beside the run may take.
PATIENCE = 30.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FetchReport:
    """What :meth:`EarthEngineDataset.prefetch` did.

    Attributes:
        chips: Number of chips asked for.
        fetched: How many were fetched; the others were in the cache.
        without_imagery: How many of the fetched ones have no valid pixel.
        requests: Requests sent.
        retries: How many of them were repetitions.
        bytes: Bytes received.
        seconds: Time taken.
    """

    chips: int
    fetched: int
    without_imagery: int
    requests: int
    retries: int
    bytes: int
    seconds: float


class EarthEngineDataset(GeoDataset):
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
        if on_missing not in ('raise', 'fill', 'skip'):
            raise SpecError(
                f"on_missing={on_missing!r} is not one of 'raise', 'fill', 'skip'."
            )
        if isinstance(block_size, bool) or not isinstance(block_size, int):
            raise SpecError(f'block_size={block_size!r} is not a whole number.')
        if block_size < 1:
            raise SpecError(f'block_size={block_size!r} is not positive.')
        area, windows = read_area(roi), read_windows(time)
        target = local_crs(area) if crs is None else read_crs(crs)
        area = project_area(area, target)
        intervals = [window.interval for window in windows]
        self.index = gpd.GeoDataFrame(
            geometry=np.tile(area.to_numpy(), len(windows)),
            index=pd.IntervalIndex(
                [interval for interval in intervals for _ in range(len(area))],
                closed='both',
                name='datetime',
            ),
            crs=target,
        )
        self.sensor = sensor
        self._res = read_resolution(res, sensor.scale_m, target)
        self.transforms = transforms
        if cache is not None and not isinstance(cache, ChipCache):
            cache = ChipCache(cache)
        self.cache = cache
        self.client = client if client is not None else EarthEngineClient()
        self.on_missing = on_missing
        self.block_size = block_size

    def __getitem__(self, query: Query) -> Sample | None:  # type: ignore[override]
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

    def __getitems__(self, queries: Sequence[Query]) -> list[Sample | None]:
        """Fetch a batch of chips concurrently.

        Args:
            queries: As for a single chip.

        Returns:
            The samples, in the order of the queries.

        Raises:
            IndexError: As for a single chip.
            NoImageryError: As for a single chip.
            EarthEngineError: As for a single chip.
        """
        samples: list[Sample | None] = []
        for found in self.fetch_each(queries, 'raise'):
            if isinstance(found, EarthEngineError):
                _logger.warning('skipped: %s', found)
            samples.append(None if isinstance(found, EarthEngineError) else found)
        return samples

    def fetch_each(
        self, queries: Sequence[Query], on_error: OnError = 'skip'
    ) -> list[Sample | EarthEngineError]:
        """Fetch a batch of chips concurrently, with errors in place of samples.

        Args:
            queries: As for a single chip.
            on_error: ``'skip'`` returns an error that concerns one chip in the place
                of its sample, ``'raise'`` raises the first one. That there is no
                imagery is returned in any case if ``on_missing='skip'``.

        Returns:
            Samples and errors, in the order of the queries.

        Raises:
            IndexError: As for a single chip.
            EarthEngineError: If it concerns the whole run, or as *on_error* says.
        """
        resolved, chips = self._resolve(queries)
        keep = _keeper(on_error)
        return self._samples(
            resolved, chips, self._fetcher().fetch_each(chips, keep), keep
        )

    def begin(
        self,
        queries: Sequence[Query],
        on_error: OnError = 'skip',
        cancelled: threading.Event | None = None,
    ) -> Callable[[], list[Sample | EarthEngineError]]:
        """Begin to fetch a batch in the background; nothing is raised here.

        Args:
            queries: As for a single chip.
            on_error: As for :meth:`fetch_each`.
            cancelled: Gives up when set.

        Returns:
            A function that waits for the batch, and gives or raises what
            :meth:`fetch_each` would. Transforms run in the thread that calls it.
        """

        def download() -> tuple[list[Query], list[Chip], list[tuple[int, Outcome]]]:
            resolved, chips = self._resolve(queries)
            outcomes = self._fetcher().fetch_each(chips, _keeper(on_error), cancelled)
            return resolved, chips, list(outcomes)

        future = in_background(download)
        return lambda: self._samples(*future.result(), _keeper(on_error))

    @property
    def concurrency(self) -> int:
        """Requests that this process may have in flight."""
        return self.client.share()

    @property
    def traffic(self) -> Traffic:
        """What equal clients sent and received in this process."""
        return self.client.traffic

    def survey(self, queries: Sequence[Query]) -> Survey:
        """Count what fetching a batch of chips would take; nothing is fetched.

        Args:
            queries: As for a single chip.

        Raises:
            IndexError: As for a single chip.
        """
        return self._fetcher().survey(self._resolve(queries)[1])

    def count_scenes(self, query: Query) -> int:
        """Count the scenes that a chip is composed of, in one request.

        It is tried for half a minute at most.

        Args:
            query: As for a single chip.

        Raises:
            IndexError: As for a single chip.
            EarthEngineError: If Earth Engine does not tell.
        """
        client = replace(self.client, timeout=PATIENCE, retry_for=PATIENCE)
        return count_scenes(client, self.sensor, self._resolve([query])[1][0])

    def prefetch(
        self, queries: Iterable[Query], *, progress: bool = True
    ) -> FetchReport:
        """Fetch chips into the cache ahead of their use.

        Chips that are there already are left alone, so an interrupted run continues
        where it stopped.

        Args:
            queries: What to fetch: a sampler, or any number of queries.
            progress: Whether to draw a progress bar.

        Returns:
            What was done.

        Raises:
            SpecError: If the dataset has no cache.
            IndexError: If a query lies outside the dataset.
            EarthEngineError: If a chip cannot be fetched.
        """
        if self.cache is None:
            raise SpecError('There is no cache to fetch into: give cache= a folder.')
        started, before = clock.monotonic(), self.client.traffic.counts
        total = fetched = empty = 0
        count = len(queries) if isinstance(queries, Sized) else None
        remaining = iter(queries)
        with (
            logging_redirect_tqdm(),
            tqdm(total=count, unit='chip', disable=not progress) as bar,
        ):
            while slab := list(islice(remaining, SLAB)):
                _, chips = self._resolve(slab)
                wanted = [
                    chip
                    for chip in chips
                    if not self.cache.file(self.sensor, chip).exists()
                ]
                total += len(chips)
                bar.update(len(chips) - len(wanted))
                for _, pixels in self._fetcher().fetch(wanted):
                    fetched += 1
                    empty += not self._valid(pixels).any()
                    counts = self.client.traffic.counts
                    bar.set_postfix(
                        MB=f'{(counts.received - before.received) / 1e6:.1f}',
                        retries=counts.retries - before.retries,
                        refresh=False,
                    )
                    bar.update()
        counts = self.client.traffic.counts
        return FetchReport(
            chips=total,
            fetched=fetched,
            without_imagery=empty,
            requests=counts.requests - before.requests,
            retries=counts.retries - before.retries,
            bytes=counts.received - before.received,
            seconds=clock.monotonic() - started,
        )

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
        """What the images are: sensor, windows of time, and extent of the area."""
        windows = self.index.index.drop_duplicates()
        return {
            'sensor': asdict(self.sensor),
            'windows': [
                list(TimeWindow.closed(w.left, w.right).milliseconds) for w in windows
            ],
            'roi': self.index.total_bounds.tolist(),
            'on_missing': self.on_missing,
        }

    def _fetcher(self) -> Fetcher:
        return Fetcher(self.sensor, self.client, self.cache, self.block_size)

    def _resolve(self, wanted: Sequence[Query]) -> tuple[list[Query], list[Chip]]:
        """Return complete queries, and what they ask for."""
        queries = [self._disambiguate_slice(query) for query in wanted]
        crs = crs_text(self.crs)
        chips = []
        times = self._windows(queries).tolist()
        for (x, y, _), (first, last) in zip(queries, times, strict=True):
            try:
                grid = Grid.from_slices(crs, x, y).rounded()
            except ValueError as error:
                raise IndexError(f'query: {error}') from error
            window = _window(first, last)
            name = chip_id(self.crs, grid, window)
            chips.append(Chip(grid, window.milliseconds, name))
        return queries, chips

    def _windows(self, queries: Sequence[Query]) -> NDArray[np.int64]:
        """Return the window of each query: start and end in nanoseconds.

        A query has the window that it names, else all of those that it overlaps, else
        one that it touches.

        Raises:
            IndexError: If one touches no window, or not the area.
        """
        edges = np.array([(x.start, y.start, x.stop, y.stop) for x, y, _ in queries])
        times = np.array(
            [(_nanoseconds(t.start), _nanoseconds(t.stop)) for _, _, t in queries]
        ).reshape(-1, 2)
        boxes = shapely.box(*edges.reshape(-1, 4).T)
        which, rows = self.index.sindex.query(boxes, predicate='intersects')
        windows = self.index.index
        left = windows.left.as_unit('ns').asi8[rows]
        right = windows.right.as_unit('ns').asi8[rows]
        start, stop = times[which].T
        touches = (start <= right) & (stop >= left)
        overlaps = (start < right) & (stop > left)
        same = (start == left) & (stop == right)
        fit = touches.astype(np.int64) + overlaps + same
        best = np.zeros(len(queries), np.int64)
        np.maximum.at(best, which, fit)
        if not best.all():
            query = queries[int(best.argmin())]
            raise IndexError(
                f'query: {query} not found in index with bounds: {self.bounds}'
            )
        chosen = fit == best[which]
        limits = np.iinfo(np.int64)
        found = np.tile([limits.max, limits.min], (len(queries), 1))
        np.minimum.at(found[:, 0], which[chosen], left[chosen])
        np.maximum.at(found[:, 1], which[chosen], right[chosen])
        return found

    def _valid(self, pixels: Pixels) -> NDArray[np.bool_]:
        """Which values are not masked."""
        masked = pixels.dtype.type(MASKED[self.sensor.dtype])
        valid: NDArray[np.bool_] = pixels != masked
        return valid

    def _samples(
        self,
        queries: Sequence[Query],
        chips: Sequence[Chip],
        outcomes: Iterable[tuple[int, Outcome]],
        keep: Keep,
    ) -> list[Sample | EarthEngineError]:
        """Turn outcomes into samples, in the order of the queries."""
        samples: dict[int, Sample | EarthEngineError] = {}
        for i, outcome in outcomes:
            if isinstance(outcome, EarthEngineError):
                samples[i] = outcome
            else:
                samples[i] = self._sample(queries[i], chips[i], outcome, keep)
        return [samples[i] for i in range(len(chips))]

    def _sample(
        self, query: Query, chip: Chip, pixels: Pixels, keep: Keep
    ) -> Sample | NoImageryError:
        valid = self._valid(pixels)
        if self.on_missing != 'fill' and not valid.any():
            error = self._no_imagery(chip)
            if self.on_missing == 'skip' or keep(error):
                return error
            raise error
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

    def _no_imagery(self, chip: Chip) -> NoImageryError:
        clouds = self.sensor.cloudy_pct
        text = (
            f'{chip.id}: no imagery of {self.sensor.collection} from {chip.window[0]} '
            f'to before {chip.window[1]}'
        )
        if clouds is not None:
            text += f' with at most {clouds:g} % of clouds'
        return NoImageryError(
            f'{text}. Widen the window, raise cloudy_pct, or set on_missing to '
            "'fill' or 'skip'.",
            chip=chip.id,
        )


def _keeper(on_error: OnError) -> Keep:
    """Which errors take the place of a sample."""
    check_on_error(on_error)
    return concerns_one_chip if on_error == 'skip' else lambda _: False


@lru_cache(maxsize=4096)
def _window(first: int, last: int) -> TimeWindow:
    return TimeWindow.closed(first, last)


@lru_cache(maxsize=4096)
def _nanoseconds(time: Any) -> int:
    return pd.Timestamp(time).as_unit('ns').value
