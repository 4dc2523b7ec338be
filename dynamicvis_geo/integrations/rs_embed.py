"""The model ``'dynamicvis'`` of rs-embed, and our Earth Engine client as a provider.

Importing this module is all that is needed::

    import rs_embed
    import dynamicvis_geo.integrations.rs_embed

    rs_embed.get_embedding('dynamicvis', spatial=..., backend='dynamicvis_geo')
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyproj import CRS
from rs_embed.core.embedding import Embedding
from rs_embed.core.errors import ModelError
from rs_embed.core.registry import register
from rs_embed.core.specs import BBox as TheirBBox
from rs_embed.core.specs import ModelInputSpec
from rs_embed.core.specs import OutputSpec as TheirOutput
from rs_embed.core.specs import SensorSpec as TheirSensor
from rs_embed.core.specs import TemporalSpec as TheirTemporal
from rs_embed.core.types import EmbedderCapabilities, FetchResult
from rs_embed.embedders.base import EmbedderBase
from rs_embed.embedders.catalog import MODEL_SPECS
from rs_embed.embedders.meta import temporal_to_range
from rs_embed.providers.base import ProviderBase
from rs_embed.tools.projection import common_grid
from torch import Tensor

from dynamicvis_geo.embedding import MODEL, embed_images, feature_task
from dynamicvis_geo.integrations.rs_embed_provider import (
    EarthEngineProvider,
    TheirPlace,
    register_provider,
    sensor_spec,
    told_as,
)
from dynamicvis_geo.models import BackboneConfig
from dynamicvis_geo.places import Origin, Place, given_image, images_of
from dynamicvis_geo.provenance import jsonable
from dynamicvis_geo.specs import BBox, OutputSpec, PointBuffer, SensorSpec, TemporalSpec
from dynamicvis_geo.transforms import HIGHEST

__all__ = ('DynamicVisEmbedder', 'EarthEngineProvider', 'register_provider')

#: Images that go through the backbone at once, as in ``get_embeddings_batch``.
BATCH_SIZE = 16

_SENSOR = SensorSpec()
_Given = dict[str, Any] | None
_Images = Iterator[tuple[Tensor, Origin]]


class DynamicVisEmbedder(EmbedderBase):
    """DynamicVis for rs-embed: the numbers of :func:`dynamicvis_geo.get_embedding`.

    From the provider ``'dynamicvis_geo'`` it gets the chips of this package, in the UTM
    zone of the place; from any other, rs-embed's, in EPSG:3857. An image is resized to
    the backbone's size whole, whatever its size; ``InputPrepSpec.tile(tile_size=...)``
    cuts it into tiles nevertheless.
    """

    input_spec = ModelInputSpec(
        collection=_SENSOR.collection,
        bands=_SENSOR.bands,
        scale_m=int(_SENSOR.scale_m),
        cloudy_pct=int(_SENSOR.cloudy_pct or 0),
        composite=_SENSOR.composite,
        fill_value=_SENSOR.fill_value,
        expected_channels=3,
    )
    capabilities = EmbedderCapabilities(
        input_chw=True,
        fetch_meta=True,
        batch_fetch_metas=True,
        model_config_single=True,
        model_config_batch=True,
        model_config_batch_inputs=True,
    )

    def describe(self) -> dict[str, Any]:
        """Tell inputs, outputs and settings, as rs-embed's models do."""
        config = BackboneConfig.from_env()
        size = config.img_size
        height, width = (size, size) if isinstance(size, int) else size
        spec = self.input_spec
        return {
            'type': 'on_the_fly',
            'backend': ['provider'],
            'inputs': {'collection': spec.collection, 'bands': list(spec.bands)},
            'temporal': {'mode': 'range'},
            'output': ['pooled', 'grid'],
            'defaults': {
                'scale_m': spec.scale_m,
                'cloudy_pct': spec.cloudy_pct,
                'composite': spec.composite,
                'fill_value': spec.fill_value,
                # Height and width: by a single number rs-embed would cut images into
                # tiles of that size, or pad them to it.
                'image_size': [height, width],
                'preprocess': 'reflectance_0_10000_to_uint8_then_resize_bicubic',
            },
            'model_config': {
                'variant': {
                    'type': 'string',
                    'default': config.arch,
                    'choices': ['auto', 'b', 'base', 'l', 'large'],
                },
                'stage': {'type': 'int', 'default': 3, 'choices': [0, 1, 2, 3]},
                **{
                    field.name: {
                        'type': getattr(field.type, '__name__', str(field.type)),
                        'default': jsonable(getattr(config, field.name)),
                    }
                    for field in fields(config)
                },
            },
        }

    def fetch_input(
        self,
        provider: ProviderBase,
        *,
        spatial: TheirPlace,
        temporal: TheirTemporal | None,
        sensor: TheirSensor | None,
        square_input: bool = True,
    ) -> FetchResult:
        """Fetch the image of a place.

        Args:
            provider: Where from.
            spatial: The place.
            temporal: Its dates.
            sensor: What imagery.
            square_input: No matter: boxes are embedded as they are.

        Returns:
            Raw reflectance ``[3, H, W]``, and its origin as plain values.

        Raises:
            ModelError: If it cannot be had.
        """
        images = self._fetch(provider, [spatial], temporal, sensor, 1)
        with told_as(ModelError):
            ((image, origin),) = images
        told = {**origin.meta, 'provenance': origin.source}
        return FetchResult(image.numpy(), jsonable(told))

    def get_embedding(
        self,
        *,
        spatial: TheirPlace | None,
        temporal: TheirTemporal | None,
        sensor: TheirSensor | None,
        output: TheirOutput,
        backend: str,
        device: str = 'auto',
        input_chw: NDArray[Any] | None = None,
        model_config: _Given = None,
        fetch_meta: dict[str, Any] | None = None,
    ) -> Embedding:
        """Give the features of one place or image.

        Args:
            spatial: The place.
            temporal: Its dates.
            sensor: What imagery.
            output: Pooled or grid.
            backend: Name of a provider.
            device: Where the backbone runs.
            input_chw: The image, instead of one of the provider.
            model_config: Fields of :class:`~dynamicvis_geo.BackboneConfig`, or
                ``variant``, which is its ``arch``; others are as the environment says.
                And ``stage``, as for :func:`dynamicvis_geo.get_embedding`.
            fetch_meta: What :meth:`fetch_input` told of the image.

        Returns:
            The features, with the metadata of :class:`dynamicvis_geo.Embedding`.

        Raises:
            ModelError: If an argument cannot be used, or an image not be had.
        """
        same: dict[str, Any] = {
            'spatials': [spatial],
            'temporal': temporal,
            'sensor': sensor,
            'model_config': model_config,
            'output': output,
            'backend': backend,
            'device': device,
        }
        if input_chw is None:
            return self.get_embeddings_batch(**same)[0]
        return self.get_embeddings_batch_from_inputs(
            **same, input_chws=[input_chw], fetch_metas=[fetch_meta]
        )[0]

    def get_embeddings_batch(
        self,
        *,
        spatials: Sequence[TheirPlace],
        temporal: TheirTemporal | None = None,
        sensor: TheirSensor | None = None,
        model_config: _Given = None,
        output: TheirOutput = TheirOutput.pooled(),  # noqa: B008 - frozen
        backend: str = 'auto',
        device: str = 'auto',
    ) -> list[Embedding]:
        """Give the features of places, fetched while others are embedded.

        Args:
            spatials: The places.
            temporal: As for :meth:`get_embedding`, as are the others.
            sensor: What imagery.
            model_config: Settings.
            output: Pooled or grid.
            backend: Name of a provider.
            device: Where the backbone runs.

        Raises:
            ModelError: As :meth:`get_embedding` has it.
        """
        workers = _settings(model_config)[0].fetch_workers
        provider = self._get_provider(backend)
        images = self._fetch(provider, spatials, temporal, sensor, workers)
        return _embed(images, output, model_config, device)

    def get_embeddings_batch_from_inputs(
        self,
        *,
        spatials: Sequence[TheirPlace | None],
        input_chws: Sequence[NDArray[Any]],
        temporal: TheirTemporal | None = None,
        sensor: TheirSensor | None = None,
        model_config: _Given = None,
        output: TheirOutput = TheirOutput.pooled(),  # noqa: B008 - frozen
        backend: str = 'auto',
        device: str = 'auto',
        fetch_metas: Sequence[dict[str, Any] | None] | None = None,
    ) -> list[Embedding]:
        """Give the features of images, those of one size together.

        Args:
            spatials: Their places.
            input_chws: Raw reflectance ``[3, H, W]``, 0 to 10000; values beyond are
                clipped.
            temporal: As for :meth:`get_embedding`, as are the others.
            sensor: The sensor that they were taken by.
            model_config: Settings.
            output: Pooled or grid.
            backend: No matter.
            device: Where the backbone runs.
            fetch_metas: What :meth:`fetch_input` told of each.

        Raises:
            ModelError: As :meth:`get_embedding` has it.
        """
        if len(spatials) != len(input_chws):
            raise ModelError(
                f'there are {len(input_chws)} input_chws for {len(spatials)} spatials'
            )
        metas = fetch_metas or [None] * len(input_chws)
        images = (
            (torch.as_tensor(image), _origin(meta))
            # A tile is not what was fetched.
            if meta is not None and meta['image_shape'] == list(np.shape(image))
            else _given(image, place, temporal, sensor)
            for image, place, meta in zip(input_chws, spatials, metas, strict=True)
        )
        return _embed(images, output, model_config, device)

    def _fetch(
        self,
        provider: ProviderBase,
        spatials: Sequence[TheirPlace],
        temporal: TheirTemporal | None,
        sensor: TheirSensor | None,
        workers: int,
    ) -> _Images:
        """Fetch the images of places, several at once."""
        window = temporal_to_range(temporal)
        sensor = sensor or self.input_spec.to_sensor_spec()
        if isinstance(provider, EarthEngineProvider):
            named = [(f'spatials[{i}]', _place(s)) for i, s in enumerate(spatials)]
            most = min(provider.client.max_concurrency, workers)
            for image, origin in images_of(
                named,
                _window(window),
                _sensor(sensor),
                None,
                replace(provider.client, max_concurrency=most),
                BATCH_SIZE,
                provider.cache,
            ):
                yield image, _told_of(origin, provider, sensor)
        else:

            def fetch(spatial: TheirPlace) -> tuple[Tensor, Origin]:
                result = EmbedderBase.fetch_input(
                    self, provider, spatial=spatial, temporal=window, sensor=sensor
                )
                image, origin = _given(result.data, spatial, window, sensor)
                return image, _told_of(origin, provider, sensor)

            with ThreadPoolExecutor(workers) as pool:
                yield from pool.map(fetch, spatials)


