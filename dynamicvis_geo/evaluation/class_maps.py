"""Maps of what a probe says of every cell."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from matplotlib.colors import to_rgba
from numpy.typing import NDArray
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader, MemoryFile

from dynamicvis_geo.datasets.scene_files import find_files
from dynamicvis_geo.errors import OutputError, SourceError, one_line
from dynamicvis_geo.paths import AnyPath, Place, input_path, local_input, local_output
from dynamicvis_geo.plotting.palette import class_colours
from dynamicvis_geo.provenance import (
    METADATA_FILE,
    PROVENANCE_KEY,
    read_provenance,
    refuse_others,
    software_versions,
    to_json,
)
from dynamicvis_geo.rasters import open_raster
from dynamicvis_geo.store import Store
from dynamicvis_geo.tasks.probe import LinearProbe, load_probe

#: Red, green, blue and alpha, 0 to 255, of class numbers.
ColourTable = dict[int, tuple[int, ...]]

#: Tags of a feature map that its class map keeps.
_KEPT_TAGS = ('chip_id', 'start', 'end', 'valid_fraction', 'TIFFTAG_DATETIME')


def predict_maps(
    probe: str | os.PathLike[str],
    maps: AnyPath,
    output: str | os.PathLike[str],
    overwrite: bool = False,
    colours: Mapping[str, str] | None = None,
) -> tuple[list[Path], list[Path]]:
    """Apply a fitted probe to feature maps, and write a map for each.

    A map has the grid of its feature map. Of binary and multiclass it has one band of
    class numbers, uint8 (uint16 from 256 classes), with a colour table and the names of
    the classes in the tags ``class_0``, ``class_1``, ...; of multilabel a band of 0 and
    1 for each class; of regression a band of float32. Cells whose features are not
    finite have the nodata value: the highest number of the type, or NaN.

    Files appear whole, under the names of the feature maps. Those that this probe has
    written already are skipped, so that an interrupted run can be continued.

    A probe of pooled features can be applied to maps of the same backbone and
    preprocessing; a warning says that this is an extrapolation: the mean over the cells
    of a chip varies less than the cells do.

    Args:
        probe: The checkpoint of a :class:`~dynamicvis_geo.LinearProbe`.
        maps: A feature map, or a folder of them; or the URL of one.
        output: Folder for the maps.
        overwrite: Write all maps anew, also in place of those of other probes; never of
            anything else.
        colours: Colours by class, for the colour tables; the other classes have those
            of :func:`~dynamicvis_geo.plotting.palette.class_colours`.

    Returns:
        The files that were written, and those that were there.

    Raises:
        CheckpointError: If the probe cannot be loaded.
        SourceError: If a feature map cannot be read, or has another number of bands.
        SpecError: If its features were made otherwise than those of the probe, or a
            colour is none or all are of other classes.
        OutputError: If a map exists that this probe did not write, or none can be
            written.
    """
    model, identity = load_probe(probe), _identity(local_input(probe, 'probe'))
    source, target = input_path(maps), local_output(output)
    table = _colour_table(model, colours)
    if (
        isinstance(source, Path)
        and source.is_dir()
        and target.resolve().is_relative_to(source.resolve())
    ):
        raise OutputError(
            f"will not write into '{source}', the folder of the feature maps: choose "
            'another --output'
        )
    if target.exists() and not target.is_dir():
        raise OutputError(f"cannot write '{target}': it is a file; name a folder")
    files = find_files(source)
    _warn_of_extrapolation(model, files[0])
    made: dict[str, Any] = {
        'processing:datetime': datetime.now(UTC).isoformat(timespec='seconds'),
        'processing:software': software_versions(),
        'probe': {**identity, 'task': model.task, 'classes': model.classes},
    }
    root = str(source.parent if files == [source] else source)
    paths = [target / PurePath(str(file)).relative_to(root) for file in files]
    refuse_others(path for path in [*paths, target / METADATA_FILE] if path.exists())
    written, skipped = [], []
    for file, path in zip(files, paths, strict=True):
        if path.exists() and not overwrite and _is_ours(path, identity):
            skipped.append(path)
            continue
        Store(str(path.parent)).put(path.name, _encode(file, model, made, table))
        written.append(path)
    Store(str(target)).put(METADATA_FILE, to_json(made, indent=2).encode())
    return written, skipped


def _identity(path: Path) -> dict[str, str]:
    with path.open('rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    return {'file': path.name, 'sha256': digest}


def _is_ours(path: Path, identity: dict[str, str]) -> bool:
    try:
        made = read_provenance(path).get('probe', {})
    except OutputError:
        made = {}
    if made.get('sha256') == identity['sha256']:
        return True
    raise OutputError(
        f"'{path}' exists already, and is not of this probe: choose another --output, "
        'or allow it to be replaced (overwrite=True)'
    )


def _warn_of_extrapolation(model: LinearProbe, file: Place) -> None:
    if model.provenance.get('model', {}).get('output') == 'pooled':
        warnings.warn(
            'the probe was fitted on pooled features, and is applied to single cells '
            f'of {file.parent}: cells vary more than the chips that it knows, so take '
            'the maps as a hint, or fit a probe on cells',
            stacklevel=3,
        )


def _encode(
    file: Place, model: LinearProbe, made: dict[str, Any], table: ColourTable
) -> bytes:
    """Predict one map, and return the file of it."""
    try:
        with open_raster(file) as source:
            _check(file, source, model)
            values, nodata = _predict(source, model)
            tags = {k: v for k, v in source.tags().items() if k in _KEPT_TAGS}
            features = source.tags().get(PROVENANCE_KEY)
            profile = {
                'driver': 'GTiff',
                'dtype': values.dtype,
                'count': len(values),
                'height': source.height,
                'width': source.width,
                'crs': source.crs,
                'transform': source.transform,
                'nodata': nodata,
                'compress': 'deflate',
            }
    except RasterioError as error:
        raise SourceError(
            f'{file}: rasterio cannot read it ({one_line(error)}); make it anew or '
            'remove it'
        ) from error
    if max(values.shape[1:]) > 512:
        profile |= {'tiled': True, 'blockxsize': 256, 'blockysize': 256}
    tags |= {f'class_{i}': name for i, name in enumerate(model.classes)}
    origin = read_provenance(file) if features else {}
    tags[PROVENANCE_KEY] = to_json({**made, 'features': origin})
    with MemoryFile() as memory:
        with memory.open(**profile) as image:
            image.update_tags(**tags)
            image.write(values)
            if model.task == 'multilabel':
                image.descriptions = list(model.classes)
            elif model.task == 'regression':
                image.descriptions = ['prediction']
            else:
                image.descriptions = ['class']
                image.write_colormap(1, table)
        return bytes(memory.getbuffer())


def _check(file: Place, source: DatasetReader, model: LinearProbe) -> None:
    made = read_provenance(file) if PROVENANCE_KEY in source.tags() else {}
    model.check_features(made, f'the features of {file}', any_pooling=True)
    if source.count != model.in_features:
        raise SourceError(
            f'{file} has {source.count} bands, but the probe takes '
            f'{model.in_features} features: give maps of the same backbone'
        )


def _predict(source: DatasetReader, model: LinearProbe) -> tuple[NDArray[Any], float]:
    """Predict block by block."""
    several = model.task == 'multilabel'
    bands = len(model.classes) if several else 1
    kind: type[Any] = (
        np.uint16 if len(model.classes) > 255 and not several else np.uint8
    )
    if model.task == 'regression':
        kind = np.float32
    nodata = np.nan if kind is np.float32 else np.iinfo(kind).max
    out = np.full((bands, *source.shape), nodata, kind)
    for _, window in source.block_windows(1):
        features = source.read(window=window, out_dtype='float32')
        if source.nodata is not None:
            features[features == np.float32(source.nodata)] = np.nan
        values = model.probabilities(torch.from_numpy(features)[None])[0].numpy()
        rows, columns = window.toslices()
        if model.task == 'regression':
            out[0, rows, columns] = values
            continue
        found = values > 0.5 if several else values.argmax(0, keepdims=True)
        known = np.isfinite(values).all(0)
        out[:, rows, columns] = np.where(known, found, nodata)
    return out, nodata


def _colour_table(model: LinearProbe, colours: Mapping[str, str] | None) -> ColourTable:
    if not model.classes:
        return {}
    hexes = class_colours(model.classes, colours).values()
    return {
        i: tuple(round(255 * part) for part in to_rgba(colour))
        for i, colour in enumerate(hexes)
    }
