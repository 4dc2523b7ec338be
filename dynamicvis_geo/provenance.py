"""Provenance: the software, run, model and source of a file, written into it.

A provenance is a plain dictionary that JSON can hold. Where they fit, its keys are
terms of public proposals: ``processing:datetime`` and ``processing:software`` (STAC
Processing extension), ``emb:type``, ``emb:dimensions`` and ``data_type`` (STAC
Embedding extension, proposal of the Geo-Embeddings Sprint 2026). All other keys are our
own plain names:

* ``model``: what the task says of its backbone, preprocessing and output;
* ``source``: what the chips' dataset says of its images;
* ``run``: command line, precision, device and number of processes;
* ``runs``: the same, of all runs that an output is the work of, first to last.
"""

import dataclasses
import json
import math
import mmap
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.paths import (
    AnyPath,
    Place,
    input_path,
    kind_of,
    open_file,
    parquet_source,
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

#: Key of the provenance in the metadata of a Parquet file and in the tags of a GeoTIFF.
PROVENANCE_KEY = 'dynamicvis_geo'

#: File that holds the provenance of a folder of outputs.
METADATA_FILE = 'metadata.json'

#: The same in a folder of Parquet files, whose readers take every file for one of them
#: that has no underscore in front.
PARQUET_METADATA_FILE = '_metadata.json'

_DISTRIBUTIONS = (
    'dynamicvis-geo',
    'torchgeo',
    'lightning',
    'numpy',
    'rasterio',
)


@runtime_checkable
class Described(Protocol):
    """A dataset, sampler or datamodule that tells for provenances what it is."""

    @property
    def provenance(self) -> dict[str, Any]:
        """Plain values for JSON."""


def run_provenance(
    trainer: 'Trainer', pl_module: 'LightningModule', source: Mapping[str, Any]
) -> dict[str, Any]:
    """Gather what is known of a prediction run when its output is begun.

    Args:
        trainer: The trainer that runs the prediction.
        pl_module: The task; its ``provenance`` attribute, if any, describes the model.
        source: What the dataset of chips says of itself.

    Returns:
        A dictionary that :func:`to_json` writes without loss.
    """
    return {
        'processing:datetime': datetime.now(UTC).isoformat(timespec='seconds'),
        'processing:software': software_versions(),
        'model': jsonable(getattr(pl_module, 'provenance', {})),
        'source': jsonable(source),
        'run': {
            'command': shlex.join(sys.argv),
            'precision': str(trainer.precision),
            'device': trainer.strategy.root_device.type,
            'processes': trainer.world_size,
        },
    }


def run_history(
    existing: Mapping[str, Any], provenance: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return when and how the runs were made that an output is the work of.

    Args:
        existing: Provenance of what was there before, empty if nothing was.
        provenance: That of the present run.

    Returns:
        ``processing:datetime``, ``processing:software`` and ``run`` of each run, the
        present one last.
    """
    names = ('processing:datetime', 'processing:software', 'run')
    present = {name: provenance[name] for name in names}
    return [*existing.get('runs', []), present]


def describe_embeddings(
    kind: str, dimensions: int | None, dtype: str = 'float32'
) -> dict[str, Any]:
    """Describe the embeddings of one output in the terms of the STAC proposal.

    Args:
        kind: 'chip' (one vector a chip) or 'pixel' (one vector a feature cell).
        dimensions: Length of a vector; None if no vector was seen.
        dtype: Type in which the vectors are stored.

    Returns:
        The terms ``emb:type``, ``emb:dimensions`` and ``data_type``, and for int8
        ``emb:quantization``.
    """
    described = {'emb:type': kind, 'emb:dimensions': dimensions, 'data_type': dtype}
    if dtype == 'int8':
        described['emb:quantization'] = 'value = embedding * scale, row by row'
    return described


def software_versions() -> dict[str, str]:
    """Name the versions of Python and of the packages that decide the numbers.

    Returns:
        Versions by the names of the packages, 'not installed' for those that are
        missing.
    """
    import torch

    # torch.__version__ also names the build, such as '+cu130'.
    versions = {'python': platform.python_version(), 'torch': str(torch.__version__)}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = 'not installed'
    return versions


def jsonable(value: Any) -> Any:
    """Turn a value into what JSON can hold, without NaN or infinity.

    Dataclasses and mappings become dictionaries, sequences and arrays lists, dates ISO
    strings; numbers that JSON lacks become None, and anything else its ``str``.

    Args:
        value: Any value.

    Returns:
        Dictionaries, lists, texts, numbers, booleans and None.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return jsonable(value.tolist())
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, set | frozenset):
        return [jsonable(item) for item in sorted(value, key=str)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, date):
        # pandas' NaT is a date that equals nothing, itself included.
        return value.isoformat() if value == value else None
    return str(value)


def to_json(provenance: Mapping[str, Any], indent: int | None = None) -> str:
    """Write a provenance as JSON, strictly: no NaN, no infinity.

    Args:
        provenance: Any dictionary; see :func:`jsonable`.
        indent: Spaces of a level; None writes one line.

    Returns:
        The JSON.
    """
    return json.dumps(
        jsonable(provenance), allow_nan=False, ensure_ascii=False, indent=indent
    )


def read_provenance(path: AnyPath) -> dict[str, Any]:
    """Read back what made an output.

    Args:
        path: A ``.parquet`` file, a GeoTIFF, a ``metadata.json``, or a folder or Zarr
            store that this package wrote; or the URL of one.

    Returns:
        The provenance.

    Raises:
        OutputError: If there is nothing at `path`, or it carries no provenance.
        SpecError: If `path` is a URL that cannot be used.
        SourceError: If its store cannot be reached.
    """
    path = input_path(path)
    if kind_of(path) is None:
        raise OutputError(f"cannot read the provenance of '{path}': it does not exist")
    provenance = find_provenance(path)
    if provenance is None:
        raise OutputError(
            f"'{path}' carries no provenance: it was not written by dynamicvis_geo, "
            'or another program has rewritten it'
        )
    return provenance


def find_provenance(path: Place) -> dict[str, Any] | None:
    """Read the provenance of an output that is there.

    Args:
        path: A file, or a folder or Zarr store.

    Returns:
        The provenance; None if it carries none that names this package.

    Raises:
        OutputError: If it cannot be read.
    """
    is_folder = kind_of(path) == 'folder'
    try:
        text = _read_folder(path) if is_folder else _read_file(path)
        provenance = None if text is None else json.loads(text)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot read the provenance of '{path}': {error}") from error
    if isinstance(provenance, dict) and _names_us(provenance, path):
        return provenance
    return None


def carries_provenance(path: Place) -> bool:
    """Tell if a file says that this package wrote it.

    Args:
        path: The file, be it there or not.

    Returns:
        True if it does; False also for a folder.
    """
    if kind_of(path) != 'file' or not path.stat().st_size:
        return False
    if isinstance(path, Path) and path.suffix.lower() in ('.tif', '.tiff'):
        # GDAL takes a hundred times as long to open a file of many bands.
        tag = f'name="{PROVENANCE_KEY}"'.encode()
        with (
            path.open('rb') as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return content.find(tag) >= 0
    try:
        read_provenance(path)
    except OutputError:
        return False
    return True


def refuse_others(paths: Iterable[Place]) -> None:
    """Refuse to replace files that this package did not write.

    Args:
        paths: Files that would be replaced.

    Raises:
        OutputError: If there is one; names it.
    """
    for path in paths:
        if not carries_provenance(path):
            raise OutputError(
                f"will not replace '{path}', which dynamicvis_geo did not write: "
                'choose another --output'
            )


def _names_us(provenance: Mapping[str, Any], path: Place) -> bool:
    """Return whether this package wrote it: a file of JSON could be anybody's."""
    software = provenance.get('processing:software', provenance.get('software'))
    told = isinstance(software, Mapping) and 'dynamicvis-geo' in software
    return told or not (path.is_dir() or path.suffix == '.json')


def _read_folder(path: Place) -> str | None:
    for name in (METADATA_FILE, PARQUET_METADATA_FILE):
        if (path / name).is_file():
            return _read_file(path / name)
    return None


def _read_file(path: Place) -> str | None:
    if path.suffix == '.json':
        return path.read_text(encoding='utf-8')
    # Read by content, not by name: users rename files.
    with open_file(path) as file:
        magic = file.read(4)
    if magic == b'PAR1':
        import pyarrow.parquet as pq

        tags = pq.read_metadata(parquet_source(path)).metadata or {}
        value = tags.get(PROVENANCE_KEY.encode())
        return None if value is None else str(value, 'utf-8')
    if magic[:2] in (b'II', b'MM'):
        from dynamicvis_geo.rasters import open_raster

        with open_raster(path) as image:
            tag: str | None = image.tags().get(PROVENANCE_KEY)
        return tag
    return None
