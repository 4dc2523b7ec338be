"""Images of single places: their chips, and the facts that an embedding tells."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import shapely
from pyproj import CRS
from torch import Tensor
from torch.utils.data import DataLoader
from torchgeo.datasets import GeoDataset

from dynamicvis_geo.datasets import ChipDataset, EarthEngineDataset
from dynamicvis_geo.datasets.batches import Batches
from dynamicvis_geo.datasets.chip_table import ChipTable
from dynamicvis_geo.datasets.footprints import project_area
from dynamicvis_geo.datasets.remote import RemoteDataset
from dynamicvis_geo.datasets.requests import local_crs
from dynamicvis_geo.datasets.source import Found, describe
from dynamicvis_geo.earthengine import ChipCache, EarthEngineClient
from dynamicvis_geo.earthengine.composite import no_imagery
from dynamicvis_geo.errors import EarthEngineError, NoImageryError, SpecError
from dynamicvis_geo.projections import crs_name
from dynamicvis_geo.samplers.place import PlaceSampler
from dynamicvis_geo.specs import BBox, PointBuffer, SensorSpec, TemporalSpec
from dynamicvis_geo.time_window import TimeWindow
from dynamicvis_geo.transforms import read_reflectance

Place = PointBuffer | BBox

#: The dates that the established adapter of this model takes where none are given.
DEFAULT_WINDOW = TemporalSpec.range('2022-06-01', '2022-09-01')
#: Places that are laid out at a time.
SLAB = 256


@dataclass(frozen=True)
class Origin:
    """Facts of an image.

    Attributes:
        meta: Those that users look at first, under the names of :class:`Embedding`.
        crs: CRS of the chip, None if unknown.
        bounds: minx, miny, maxx, maxy of the chip in that CRS.
        source: Provenance of the image, for the record.
    """

    meta: dict[str, Any]
    crs: CRS | None = None
    bounds: tuple[float, float, float, float] | None = None
    source: Any = None


class _Chips:
    """The chips of places, in their order; some may be the same.

    Args:
        places: The places, each with its name for errors.
        pairs: Dataset and sampler of each place.
    """

    def __init__(
        self,
        places: Sequence[tuple[str, Place]],
        pairs: Sequence[tuple[GeoDataset, PlaceSampler]],
    ) -> None:
        self.places, self.pairs = places, pairs
        ids = [ChipTable.of_sampler(*pair).ids(np.zeros(1, int))[0] for pair in pairs]
        different = dict(zip(reversed(ids), reversed(pairs), strict=True))
        rows = {name: row for row, name in enumerate(different)}
        self.dataset = ChipDataset(different.values())
        self.rows = np.array([rows[name] for name in ids])

    def images(self, batch_size: int) -> Iterator[tuple[Tensor, Origin]]:
        """Fetch the images, some of them ahead.

        Raises:
            SpecError: If the dataset is none of images.
            EarthEngineError: If an image cannot be had.
        """
        table = self.dataset.rows(self.rows)
        batches = Batches(self.dataset, [self.rows], batch_size)
        loader = DataLoader(batches, batch_size=None, collate_fn=list)
        try:
            samples = (sample for batch in loader for sample in batch)
            for i, sample in enumerate(samples):
                yield self._image(i, table.iloc[i], sample)
        except EarthEngineError as error:
            ids = table['chip_id']
            for (name, place), chip_id in zip(self.places, ids, strict=True):
                if (error.chip or '').startswith(chip_id):
                    error.add_note(f'This was {name}, {place}.')
            raise

    def _image(self, i: int, chip: pd.Series, sample: Found) -> tuple[Tensor, Origin]:
        dataset, sampler = self.pairs[i]
        sensor = dataset.sensor if isinstance(dataset, RemoteDataset) else None
        start, end = _window(chip)
        valid = _valid_fraction(sample, dataset, chip)
        if not isinstance(sample, dict) or valid == 0:
            name, place = self.places[i]
            where, chip_id = f'{name}: {place}', chip['chip_id']
            if sensor is None:
                raise NoImageryError(
                    f'{where}: the dataset has no valid pixel there; choose another '
                    'place or dataset',
                    chip=chip_id,
                )
            remedy = 'Widen temporal, or raise cloudy_pct in sensor.'
            raise no_imagery(where, sensor, (start, end), remedy, chip_id)
        if 'image' not in sample:
            raise SpecError(
                f"backend: samples of {type(dataset).__name__} have no 'image', only "
                f'{", ".join(sorted(sample))}: give a dataset of images'
            )
        known = type(dataset).__name__
        bounds = _bounds(chip[['minx', 'miny', 'maxx', 'maxy']])
        meta = {
            'backend': 'gee' if isinstance(dataset, EarthEngineDataset) else known,
            'source': sensor.collection if sensor else known,
            'sensor': None if sensor is None else asdict(sensor),
            **_times(start, end),
            'chip_id': chip['chip_id'],
            'crs': chip['crs'],
            'bounds': bounds,
            'image_shape': list(sample['image'].shape),
            'valid_fraction': valid,
        }
        source = {'chips': 1, 'sources': [describe(dataset, sampler)]}
        crs = CRS.from_user_input(dataset.crs)
        return sample['image'], Origin(meta, crs, bounds, source)


def images_of(
    places: Sequence[tuple[str, Place]],
    temporal: TemporalSpec | None,
    sensor: SensorSpec | None,
    dataset: GeoDataset | None,
    client: EarthEngineClient,
    batch_size: int,
    cache: ChipCache | str | os.PathLike[str] | None = None,
) -> Iterator[tuple[Tensor, Origin]]:
    """Fetch the images of places, in their order, some ahead of their use.

    Args:
        places: The places, each with its name for errors.
        temporal: Its dates.
        sensor: Imagery of Earth Engine; the default one if None.
        dataset: Source of the images; Earth Engine in the UTM zone of each place if
            None.
        client: For Earth Engine.
        batch_size: Images that are used at a time.
        cache: Folder that keeps what Earth Engine sends.

    Yields:
        Images, float32 ``[3, H, W]``, and their origins.

    Raises:
        SpecError: If one is no place, or the dataset does not show it.
        EarthEngineError: If an image cannot be had.
    """
    for name, place in places:
        if not isinstance(place, BBox | PointBuffer):
            raise SpecError(
                f'{name}={place!r} is no place: give PointBuffer(lon, lat, buffer_m) '
                'or BBox(minlon, minlat, maxlon, maxlat)'
            )
    if dataset is None and temporal is None:
        temporal = DEFAULT_WINDOW
        warnings.warn(
            f'temporal is not given: images are of {DEFAULT_WINDOW.start} to '
            f'before {DEFAULT_WINDOW.end}',
            stacklevel=4,
        )

    def pair(name: str, place: Place) -> tuple[GeoDataset, PlaceSampler]:
        try:
            images = dataset
            if images is None:
                images = EarthEngineDataset(
                    place,
                    temporal or DEFAULT_WINDOW,
                    sensor or SensorSpec(),
                    cache=cache,
                    client=client,
                    # A missing image is told of in the words of these arguments.
                    on_missing='fill',
                )
            sampler = PlaceSampler(images, place, temporal)
        except SpecError as error:
            raise SpecError(f'{name}: {error}') from error
        if len(sampler) > 1:
            starts = [f'{t.start:%Y-%m-%d}' for _, _, t in sampler]
            raise SpecError(
                f'{name}: the dataset shows {place} at {len(starts)} times, beginning '
                f'{", ".join(starts[:5])}: choose one by temporal'
            )
        return images, sampler

    # Laying out the chip of a place takes a hundredth of a second.
    slabs = (places[i : i + SLAB] for i in range(0, len(places), SLAB))
    return (
        image
        for slab in slabs
        for image in _Chips(slab, [pair(*place) for place in slab]).images(batch_size)
    )


def given_image(
    input_chw: Any,
    spatial: Place | None,
    temporal: TemporalSpec | None,
    sensor: SensorSpec | None,
) -> tuple[Tensor, Origin]:
    """Check an image of the user, of whose place, dates and sensor some are known.

    Args:
        input_chw: As :func:`~dynamicvis_geo.transforms.read_reflectance` takes it.
        spatial: The place that it fills.
        temporal: Its dates.
        sensor: The sensor that it was taken by.

    Returns:
        The image, float32 ``[3, H, W]``, and its origin.

    Raises:
        SpecError: If an argument cannot be used.
    """
    pixels = read_reflectance(input_chw)
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
    meta = {
        'backend': 'input_chw',
        'source': 'input_chw',
        'sensor': None if sensor is None else asdict(sensor),
        **_times(start, end),
        'chip_id': None,
        'crs': None if crs is None else crs_name(crs),
        'bounds': bounds,
        'image_shape': list(pixels.shape),
        'valid_fraction': None,
    }
    return pixels, Origin(meta, crs, bounds)


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


def _valid_fraction(sample: Found, dataset: GeoDataset, row: pd.Series) -> float:
    """Share of pixels with data: as the dataset says, else as its files cover."""
    if not isinstance(sample, dict):
        return 0.0
    if 'valid_fraction' in sample:
        return float(sample['valid_fraction'])
    box = shapely.box(row['minx'], row['miny'], row['maxx'], row['maxy'])
    files = dataset.index
    if not pd.isna(row['start']):
        window = pd.Interval(row['start'], row['end'], closed='both')
        files = files[files.index.overlaps(window)]
    return float(files.intersection(box).union_all().area / box.area)