def _embed(
    images: _Images, output: TheirOutput, settings: _Given, device: str
) -> list[Embedding]:
    config, stage = _settings(settings)
    wanted = OutputSpec(output.mode, output.pooling)
    with told_as(ModelError):
        task = feature_task(wanted, config, device, stage)
        embeddings = embed_images(images, task, BATCH_SIZE)
    return [
        Embedding(
            embedding.data,
            {
                **embedding.meta,
                # What rs-embed's models tell, too.
                'type': 'on_the_fly',
                'temporal': _dates(embedding.meta),
                'y_axis_direction': 'north_to_south',
            },
        )
        for embedding in embeddings
    ]


def _told_of(origin: Origin, provider: ProviderBase, sensor: TheirSensor) -> Origin:
    told = {'backend': provider.name, 'source': sensor.collection}
    return replace(origin, meta=origin.meta | told)


def _dates(meta: dict[str, Any]) -> dict[str, Any]:
    if meta['start'] is None:
        return {'mode': None}
    return {'mode': 'range', 'start': meta['start'], 'end': meta['end']}


def _given(
    image: NDArray[Any],
    spatial: TheirPlace | None,
    temporal: TheirTemporal | None,
    sensor: TheirSensor | None,
) -> tuple[Tensor, Origin]:
    """Check an image of which no origin was told; rs-embed's grid shows by its size."""
    window = None if temporal is None else _window(temporal_to_range(temporal))
    with told_as(ModelError):
        pixels, origin = given_image(
            np.clip(image, 0, HIGHEST),
            None if spatial is None else _place(spatial),
            window,
            None if sensor is None else _sensor(sensor),
        )
    if spatial is not None and sensor is not None:
        grid = common_grid(spatial, scale_m=sensor.scale_m)
        if grid.shape == tuple(pixels.shape[1:]):
            meta = origin.meta | {'crs': grid.crs, 'bounds': grid.bounds()}
            origin = Origin(meta, CRS.from_user_input(grid.crs), grid.bounds())
    return pixels, origin


