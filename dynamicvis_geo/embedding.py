"""One line for one place: a ChipDataset, a DataLoader and FeatureExtraction."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn
from torchgeo.datasets import GeoDataset

from dynamicvis_geo.earthengine import EarthEngineClient
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models import BackboneConfig, load_backbone
from dynamicvis_geo.places import Origin, Place, given_image, images_of
from dynamicvis_geo.provenance import jsonable, software_versions
from dynamicvis_geo.specs import BBox, OutputSpec, PointBuffer, SensorSpec, TemporalSpec
from dynamicvis_geo.tasks import FeatureExtraction
from dynamicvis_geo.tasks.features import stages_to_load

MODEL = 'dynamicvis'

_OF_BACKBONE = (
    'revision',
    'sha256',
    'arch',
    'path_type',
    'sampling_scale',
    'mamba2',
    'implementation',
)

Backend = Literal['gee', 'auto'] | GeoDataset

#: The backbones of this process: configuration, device, module.
_loaded: list[tuple[BackboneConfig, torch.device, nn.Module]] = []
_loading = threading.Lock()


@dataclass(frozen=True)
class Embedding:
    """The features of one place, and what they were made of.

    Attributes:
        data: Pooled: a float32 array ``(D,)``. Grid: an :class:`xarray.DataArray`
            with dims ``('d', 'y', 'x')``, float32, north up, whose ``x`` and ``y`` are
            the centres of the cells in the CRS of the chip; its coordinate
            ``spatial_ref`` is what rioxarray reads CRS and transform from.
        meta: Plain values for JSON:

            - ``model``: ``'dynamicvis'``.
            - ``backend``: ``'gee'``, ``'input_chw'``, or the class of the dataset.
            - ``source``: Id of the Earth Engine collection, else as ``backend``.
            - ``sensor``: Fields of the :class:`SensorSpec`; None if there is none.
            - ``start``, ``end``: Time window in UTC, the end exclusive; None where
              it is unknown.
            - ``input_time``: The day in the middle of it. The image is a composite of
              the window, not of that day.
            - ``chip_id``: Id of the chip, as in the files of a run.
            - ``crs``, ``bounds``: Where the chip lies: minx, miny, maxx, maxy.
            - ``image_shape``: Bands, rows and columns of the raw image.
            - ``valid_fraction``: Share of its pixels that hold data, 0 to 1; None for
              ``input_chw``. Other pixels are set to the sensor's ``fill_value``.
            - ``image_size``: Pixels of a side to which it was resized, or [height,
              width]; None if it was not.
            - ``weights``: ``'pretrained'``, or ``'random'``: such features mean
              nothing. None for a module of your own, as are the next eight.
            - ``hf_repo``, ``ckpt_file``, ``revision``, ``sha256``: The checkpoint: its
              repository, file, commit, and digest. None if there is none.
            - ``arch``, ``path_type``, ``sampling_scale``, ``mamba2``: As in
              :class:`BackboneConfig`, ``arch`` being ``'b'`` or ``'l'``.
            - ``implementation``: ``'native'``, ``'upstream'``, or the class of the
              module.
            - ``device``: Where the backbone ran.
            - ``feature_kind``: ``'featmap'``, or ``'vector_as_1x1'`` if the backbone
              gave a vector.
            - ``stage``: Which map of the backbone it is made of, 0 to 3.
            - ``feature_shape``: [D, h, w] of that map.
            - ``grid_hw``: [h, w] of it.
            - ``grid_kind``: ``'last_stage_featmap'`` for a grid, of another stage such
              as ``'stage_1_featmap'``, else None.
            - ``pooling``: ``'featmap_mean'``, ``'featmap_max'``, or None for a grid.
            - ``provenance``: All that is known of model, preprocessing, imagery and
              software, as in the files of a run.
    """

    data: NDArray[np.float32] | xr.DataArray
    meta: dict[str, Any]

    def __repr__(self) -> str:
        """Say in two lines what it is, of what, and by which model."""
        told = self.meta.get
        shape = ' x '.join(map(str, self.data.shape))
        text = f'<Embedding: {shape} {self.data.dtype}'
        if told('chip_id') is not None:
            text += f' of {told("chip_id")}'
        if told('start') is not None:
            text += f', {told("start"):.10} to {told("end"):.10}'
        made = [told('source'), told('pooling') or told('grid_kind')]
        if told('weights') is not None:
            made += [f'arch {told("arch")}', f'{told("weights")} weights']
        if told('valid_fraction') is not None:
            made.append(f'{told("valid_fraction"):.0%} valid')
        return f'{text}\n {", ".join(map(str, made))}>'


def get_embedding(
    model: str = MODEL,
    *,
    spatial: Place | None = None,
    temporal: TemporalSpec | None = None,
    sensor: SensorSpec | None = None,
    output: OutputSpec = OutputSpec.pooled(),  # noqa: B008 - frozen
    backend: Backend = 'gee',
    client: EarthEngineClient | None = None,
    backbone: BackboneConfig | nn.Module | None = None,
    device: str | torch.device = 'auto',
    input_chw: Any = None,
    stage: int = 3,
) -> Embedding:
    """Give the features of one place.

    The numbers are those of a Trainer's run with :class:`FeatureExtraction` over the
    same chip. For thousands of places, such a run is the better way: it resumes, caches
    and writes files.

    Args:
        model: ``'dynamicvis'``, the only one there is.
        spatial: The place. A :class:`PointBuffer` is a square of ``2 * buffer_m``
            metres on the ground around the point, rounded to whole pixels; a
            :class:`BBox` the extent of the box, widened to whole pixels. From Earth
            Engine the chip lies in the place's UTM zone, from a dataset on the
            dataset's own pixels. Either is resized to the backbone's ``img_size``; more
            than 4096 pixels a side are refused.
        temporal: The dates. Earth Engine composes what lies within; by default
            2022-06-01 to before 2022-09-01, with a warning. Of a dataset the one time
            window that overlaps them is taken; it may be left out if there is but one.
        sensor: What imagery Earth Engine gives, :class:`SensorSpec` by default; three
            bands, in the order red, green, blue.
        output: :meth:`OutputSpec.pooled` or :meth:`OutputSpec.grid`.
        backend: ``'gee'`` is Earth Engine, and so is ``'auto'``; any TorchGeo
            ``GeoDataset`` with images of three bands, 0 to 10000, is read itself.
        client: How to reach Earth Engine.
        backbone: Which backbone; :meth:`BackboneConfig.from_env` by default. It is
            loaded once a process and device, and kept. A module of your own is taken as
            :class:`FeatureExtraction` takes it.
        device: Where it runs: ``'cpu'``, ``'cuda'``, ``'cuda:1'``, ``'mps'``;
            ``'auto'`` takes CUDA or MPS where PyTorch finds it.
        input_chw: The image itself, instead of Earth Engine: raw reflectance
            ``[3, H, W]``, bands B4, B3, B2, 0 to 10000. A *spatial* beside it says
            which place the image fills; without one a grid has no georeference.
        stage: Which map of the backbone, 0 to 3; the first stages have finer cells. As
            for :class:`FeatureExtraction`.

    Returns:
        The features and what they were made of.

    Raises:
        SpecError: If an argument cannot be used, or a dataset does not show the place.
        NoImageryError: If there is no valid pixel of the place and time.
        EarthEngineError: If Earth Engine does not give the imagery.
        CheckpointError: If the weights cannot be loaded.
    """
    if input_chw is None:
        if spatial is None:
            raise SpecError(
                'spatial is missing: give PointBuffer(lon, lat, buffer_m) or BBox(...)'
            )
        _check(model, temporal, sensor, output, backend, client, backbone)
        place = [('spatial', spatial)]
        images = _images(place, temporal, sensor, backend, client, backbone, 1)
        return embed_images(
            images, feature_task(output, backbone, device, stage), batch_size=1
        )[0]
    if isinstance(backend, GeoDataset):
        raise SpecError(
            f'backend is a {type(backend).__name__}, but input_chw gives the image '
            'already: leave out one of them'
        )
    _check(model, temporal, sensor, output, backend, client, backbone)
    image = given_image(input_chw, spatial, temporal, sensor)
    return embed_images(
        [image], feature_task(output, backbone, device, stage), batch_size=1
    )[0]


def get_embeddings_batch(
    model: str = MODEL,
    *,
    spatials: Iterable[Place],
    temporal: TemporalSpec | None = None,
    sensor: SensorSpec | None = None,
    output: OutputSpec = OutputSpec.pooled(),  # noqa: B008 - frozen
    backend: Backend = 'gee',
    client: EarthEngineClient | None = None,
    backbone: BackboneConfig | nn.Module | None = None,
    device: str | torch.device = 'auto',
    batch_size: int = 16,
    stage: int = 3,
) -> list[Embedding]:
    """Give the features of many places, in their order.

    While the backbone is at work, the next images are fetched, up to
    ``fetch_workers`` of the backbone's configuration at once (environment variable
    ``RS_EMBED_DYNAMICVIS_FETCH_WORKERS``, 8 by default). Images of any size and UTM
    zone go through it together once they are resized.

    Args:
        model: As for :func:`get_embedding`.
        spatials: The places.
        temporal: As for :func:`get_embedding`, the same for all places.
        sensor: As for :func:`get_embedding`.
        output: As for :func:`get_embedding`.
        backend: As for :func:`get_embedding`.
        client: As for :func:`get_embedding`; its ``max_concurrency`` holds as well.
        backbone: As for :func:`get_embedding`.
        device: As for :func:`get_embedding`.
        batch_size: Images that go through the backbone at once.
        stage: As for :func:`get_embedding`.

    Returns:
        The features of each place; none for no places.

    Raises:
        SpecError: As for :func:`get_embedding`; it names the place.
        NoImageryError: As for :func:`get_embedding`; it names the place.
        EarthEngineError: As for :func:`get_embedding`.
        CheckpointError: As for :func:`get_embedding`.
    """
    if isinstance(spatials, str | BBox | PointBuffer) or not isinstance(
        spatials, Iterable
    ):
        raise SpecError(
            f'spatials={spatials!r} is not a list of places: give [PointBuffer(...), '
            'BBox(...), ...]'
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise SpecError(f'batch_size={batch_size!r} is not a whole number')
    if batch_size < 1:
        raise SpecError(f'batch_size={batch_size!r} is not positive')
    _check(model, temporal, sensor, output, backend, client, backbone)
    named = [(f'spatials[{i}]', place) for i, place in enumerate(spatials)]
    if not named:
        return []
    images = _images(named, temporal, sensor, backend, client, backbone, batch_size)
    return embed_images(
        images, feature_task(output, backbone, device, stage), batch_size
    )


def _check(
    model: str,
    temporal: TemporalSpec | None,
    sensor: SensorSpec | None,
    output: OutputSpec,
    backend: Backend,
    client: EarthEngineClient | None,
    backbone: BackboneConfig | nn.Module | None,
) -> None:
    """Refuse arguments that cannot be used.

    Raises:
        SpecError: If there is one.
    """
    if not isinstance(model, str) or model.strip().lower() != MODEL:
        raise SpecError(
            f'model={model!r} is not to be had here: this package has {MODEL!r} only, '
            'and its argument may be left out'
        )
    none = type(None)
    for name, value, kinds, example in (
        ('output', output, OutputSpec, 'OutputSpec.pooled() or OutputSpec.grid()'),
        (
            'backbone',
            backbone,
            (BackboneConfig, nn.Module, none),
            "BackboneConfig(...), such as BackboneConfig(weights='random')",
        ),
        ('temporal', temporal, (TemporalSpec, none), 'TemporalSpec.range(start, end)'),
        ('sensor', sensor, (SensorSpec, none), 'SensorSpec(...)'),
        ('client', client, (EarthEngineClient, none), 'EarthEngineClient(...)'),
    ):
        if not isinstance(value, kinds):
            raise SpecError(f'{name}={value!r} cannot be used: give {example}')
    if isinstance(backend, GeoDataset):
        for name, given in (('sensor', sensor), ('client', client)):
            if given is not None:
                raise SpecError(
                    f'{name} is for Earth Engine, but backend is a '
                    f'{type(backend).__name__}: leave out {name}'
                )
    elif backend not in ('gee', 'auto'):
        raise SpecError(
            f"backend={backend!r} is unknown: give 'gee', 'auto', or a TorchGeo "
            'GeoDataset'
        )
    if sensor is not None and len(sensor.bands) != 3:
        raise SpecError(
            f'sensor.bands={sensor.bands!r} are not three: give red, green and blue, '
            "such as ('B4', 'B3', 'B2')"
        )


def _images(
    named: Sequence[tuple[str, Place]],
    temporal: TemporalSpec | None,
    sensor: SensorSpec | None,
    backend: Backend,
    client: EarthEngineClient | None,
    backbone: BackboneConfig | nn.Module | None,
    batch_size: int,
) -> Iterator[tuple[Tensor, Origin]]:
    config = backbone if isinstance(backbone, BackboneConfig) else _default_config()
    client = EarthEngineClient() if client is None else client
    most = min(client.max_concurrency, config.fetch_workers)
    client = replace(client, max_concurrency=most)
    dataset = backend if isinstance(backend, GeoDataset) else None
    return images_of(named, temporal, sensor, dataset, client, batch_size)


def _default_config() -> BackboneConfig:
    return BackboneConfig.from_env()


def feature_task(
    output: OutputSpec,
    backbone: BackboneConfig | nn.Module | None,
    device: str | torch.device,
    stage: int,
) -> FeatureExtraction:
    """Make the task that gives features on a device.

    Args:
        output: As for :func:`get_embedding`.
        backbone: As for :func:`get_embedding`.
        device: As for :func:`get_embedding`.
        stage: As for :func:`get_embedding`.

    Raises:
        SpecError: If the device or the stage cannot be used.
        CheckpointError: If the weights cannot be loaded.
    """
    place = _device(device)
    if not isinstance(backbone, nn.Module):
        backbone = _shared_backbone(backbone or _default_config(), place)
    task = FeatureExtraction(backbone, output.mode, output.pooling, stage=stage)
    return task.to(place)


def _shared_backbone(config: BackboneConfig, device: torch.device) -> nn.Module:
    """Return the backbone of this process for a configuration and a device."""
    with _loading:
        for known, place, module in _loaded:
            if known == config and place == device:
                return module
        module, described = load_backbone(config, **stages_to_load(config))
        # Where FeatureExtraction looks for what a module is.
        module.provenance = described  # type: ignore[assignment]
        module.to(device)
        _loaded.append((config, device, module))
        return module


def _device(device: str | torch.device) -> torch.device:
    if device == 'auto':
        mps = torch.backends.mps.is_available()
        device = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    try:
        # On the device, so that its number is known: 'cuda' and 'cuda:0' are the same.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise SpecError(
            f'device={device!r} cannot be used ({str(error).splitlines()[0]}): give '
            "'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'"
        ) from error


def embed_images(
    images: Iterable[tuple[Tensor, Origin]], task: FeatureExtraction, batch_size: int
) -> list[Embedding]:
    """Give the features of images, those of one size after preprocessing together.

    Args:
        images: Raw reflectance ``[3, H, W]``, and where it comes from.
        task: What gives them.
        batch_size: Images that go through the backbone at once.

    Returns:
        The features of each image, in their order.
    """
    done: dict[int, Embedding] = {}
    waiting: dict[torch.Size, list[tuple[int, Tensor, Origin]]] = {}

    def run(batch: list[tuple[int, Tensor, Origin]]) -> None:
        positions, inputs, origins = zip(*batch, strict=True)
        embeddings = _embed_batch(torch.stack(inputs), origins, task)
        done.update(zip(positions, embeddings, strict=True))

    for position, (pixels, origin) in enumerate(images):
        x = task.preprocess(pixels.to(task.device))
        batch = waiting.setdefault(x.shape, [])
        batch.append((position, x, origin))
        if len(batch) == batch_size:
            run(waiting.pop(x.shape))
    for batch in waiting.values():
        run(batch)
    return [done[position] for position in range(len(done))]


def _embed_batch(
    inputs: Tensor, origins: Sequence[Origin], task: FeatureExtraction
) -> Iterator[Embedding]:
    features = task.features(inputs)
    data = task.reduce(features).cpu().numpy()
    kind = 'featmap' if features.ndim == 4 else 'vector_as_1x1'
    shape = [*features.shape[1:], 1, 1][:3]
    for origin, values in zip(origins, data, strict=True):
        meta = _meta(origin, task, kind, shape)
        # Copies, so that one embedding does not keep its batch alive.
        if task.output == 'grid':
            grid = _georeferenced(values.copy(), origin)
            grid.attrs = {'grid_kind': meta['grid_kind'], 'model': MODEL}
            yield Embedding(grid, meta)
        else:
            yield Embedding(values.copy(), meta)


def _meta(
    origin: Origin, task: FeatureExtraction, kind: str, shape: list[int]
) -> dict[str, Any]:
    made = task.provenance
    backbone = made['backbone']
    size = made['preprocessing']['resize']
    kind_of_grid = (
        'last_stage_featmap' if task.stage == 3 else f'stage_{task.stage}_featmap'
    )
    meta: dict[str, Any] = jsonable(
        {
            'model': MODEL,
            **origin.meta,
            'image_size': size[0] if size and size[0] == size[1] else size,
            'weights': backbone.get('weights'),
            'hf_repo': backbone.get('repository'),
            'ckpt_file': backbone.get('file'),
            **{name: backbone.get(name) for name in _OF_BACKBONE},
            'device': str(task.device),
            'feature_kind': kind,
            'stage': task.stage,
            'feature_shape': shape,
            'grid_hw': shape[1:],
            'grid_kind': kind_of_grid if task.output == 'grid' else None,
            'pooling': made['pooling'],
            'provenance': {
                'processing:software': _software(),
                'model': made,
                'source': origin.source,
            },
        }
    )
    return meta


def _georeferenced(values: NDArray[np.float32], origin: Origin) -> xr.DataArray:
    """Give a feature map ``[D, h, w]`` coordinates: the centres of its cells."""
    coords: dict[str, Any] = {'d': np.arange(len(values))}
    if origin.crs is not None and origin.bounds is not None:
        minx, miny, maxx, maxy = origin.bounds
        _, height, width = values.shape
        xres, yres = (maxx - minx) / width, (maxy - miny) / height
        axes = {axis.pop('axis'): axis for axis in origin.crs.cs_to_cf()}
        coords |= {
            'y': ('y', maxy - (np.arange(height) + 0.5) * yres, axes.get('Y')),
            'x': ('x', minx + (np.arange(width) + 0.5) * xres, axes.get('X')),
            # As rioxarray writes and reads it; the transform is needed where a map is
            # one cell wide, whose size no coordinate tells.
            'spatial_ref': (
                (),
                0,
                {
                    **origin.crs.to_cf(),
                    'spatial_ref': origin.crs.to_wkt(),
                    'GeoTransform': f'{minx!r} {xres!r} 0.0 {maxy!r} 0.0 {-yres!r}',
                },
            ),
        }
    return xr.DataArray(values, coords, ('d', 'y', 'x'), 'embedding')


_software = cache(software_versions)
