"""Where the images of single places come from."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np
import pandas as pd
import shapely
import torch
import xarray as xr
from numpy.typing import NDArray
from pyproj import CRS
from torch import Tensor
from torchgeo.datasets import GeoDataset

from dynamicvis_geo.datasets import ChipDataset, EarthEngineDataset
from dynamicvis_geo.datasets.footprints import project_area
from dynamicvis_geo.datasets.requests import local_crs
from dynamicvis_geo.datasets.source import ChipFailure
from dynamicvis_geo.earthengine import EarthEngineClient
from dynamicvis_geo.errors import EarthEngineError, NoImageryError, SpecError
from dynamicvis_geo.projections import crs_name
from dynamicvis_geo.samplers.place import PlaceSampler
from dynamicvis_geo.specs import BBox, PointBuffer, SensorSpec, TemporalSpec
from dynamicvis_geo.time_window import TimeWindow

Place = PointBuffer | BBox

#: The dates that the established adapter of this model takes where none are given.
DEFAULT_WINDOW = TemporalSpec.range('2022-06-01', '2022-09-01')

#: The highest reflectance that an image given by the user may have.
HIGHEST = 10000


@dataclass(frozen=True)
class Image:
    """A raw image, and what is known of it.

    Attributes:
        pixels: float32 ``[3, H, W]``.
        meta: What users look at first, under the names of :class:`Embedding`.
        crs: CRS of the chip, None if unknown.
        bounds: minx, miny, maxx, maxy of the chip in that CRS.
        source: What the image was cut from, for the record.
    """

    pixels: Tensor
    meta: dict[str, Any]
    crs: CRS | None = None
    bounds: tuple[float, float, float, float] | None = None
    source: Any = None

    def without_pixels(self) -> Image:
        """The same, without what takes memory."""
        return replace(self, pixels=torch.empty(0))


class Imagery:
    """Earth Engine or a dataset, asked for single places."""

    def __init__(
        self,
        backend: Literal['gee', 'auto'] | GeoDataset,
        temporal: TemporalSpec | None,
        sensor: SensorSpec | None,
        client: EarthEngineClient | None,
        workers: int,
    ) -> None:
        """Check the arguments; see :func:`~dynamicvis_geo.get_embedding`.

        Raises:
            SpecError: If one cannot be used.
        """
        for name, value, kind, example in (
            ('temporal', temporal, TemporalSpec, 'TemporalSpec.range(start, end)'),
            ('sensor', sensor, SensorSpec, 'SensorSpec(...)'),
            ('client', client, EarthEngineClient, 'EarthEngineClient(...)'),
        ):
            if value is not None and not isinstance(value, kind):
                raise SpecError(f'{name}={value!r} cannot be used: give {example}')
        self.dataset: GeoDataset | None = None
        if isinstance(backend, GeoDataset):
            for name, given in (('sensor', sensor), ('client', client)):
                if given is not None:
                    raise SpecError(
                        f'{name} is for Earth Engine, but backend is a '
                        f'{type(backend).__name__}: leave out {name}'
                    )
            self.dataset = backend
        elif backend not in ('gee', 'auto'):
            raise SpecError(
                f"backend={backend!r} is unknown: give 'gee', 'auto', or a TorchGeo "
                'GeoDataset'
            )
        self.temporal = temporal
        self.sensor = SensorSpec() if sensor is None else sensor
        if len(self.sensor.bands) != 3:
            raise SpecError(
                f'sensor.bands={self.sensor.bands!r} are not three: give red, green '
                "and blue, such as ('B4', 'B3', 'B2')"
            )
        self.workers = workers
        client = EarthEngineClient() if client is None else client
        self.client = replace(
            client, max_concurrency=min(client.max_concurrency, workers)
        )

    def fetch(
        self, places: Sequence[tuple[str, Place]], ahead: int = 0
    ) -> Iterator[Image]:
        """Fetch the images of places concurrently, in their order.

        Args:
            places: Each with its name for errors.
            ahead: How many may wait for being used.

        Raises:
            SpecError: If one is no place, or the dataset does not show it.
            EarthEngineError: If an image cannot be had.
        """
        for name, place in places:
            if not isinstance(place, BBox | PointBuffer):
                raise SpecError(
                    f'{name}={place!r} is no place: give PointBuffer(lon, lat, '
                    'buffer_m) or BBox(minlon, minlat, maxlon, maxlat)'
                )
        if places and self.dataset is None and self.temporal is None:
            self.temporal = DEFAULT_WINDOW
            warnings.warn(
                f'temporal is not given: images are of {DEFAULT_WINDOW.start} to '
                f'before {DEFAULT_WINDOW.end}',
                stacklevel=3,
            )
        return self._fetched(places, ahead)

    def _fetched(
        self, places: Sequence[tuple[str, Place]], ahead: int
    ) -> Iterator[Image]:
        # Files of other datasets may not be read by several threads at once.
        remote = self.dataset is None or isinstance(self.dataset, EarthEngineDataset)
        workers = min(self.workers if remote else 1, max(len(places), 1))
        pool = ThreadPoolExecutor(workers, 'place')
        remaining = iter(places)
        running: deque[Future[Image]] = deque()
        try:
            while True:
                room = workers + ahead - len(running)
                for place in islice(remaining, room):
                    running.append(pool.submit(self._image, *place))
                if not running:
                    return
                yield running.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _image(self, name: str, place: Place) -> Image:
        try:
            chip = self._chip(place)
            found = chip[0]
        except SpecError as error:
            raise SpecError(f'{name}: {error}') from error
        except EarthEngineError as error:
            error.add_note(f'This was {name}, {place}.')
            raise
        dataset, row = chip.datasets[0], chip.chips.iloc[0]
        bounds = _bounds(row[['minx', 'miny', 'maxx', 'maxy']])
        start, end = _window(row)
        sample = None if isinstance(found, ChipFailure) else found
        valid = _valid_fraction(sample, dataset, row)
        if sample is None or valid == 0:
            raise self._no_imagery(f'{name}: {place}', row['chip_id'], start, end)
        if 'image' not in sample:
            raise SpecError(
                f"backend: samples of {type(dataset).__name__} have no 'image', only "
                f'{", ".join(sorted(sample))}: give a dataset of images'
            )
        sensor = getattr(dataset, 'sensor', None)
        sensor = sensor if isinstance(sensor, SensorSpec) else None
        known = type(dataset).__name__
        return Image(
            sample['image'],
            {
                'backend': 'gee' if sensor else known,
                'source': sensor.collection if sensor else known,
                'sensor': None if sensor is None else asdict(sensor),
                **_times(start, end),
                'chip_id': row['chip_id'],
                'crs': row['crs'],
                'bounds': bounds,
                'image_shape': list(sample['image'].shape),
                'valid_fraction': valid,
            },
            CRS.from_user_input(dataset.crs),
            bounds,
            chip.provenance,
        )

    def _chip(self, place: Place) -> ChipDataset:
        """The one chip of a place."""
        dataset = self.dataset
        if dataset is None:
            dataset = EarthEngineDataset(
                place,
                self.temporal or DEFAULT_WINDOW,
                self.sensor,
                client=self.client,
                # What is missing is told of here, in the words of these arguments.
                on_missing='fill',
            )
        sampler = PlaceSampler(dataset, place, self.temporal)
        if len(sampler) > 1:
            starts = [f'{t.start:%Y-%m-%d}' for _, _, t in sampler]
            raise SpecError(
                f'the dataset shows {place} at {len(starts)} times, beginning '
                f'{", ".join(starts[:5])}: choose one by temporal'
            )
        return ChipDataset([(dataset, sampler)])

    def _no_imagery(
        self, place: str, chip_id: str, start: str | None, end: str | None
    ) -> NoImageryError:
        if self.dataset is not None:
            return NoImageryError(
                f'{place}: the dataset has no valid pixel there; choose another place '
                'or dataset',
                chip=chip_id,
            )
        clouds = self.sensor.cloudy_pct
        few = '' if clouds is None else f' with at most {clouds:g} % of clouds'
        return NoImageryError(
            f'{place}: no imagery of {self.sensor.collection} from {start} to before '
            f'{end}{few}. Widen temporal, or raise cloudy_pct in sensor.',
            chip=chip_id,
        )


def given_image(
    input_chw: Any,
    spatial: Place | None,
    temporal: TemporalSpec | None,
    sensor: SensorSpec | None,
) -> Image:
    """Check an image given by the user.

    Args:
        input_chw: Raw reflectance ``[3, H, W]``, 0 to 10000: a NumPy array, a tensor,
            or what NumPy takes for one.
        spatial: The place that it fills, if known.
        temporal: Its dates, if known.
        sensor: What it was taken by, if known.

    Raises:
        SpecError: If it is anything else.
    """
    pixels = _reflectance(input_chw)
    crs, bounds = None, None
    if spatial is not None:
        if not isinstance(spatial, BBox | PointBuffer):
            raise SpecError(
                f'spatial={spatial!r} is no place: give PointBuffer or BBox'
            )
        crs = local_crs(spatial.geometry)
        bounds = _bounds(project_area(spatial.geometry, crs).total_bounds)
    start = end = None
    if temporal is not None:
        start, end = temporal.start, temporal.end
    return Image(
        pixels,
        {
            'backend': 'input_chw',
            'source': 'input_chw',
            'sensor': None if sensor is None else asdict(sensor),
            **_times(start, end),
            'chip_id': None,
            'crs': None if crs is None else crs_name(crs),
            'bounds': bounds,
            'image_shape': list(pixels.shape),
            'valid_fraction': None,
        },
        crs,
        bounds,
    )


def _reflectance(given: Any) -> Tensor:
    """Bring an image into float32, refusing what is no raw reflectance."""
    what = 'input_chw has to be raw reflectance [3, H, W], bands B4, B3, B2, 0..10000'
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        # NumPy has no bfloat16; either is refused below.
        given = (given.half() if given.dtype == torch.bfloat16 else given).numpy()
    if np.ma.is_masked(given):
        raise SpecError(f'{what}; some of it is masked: give input_chw.filled(0)')
    try:
        values = np.asarray(given)
    except (TypeError, ValueError) as error:
        raise SpecError(f'{what}; it is no array ({error})') from error
    if values.dtype.kind not in 'iuf':
        raise SpecError(
            f'{what}; its dtype is {values.dtype}: convert it, as in '
            "input_chw.astype('float32')"
        )
    if values.dtype.itemsize == 2 and values.dtype.kind == 'f':
        raise SpecError(
            f'{what}; a float of 16 bits rounds reflectance by up to 0.4 %: give '
            'float32 from the start'
        )
    if values.ndim != 3 or values.shape[0] != 3 or 0 in values.shape:
        last = values.ndim == 3 and values.shape[-1] == 3
        remedy = ': move the bands to the front, as in np.moveaxis(image, -1, 0)'
        raise SpecError(
            f'{what}; its shape is {values.shape}{remedy if last else ": reshape it"}'
        )
    if not np.isfinite(values).all():
        raise SpecError(
            f'{what}; it holds NaN or infinity: fill what is missing, as in '
            'np.nan_to_num(input_chw, posinf=0, neginf=0)'
        )
    low, high = values.min(), values.max()
    if low < 0 or high > HIGHEST:
        raise SpecError(
            f'{what}; its values reach from {low:g} to {high:g}: give '
            f'input_chw.clip(0, {HIGHEST}) if they are reflectance times 10000'
        )
    if values.dtype.kind == 'f' and 0 < high <= 1:
        raise SpecError(
            f'{what}; its highest value is {high:g}, as of reflectance 0..1: give '
            'input_chw * 10000'
        )
    return torch.from_numpy(np.array(values, dtype=np.float32))


def georeferenced(
    values: NDArray[np.float32],
    crs: CRS | None,
    bounds: tuple[float, float, float, float] | None,
    attributes: dict[str, str],
) -> xr.DataArray:
    """Give a feature map coordinates: the centres of its cells.

    Args:
        values: ``[D, h, w]``, the first row northernmost.
        crs: CRS of the chip; None leaves the map without a place.
        bounds: minx, miny, maxx, maxy of the chip in that CRS.
        attributes: What the map says of itself.
    """
    coords: dict[str, Any] = {'d': np.arange(len(values))}
    if crs is not None and bounds is not None:
        minx, miny, maxx, maxy = bounds
        _, height, width = values.shape
        xres, yres = (maxx - minx) / width, (maxy - miny) / height
        axes = {axis.pop('axis'): axis for axis in crs.cs_to_cf()}
        coords |= {
            'y': ('y', maxy - (np.arange(height) + 0.5) * yres, axes.get('Y')),
            'x': ('x', minx + (np.arange(width) + 0.5) * xres, axes.get('X')),
            # As rioxarray writes and reads it; the transform is needed where a map is
            # one cell wide, whose size no coordinate tells.
            'spatial_ref': (
                (),
                0,
                {
                    **crs.to_cf(),
                    'spatial_ref': crs.to_wkt(),
                    'GeoTransform': f'{minx!r} {xres!r} 0.0 {maxy!r} 0.0 {-yres!r}',
                },
            ),
        }
    return xr.DataArray(values.copy(), coords, ('d', 'y', 'x'), 'embedding', attributes)


def _bounds(sides: Any) -> tuple[float, float, float, float]:
    minx, miny, maxx, maxy = map(float, sides)
    return minx, miny, maxx, maxy


def _window(row: pd.Series) -> tuple[str | None, str | None]:
    """First moment, and first moment after, of a chip's window; None if unknown."""
    start, end = row['start'], row['end']
    if pd.isna(start) or pd.isna(end):
        return None, None
    return TimeWindow.closed(start, end).milliseconds


def _times(start: str | None, end: str | None) -> dict[str, str | None]:
    middle = None
    if start is not None and end is not None:
        first, after = pd.Timestamp(start), pd.Timestamp(end)
        middle = str((first + (after - first) / 2).date())
    return {'start': start, 'end': end, 'input_time': middle}


def _valid_fraction(
    sample: dict[str, Any] | None, dataset: GeoDataset, row: pd.Series
) -> float:
    """Share of pixels with data: as the dataset says, else what its files cover."""
    if sample is None:
        return 0.0
    if 'valid_fraction' in sample:
        return float(sample['valid_fraction'])
    box = shapely.box(row['minx'], row['miny'], row['maxx'], row['maxy'])
    files = dataset.index
    if not pd.isna(row['start']):
        window = pd.Interval(row['start'], row['end'], closed='both')
        files = files[files.index.overlaps(window)]
    return float(files.intersection(box).union_all().area / box.area)