def _origin(meta: dict[str, Any]) -> Origin:
    """Read what :meth:`DynamicVisEmbedder.fetch_input` told of an image."""
    rest = dict(meta)
    source = rest.pop('provenance')
    crs, bounds = rest['crs'], rest['bounds']
    return Origin(
        rest, None if crs is None else CRS.from_user_input(crs), bounds, source
    )


def _settings(settings: _Given) -> tuple[BackboneConfig, int]:
    """Read settings of the model, and the environment for others.

    Returns:
        The backbone, and which of its maps.

    Raises:
        ModelError: If there is one that is unknown, or has a value that cannot be used.
    """
    given = dict(settings or {})
    stage = given.pop('stage', 3)
    if 'variant' in given:
        if 'arch' in given:
            raise ModelError('variant and arch are the same: leave out one of them')
        given['arch'] = given.pop('variant')
    known = [field.name for field in fields(BackboneConfig)]
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise ModelError(
            f'{", ".join(unknown)}: no settings of {MODEL!r}, which are variant, '
            f'stage, {", ".join(known)}'
        )
    with told_as(ModelError):
        return BackboneConfig.from_env(**given), stage


def _place(spatial: TheirPlace) -> Place:
    if isinstance(spatial, TheirBBox):
        return BBox(spatial.minlon, spatial.minlat, spatial.maxlon, spatial.maxlat)
    return PointBuffer(spatial.lon, spatial.lat, spatial.buffer_m)


def _window(temporal: TheirTemporal) -> TemporalSpec:
    return TemporalSpec.range(temporal.start, temporal.end)


def _sensor(sensor: TheirSensor) -> SensorSpec:
    if len(sensor.bands) != 3:
        raise ModelError(
            f'sensor.bands={sensor.bands!r} are not three: give red, green and blue, '
            "such as ('B4', 'B3', 'B2')"
        )
    return sensor_spec(
        collection=sensor.collection,
        bands=sensor.bands,
        scale_m=sensor.scale_m,
        cloudy_pct=sensor.cloudy_pct,
        composite=sensor.composite,
        fill_value=sensor.fill_value,
    )


register(MODEL)(DynamicVisEmbedder)
# What rs_embed.list_models() goes by.
MODEL_SPECS[MODEL] = (DynamicVisEmbedder.__module__, DynamicVisEmbedder.__name__)
