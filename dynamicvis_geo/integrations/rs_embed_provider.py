"""Our Earth Engine client as a provider of rs-embed, for any of its models."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import ee
import geopandas as gpd
import numpy as np
import shapely
from numpy.typing import NDArray
from rs_embed import providers
from rs_embed.core.errors import ProviderError, RSEmbedError
from rs_embed.core.specs import BBox, PointBuffer
from rs_embed.core.specs import SensorSpec as TheirSensor
from rs_embed.core.specs import TemporalSpec as TheirTemporal
from rs_embed.providers.base import ProviderBase
from rs_embed.providers.gee_utils import resolve_band_aliases
from rs_embed.tools.projection import COMMON_CRS, common_grid
from rs_embed.tools.temporal import split_temporal_range, temporal_to_start_end

from dynamicvis_geo.datasets import EarthEngineDataset
from dynamicvis_geo.earthengine import ChipCache, EarthEngineClient
from dynamicvis_geo.earthengine.composite import no_imagery
from dynamicvis_geo.errors import DynamicVisGeoError, SpecError
from dynamicvis_geo.grid import Grid
from dynamicvis_geo.specs import SensorSpec, TemporalSpec

PROVIDER = 'dynamicvis_geo'

TheirPlace: TypeAlias = BBox | PointBuffer
Image = NDArray[np.float32]

#: Reflectance of Sentinel-2, to which rs-embed clips series of images.
_REFLECTANCE = (0, 10000)


class Composite(NamedTuple):
    """A composite, which is not computed before its pixels are fetched.

    Attributes:
        sensor: Collection, bands and composite.
        window: First day, and first day after.
    """

    sensor: TheirSensor
    window: tuple[str, str]


class EarthEngineProvider(ProviderBase):
    """Earth Engine, with the retries, limits and cache of this package.

    Pixels are those of rs-embed's grid: EPSG:3857, whole multiples of ``scale_m`` from
    its origin. They come as binary answers instead of JSON, so that a place may be of
    any size, and neither it nor an image of a series is a single point of failure: each
    request is tried again by itself.

    Attributes:
        client: How to reach Earth Engine.
        cache: What keeps pixels that were fetched, if anything.
    """

    name = PROVIDER
    client: EarthEngineClient = EarthEngineClient()
    cache: ChipCache | None = None

    def ensure_ready(self) -> None:
        """Have Earth Engine initialised, as the client says.

        Raises:
            ProviderError: If it cannot be.
        """
        with told_as(ProviderError):
            self.client.request(
                bytes, bytes, chip='Earth Engine', cancelled=threading.Event()
            )

    def get_region(self, spatial: TheirPlace) -> TheirPlace:
        """Return the place itself: its pixels are known once their size is.

        Args:
            spatial: The place.
        """
        return spatial

    def build_image(
        self,
        *,
        sensor: TheirSensor,
        temporal: TheirTemporal | None,
        region: TheirPlace | None = None,
    ) -> Composite:
        """Say what is to be composed.

        Args:
            sensor: Collection and composite.
            temporal: Its dates.
            region: Not needed.

        Raises:
            ProviderError: If there are no dates.
        """
        if temporal is None:
            raise ProviderError(
                'temporal is missing: give TemporalSpec.range(start, end)'
            )
        return Composite(sensor, temporal_to_start_end(temporal))

    def fetch_array_chw(
        self,
        *,
        image: Composite,
        bands: tuple[str, ...],
        region: TheirPlace,
        scale_m: int,
        fill_value: float,
        collection: str | None = None,
    ) -> Image:
        """Fetch pixels, north up.

        Args:
            image: As :meth:`build_image` gives it.
            bands: Names of bands, or aliases such as ``'RED'``.
            region: The place.
            scale_m: Size of a pixel in metres of EPSG:3857.
            fill_value: What masked pixels are set to.
            collection: Its collection, if another than that of *image*.

        Returns:
            ``[bands, height, width]``.

        Raises:
            ProviderError: If there is no valid pixel, or Earth Engine does not give it.
        """
        sensor = image.sensor
        with told_as(ProviderError):
            wanted = sensor_spec(
                collection=collection or sensor.collection,
                bands=bands,
                scale_m=scale_m,
                cloudy_pct=sensor.cloudy_pct,
                composite=sensor.composite,
                fill_value=fill_value,
                dtype='float32',
            )
            return self._fetch_one(region, wanted, image.window)

    def fetch_sensor_patch_chw(
        self,
        *,
        spatial: TheirPlace,
        temporal: TheirTemporal | None,
        sensor: TheirSensor,
        to_float_image: bool = False,
    ) -> Image:
        """Fetch the image of a place.

        Args:
            spatial: The place.
            temporal: Its dates.
            sensor: What imagery.
            to_float_image: Not needed: pixels are floats.

        Returns:
            ``[bands, height, width]``.

        Raises:
            ProviderError: As :meth:`fetch_array_chw` has it.
        """
        return self.fetch_array_chw(
            image=self.build_image(sensor=sensor, temporal=temporal),
            bands=sensor.bands,
            region=spatial,
            scale_m=sensor.scale_m,
            fill_value=sensor.fill_value,
        )

    def fetch_multiframe_collection_raw_tchw(
        self,
        *,
        spatial: TheirPlace,
        temporal: TheirTemporal,
        collection: str,
        bands: Sequence[str],
        n_frames: int = 8,
        scale_m: int = 10,
        cloudy_pct: int | None = 30,
        composite: str = 'median',
        fill_value: float = 0.0,
    ) -> Image:
        """Fetch a series of images, those of equal parts of a time window, together.

        A part without imagery gets the image of the whole window, as in rs-embed.

        Args:
            spatial: The place.
            temporal: The time window.
            collection: The collection.
            bands: Names of its bands, or aliases.
            n_frames: Number of images.
            scale_m: Size of a pixel in metres of EPSG:3857.
            cloudy_pct: Most clouds of a scene, in percent.
            composite: ``'median'`` or ``'mosaic'``.
            fill_value: What masked pixels are set to.

        Returns:
            ``[images, bands, height, width]``.

        Raises:
            ProviderError: If none has a valid pixel, or Earth Engine does not give it.
        """
        windows = list(split_temporal_range(temporal, n_frames))
        with told_as(ProviderError):
            sensor = sensor_spec(
                collection=collection,
                bands=tuple(bands),
                scale_m=scale_m,
                cloudy_pct=cloudy_pct,
                composite=composite,
                fill_value=fill_value,
                dtype='float32',
            )
            found = self._fetch(spatial, sensor, windows)
            frames = [frame for frame in found if frame is not None]
            if len(frames) < len(found):
                window = temporal_to_start_end(temporal)
                whole = self._fetch_one(spatial, sensor, window)
                frames = [whole if frame is None else frame for frame in found]
        # A window of fewer days than images.
        frames += frames[-1:] * (n_frames - len(frames))
        series = np.stack(frames)
        return series.clip(*_REFLECTANCE) if _is_sentinel2(collection) else series

    def fetch_collection_patch_all_bands_chw(
        self,
        *,
        spatial: TheirPlace,
        temporal: TheirTemporal | None,
        collection: str,
        scale_m: int = 10,
        fill_value: float = 0.0,
        composite: str = 'median',
    ) -> tuple[Image, tuple[str, ...]]:
        """Fetch all bands of a collection, whatever its clouds.

        Args:
            spatial: The place.
            temporal: Its dates.
            collection: The collection.
            scale_m: Size of a pixel in metres of EPSG:3857.
            fill_value: What masked pixels are set to.
            composite: ``'median'`` or ``'mosaic'``.

        Returns:
            ``[bands, height, width]``, and the names of the bands.

        Raises:
            ProviderError: As :meth:`fetch_array_chw` has it.
        """
        with told_as(ProviderError):
            bands = self.client.request(
                lambda: ee.ImageCollection(collection).first().bandNames().getInfo(),
                tuple,
                chip=f'the bands of {collection}',
                cancelled=threading.Event(),
            )
        sensor = TheirSensor(
            collection,
            bands,
            scale_m=scale_m,
            cloudy_pct=None,
            composite=composite,
            fill_value=fill_value,
        )
        image = self.fetch_sensor_patch_chw(
            spatial=spatial, temporal=temporal, sensor=sensor
        )
        return image, bands

    def normalize_bands(
        self, *, collection: str, bands: tuple[str, ...]
    ) -> tuple[str, ...]:
        """Give bands the names of their collection, as rs-embed does.

        Args:
            collection: The collection.
            bands: Names of its bands, or aliases.
        """
        named: tuple[str, ...] = resolve_band_aliases(collection, bands)
        return named

    def _fetch_one(
        self, spatial: TheirPlace, sensor: SensorSpec, window: tuple[str, str]
    ) -> Image:
        (image,) = self._fetch(spatial, sensor, [window])
        if image is None:
            place, remedy = str(spatial), 'Widen temporal, or raise cloudy_pct.'
            raise no_imagery(place, sensor, window, remedy, place)
        return image

    def _fetch(
        self,
        spatial: TheirPlace,
        sensor: SensorSpec,
        windows: Sequence[tuple[str, str]],
    ) -> list[Image | None]:
        """Fetch the image of each of some windows, which do not overlap.

        Returns:
            The images, None for one without a valid pixel.
        """
        place = common_grid(spatial, scale_m=sensor.scale_m)
        west, south, east, north = place.bounds()
        side = float(sensor.scale_m)
        grid = Grid(COMMON_CRS, west, north, place.width, place.height, side, side)
        times = [TemporalSpec.range(*window) for window in windows]
        dataset = EarthEngineDataset(
            gpd.GeoSeries([shapely.box(west, south, east, north)], crs=COMMON_CRS),
            times,
            sensor,
            crs=COMMON_CRS,
            cache=self.cache,
            client=self.client,
            on_missing='fill',
        )
        spans = [time.interval for time in times]
        queries = [(*grid.slices, slice(span.left, span.right, 1)) for span in spans]
        # rs-embed knows no values but finite ones.
        return [
            np.nan_to_num(sample['image'].numpy(), posinf=0, neginf=0)
            if sample is not None and sample['valid_fraction'] > 0
            else None
            for sample in dataset.__getitems__(queries)
        ]


def register_provider(
    client: EarthEngineClient | None = None,
    cache: ChipCache | str | os.PathLike[str] | None = None,
) -> None:
    """Make :class:`EarthEngineProvider` known to rs-embed, or set it up anew.

    Its name is ``'dynamicvis_geo'``; rs-embed's own provider ``'gee'`` stays.

    Args:
        client: How to reach Earth Engine.
        cache: Folder that keeps what was fetched.
    """
    if cache is not None and not isinstance(cache, ChipCache):
        cache = ChipCache(cache)
    # Of the class: rs-embed makes providers by itself, and keeps them.
    EarthEngineProvider.client = EarthEngineClient() if client is None else client
    EarthEngineProvider.cache = cache
    providers.register_provider(PROVIDER, EarthEngineProvider)


@contextmanager
def told_as(kind: type[RSEmbedError]) -> Iterator[None]:
    """Raise errors of this package as one that users of rs-embed expect.

    Args:
        kind: The class of rs-embed's errors.
    """
    try:
        yield
    except DynamicVisGeoError as error:
        raise kind(str(error)) from error


def sensor_spec(
    *, collection: str, bands: tuple[str, ...], cloudy_pct: int | None, **rest: Any
) -> SensorSpec:
    """Say in our words what imagery a sensor of rs-embed means.

    Args:
        collection: The collection.
        bands: Names of its bands, or aliases.
        cloudy_pct: Most clouds of a scene in percent; no matter where the scenes of the
            collection do not tell theirs.
        **rest: Other fields of :class:`~dynamicvis_geo.SensorSpec`.

    Raises:
        SpecError: If a value cannot be used, or scenes tell their clouds in another
            way than those of Sentinel-2.
    """
    if cloudy_pct is not None and collection.upper().startswith('LANDSAT/'):
        raise SpecError(
            f'cloudy_pct={cloudy_pct!r}: scenes of {collection} are not chosen by '
            "their clouds here; give cloudy_pct=None, or take backend='gee'"
        )
    return SensorSpec(
        collection,
        resolve_band_aliases(collection, bands),
        cloudy_pct=cloudy_pct if _is_sentinel2(collection) else None,
        **rest,
    )


def _is_sentinel2(collection: str) -> bool:
    return 'COPERNICUS/S2' in collection.upper()


register_provider()
