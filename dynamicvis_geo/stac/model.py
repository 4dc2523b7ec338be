"""The backbone of an output as a STAC Item with the extension for models (MLM)."""

import re
from collections.abc import Mapping
from typing import Any

from dynamicvis_geo import terms
from dynamicvis_geo.provenance import jsonable
from dynamicvis_geo.terms import find

#: The version that PySTAC reads.
_MLM = 'https://stac-extensions.github.io/mlm/v1.4.0/schema.json'
#: A model is for all times, and STAC wants some.
ALWAYS = ('1900-01-01T00:00:00Z', '9999-12-31T23:59:59Z')
_TASKS = ['similarity-search']
_COLOURS = ('red', 'green', 'blue')
#: STAC takes those of an Item only if an asset has them, too.
_BANDS = [{'name': colour} for colour in _COLOURS]


def model_item(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the backbone.

    Args:
        provenance: Of an output.

    Returns:
        A STAC Item.
    """
    backbone = find(provenance, 'model', 'backbone')
    random = terms.random_weights(provenance)
    name = re.sub(r'[^\w.-]+', '-', terms.model_title(provenance))
    parameters = find(backbone, 'parameters')
    count = find(parameters, 'count') or parameters
    torch = find(provenance, 'processing:software', 'torch')
    known = {
        'mlm:framework': 'PyTorch' if torch else None,
        'mlm:framework_version': torch,
        'mlm:total_parameters': count if isinstance(count, int) else None,
        'mlm:hyperparameters': jsonable(find(backbone, 'settings')) or None,
    }
    return {
        'type': 'Feature',
        # The colours that a backbone sees are bands of STAC 1.1.
        'stac_version': '1.1.0',
        'stac_extensions': [_MLM],
        'id': name,
        'geometry': None,
        'properties': {
            'title': terms.model_title(provenance),
            'description': _description(provenance, random),
            'datetime': None,
            'start_datetime': ALWAYS[0],
            'end_datetime': ALWAYS[1],
            'bands': _BANDS,
            'mlm:name': name,
            'mlm:architecture': name.partition('-')[0],
            'mlm:tasks': _TASKS,
            'mlm:pretrained': not random,
            'mlm:pretrained_source': None if random else _weights(backbone),
            'mlm:input': [_input(provenance)],
            'mlm:output': [_output(provenance)],
            **{key: value for key, value in known.items() if value is not None},
        },
        'links': [],
        'assets': {'model': {**_asset(provenance, random), 'bands': _BANDS}},
    }


def _description(provenance: Mapping[str, Any], random: bool) -> str:
    name = terms.model_name(provenance)
    if random:
        seed = find(provenance, 'model', 'backbone', 'seed')
        return f'The backbone {name} with random weights, seed {seed}: untrained.'
    told = _weights(find(provenance, 'model', 'backbone'))
    return f'The frozen backbone {name}, weights: {told}.'


def _weights(backbone: Any) -> str:
    """Say where weights came from: repository, file and digest, as far as told."""
    parts = [find(backbone, 'repository'), find(backbone, 'file')]
    digest = find(backbone, 'sha256') or find(backbone, 'tensors')
    parts.append(f'SHA-256 {digest}' if digest else None)
    return ', '.join(str(part) for part in parts if part) or 'not told'


def _input(provenance: Mapping[str, Any]) -> dict[str, Any]:
    done = find(provenance, 'model', 'preprocessing')
    size = find(done, 'resize') or [-1, -1]
    described: dict[str, Any] = {
        'name': 'image',
        'bands': list(_COLOURS),
        'input': {
            'shape': [-1, len(_COLOURS), *size],
            'dim_order': ['batch', 'channel', 'height', 'width'],
            'data_type': 'float32',
        },
    }
    if done:
        described['pre_processing_function'] = {
            'format': 'dynamicvis_geo',
            'expression': jsonable(done),
        }
    if find(done, 'resize'):
        described['resize_type'] = 'interpolation-cubic'
    mean, std = find(done, 'mean'), find(done, 'std')
    if mean and std:
        described['value_scaling'] = [
            {'type': 'z-score', 'mean': m, 'stddev': s}
            for m, s in zip(mean, std, strict=False)
        ]
    return described


def _output(provenance: Mapping[str, Any]) -> dict[str, Any]:
    maps = provenance.get('emb:type') == 'pixel'
    pooling = find(provenance, 'model', 'pooling')
    described: dict[str, Any] = {
        'name': 'feature map' if maps else 'feature vector',
        'tasks': _TASKS,
        'result': {
            'shape': [-1, provenance.get('emb:dimensions') or -1, *[-1, -1] * maps],
            'dim_order': ['batch', 'embedding', *['height', 'width'] * maps],
            'data_type': 'float32',
        },
    }
    if pooling:
        described['post_processing_function'] = {
            'format': 'dynamicvis_geo',
            'expression': pooling,
        }
    return described


def _asset(provenance: Mapping[str, Any], random: bool) -> dict[str, Any]:
    address = terms.model_url(provenance) or terms.OFFICIAL_CODE
    backbone = find(provenance, 'model', 'backbone')
    told = 'random weights' if random else _weights(backbone)
    if find(backbone, 'repository'):
        return {
            'href': address,
            'type': 'application/octet-stream; application=pytorch',
            'title': told,
            'roles': ['mlm:model', 'mlm:weights'],
            'mlm:artifact_type': 'torch.save',
        }
    # The extension wants an asset; weights that nobody else has get no address.
    return {
        'href': address,
        'type': 'text/html',
        'title': f'Code of the official model; the weights are not there: {told}',
        'roles': ['mlm:model', 'mlm:source_code', 'code'],
        'mlm:artifact_type': 'source-code',
    }
