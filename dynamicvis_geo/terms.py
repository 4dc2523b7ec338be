"""The making of an output, in the terms of the field's standards.

All is told by the provenance of an output, so that its files, its STAC catalogue and
its card say the same. The terms are those of the STAC extensions ``emb`` (a proposal,
v0.0.1, https://github.com/geo-embeddings/embeddings-stac-specification) and
``processing``.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pyproj import CRS

from dynamicvis_geo.provenance import jsonable, to_json

#: Key of the terms in the metadata of a Parquet file.
EMB_KEY = 'emb'

PAPER = {
    'doi': '10.48550/arXiv.2503.16426',
    'citation': 'Chen, K., Liu, C., Chen, B., Li, W., Zou, Z., Shi, Z. (2025). '
    'DynamicVis: An Efficient and General Visual Foundation Model for Remote Sensing '
    'Image Understanding. arXiv:2503.16426.',
}
#: The official code, where weights have no address of their own.
OFFICIAL_CODE = 'https://github.com/KyanChen/DynamicVis'
_HUB = 'https://huggingface.co'
_EE_CATALOG = 'https://storage.googleapis.com/earthengine-stac/catalog'
_EE_ASSET = 'https://code.earthengine.google.com/?asset='
#: Semi-major axis of WGS 84: with radians, metres along a meridian, nearly.
_EARTH_RADIUS_M = 6378137.0

Json = dict[str, Any]


def find(value: Any, *way: str | int) -> Any:
    """Return what lies at the end of a way into a provenance.

    Args:
        value: A provenance, or a part of one.
        *way: Keys, and places in lists, one in the other.

    Returns:
        The value; None where the way does not lead on.
    """
    for key in way:
        if isinstance(key, int):
            value = value[key] if isinstance(value, list) and key < len(value) else None
        else:
            value = value.get(key) if isinstance(value, Mapping) else None
    return value


def random_weights(provenance: Mapping[str, Any]) -> bool:
    """Tell if features are those of random weights.

    Args:
        provenance: Of an output.

    Returns:
        True if it says so.
    """
    return 'random' in (
        find(provenance, 'model', 'backbone', 'weights'),
        find(provenance, 'model', 'weights'),
    )


def sources(provenance: Mapping[str, Any]) -> list[Json]:
    """List the datasets that an output was made of, the parts of joined ones.

    Args:
        provenance: Of an output.

    Returns:
        What each says of itself.
    """
    told = find(provenance, 'source', 'sources')
    return list(_parts(told if isinstance(told, list) else []))


def _parts(datasets: list[Any]) -> Iterator[Json]:
    for one in datasets:
        if isinstance(one, Mapping):
            parts = one.get('datasets')
            yield from _parts(parts) if isinstance(parts, list) else [dict(one)]


def collections(provenance: Mapping[str, Any]) -> list[str]:
    """Name the Earth Engine collections that an output was made of.

    Args:
        provenance: Of an output.

    Returns:
        Their ids, each once.
    """
    # Other sources behind a network have a sensor, too.
    found = [
        find(one, 'sensor', 'collection')
        for one in sources(provenance)
        if one.get('dataset') == 'EarthEngineDataset'
    ]
    return list(dict.fromkeys(str(name) for name in found if name))


def collection_url(collection: str) -> str:
    """Return the address of an Earth Engine collection.

    Args:
        collection: Its id.

    Returns:
        Its page in Earth Engine's STAC catalogue; of assets of users, which that does
        not list, the asset.
    """
    if collection.startswith(('projects/', 'users/')):
        return f'{_EE_ASSET}{collection}'
    folder = collection.partition('/')[0]
    return f'{_EE_CATALOG}/{folder}/{collection.replace("/", "_")}.json'


def source_links(provenance: Mapping[str, Any], local: str | None = None) -> list[Json]:
    """Link to the images that an output was made of.

    Args:
        provenance: Of an output.
        local: Address that stands for local images; None leaves them out.

    Returns:
        STAC links with the relation ``emb:source-data``.
    """
    links = [
        {
            'rel': 'emb:source-data',
            'href': collection_url(name),
            'type': 'application/json',
            'title': f'{name} on Google Earth Engine',
        }
        for name in collections(provenance)
    ]
    if local is not None and not links:
        links.append(
            {
                'rel': 'emb:source-data',
                'href': local,
                'type': 'application/json',
                'title': f'{images(provenance)}, as the provenance tells',
            }
        )
    return links


def images(provenance: Mapping[str, Any]) -> str:
    """Name the images that an output was made of, in a few words.

    Args:
        provenance: Of an output.
    """
    names = collections(provenance)
    if names:
        return f'composites of {" and ".join(names)} from Google Earth Engine'
    files = [
        f'{name}{f" and {count - 1} more" if count > 1 else ""}'
        for one in sources(provenance)
        if (name := find(one, 'files', 'first', 0))
        and (count := find(one, 'files', 'count') or 1)
    ]
    return f'images of {", ".join(dict.fromkeys(files))}' if files else 'images'


def model_name(provenance: Mapping[str, Any]) -> str:
    """Name the backbone.

    Args:
        provenance: Of an output.

    Returns:
        Such as 'DynamicVis-B', or the class of another module.
    """
    backbone = find(provenance, 'model', 'backbone')
    arch = find(provenance, 'model', 'backbone', 'arch')
    if arch:
        return f'DynamicVis-{str(arch).upper()}'
    own = find(provenance, 'model', 'backbone', 'implementation')
    return str(own or backbone or 'unknown').rpartition('.')[2]


def model_title(provenance: Mapping[str, Any]) -> str:
    """Name the backbone, and say if its weights are random.

    Args:
        provenance: Of an output.
    """
    random = ' with random weights' if random_weights(provenance) else ''
    return f'{model_name(provenance)}{random}'


def model_url(provenance: Mapping[str, Any]) -> str | None:
    """Return the address of the weights, of DynamicVis else that of its code.

    Args:
        provenance: Of an output.

    Returns:
        The address; None if nothing tells one.
    """
    backbone = find(provenance, 'model', 'backbone')
    repository = find(provenance, 'model', 'backbone', 'repository')
    if repository:
        place = f'{backbone.get("revision") or "main"}/{backbone.get("file") or ""}'
        return f'{_HUB}/{repository}/resolve/{place}'.rstrip('/')
    return OFFICIAL_CODE if find(provenance, 'model', 'backbone', 'arch') else None


def embedding_terms(
    provenance: Mapping[str, Any], cells: tuple[int, int] | None = None
) -> Json:
    """Describe embeddings as a STAC Collection of them does.

    Args:
        provenance: Of an output.
        cells: Height and width of a feature map, if it holds such.

    Returns:
        ``emb:type``, ``emb:dimensions`` and ``data_type``, and where they are known
        ``gsd`` (metres; of a pixel for vectors of chips, of a cell for feature maps)
        and ``emb:chip_layout``.
    """
    names = ('emb:type', 'emb:dimensions', 'data_type')
    terms = {name: provenance.get(name) for name in names}
    sizes = {_pair(find(one, 'sampler', 'size')) for one in _sampled(provenance)}
    strides = {_pair(find(one, 'sampler', 'stride')) for one in _sampled(provenance)}
    size = sizes.pop() if len(sizes) == 1 else None
    metres = [_metres(one) for one in sources(provenance)]
    known = [metre for metre in metres if metre is not None]
    if known and (cells is None or size):
        across = size[1] / cells[1] if cells and size else 1.0
        terms['gsd'] = float(f'{min(known) * across:.9g}')
    if size:
        stride = strides.pop() if len(strides) == 1 else None
        terms['emb:chip_layout'] = {
            'layout_type': 'regular_grid' if stride else 'variable_grid',
            'chip_size': list(size),
            **({'stride': list(stride)} if stride else {}),
        }
    elif terms['emb:type'] == 'chip':
        terms['emb:chip_layout'] = {'layout_type': 'variable_grid'}
    return terms


def _sampled(provenance: Mapping[str, Any]) -> list[Any]:
    told = find(provenance, 'source', 'sources')
    return told if isinstance(told, list) else []


def _pair(value: Any) -> tuple[int, int] | None:
    match value:
        case [int(down), int(across)] if down > 0 and across > 0:
            return down, across
    return None


def _metres(source: Mapping[str, Any]) -> float | None:
    """Return the size of a pixel on the ground, metres."""
    match source:
        case {'crs': str(name), 'res': [_, int(res) | float(res)]}:
            crs = CRS.from_user_input(name)
            factor = float(crs.axis_info[0].unit_conversion_factor)
            return res * factor * (_EARTH_RADIUS_M if crs.is_geographic else 1.0)
    return None


def processing_terms(provenance: Mapping[str, Any]) -> Json:
    """Describe the making of embeddings as a STAC Item of them does.

    Args:
        provenance: Of an output.

    Returns:
        ``processing:datetime`` and ``processing:software``,
        ``emb:runtime_parameters``, ``emb:preprocessing``, and for int8
        ``emb:quantization``.
    """
    names = ('processing:datetime', 'processing:software')
    terms = {name: provenance[name] for name in names if name in provenance}
    model = find(provenance, 'model')
    own = model if isinstance(model, Mapping) else {}
    parameters = {
        **{name: own[name] for name in ('output', 'pooling', 'stage') if name in own},
        **(find(own, 'numerics') or {}),
        **(find(provenance, 'run') or {}),
    }
    terms['emb:runtime_parameters'] = jsonable(parameters)
    steps: Json = {}
    sensors = [one['sensor'] for one in sources(provenance) if one.get('sensor')]
    if sensors:
        steps['images'] = sensors[0] if len(sensors) == 1 else sensors
    if own.get('preprocessing'):
        steps['input'] = own['preprocessing']
    if steps:
        terms['emb:preprocessing'] = {
            'format': 'dynamicvis_geo',
            'expression': jsonable(steps),
        }
    if provenance.get('data_type') == 'int8':
        terms['emb:quantization'] = {
            'method': 'linear, value = embedding * scale with a scale for each row',
            'original_dtype': 'float32',
            'quantized_dtype': 'int8',
        }
    return terms


def emb_json(provenance: Mapping[str, Any]) -> str:
    """Write the terms for the metadata of a Parquet file, key :data:`EMB_KEY`.

    Args:
        provenance: Of the output, its type and dimensions among it.

    Returns:
        One JSON object: the terms of Collection and Item, and ``links`` to the model
        and the images as far as these have public addresses.
    """
    links = source_links(provenance)
    address = model_url(provenance)
    if address:
        title = model_title(provenance)
        links.insert(0, {'rel': 'emb:model', 'href': address, 'title': title})
    return to_json(
        {
            **embedding_terms(provenance),
            **processing_terms(provenance),
            'links': links,
        }
    )


def description(provenance: Mapping[str, Any]) -> str:
    """Say in a sentence or two what an output holds.

    Args:
        provenance: Of an output.
    """
    maps = provenance.get('emb:type') == 'pixel'
    what = 'feature maps' if maps else 'pooled features, one vector a chip,'
    text = (
        f'{provenance.get("emb:dimensions")}-dimensional {what} of the frozen backbone '
        f'{model_name(provenance)}, of {images(provenance)}.'
    )
    if random_weights(provenance):
        text += (
            ' The weights are random: the features show that everything works, and '
            'mean nothing.'
        )
    return text
