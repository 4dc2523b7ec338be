"""What decides features, out of all that a file says of how they were made.

A run that continues an output, and a probe that meets features, compare just that.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dynamicvis_geo.models.config import BackboneConfig
from dynamicvis_geo.models.dynamicvis import DynamicVis
from dynamicvis_geo.provenance import jsonable

#: Arguments of the backbone that BackboneConfig has no fields for; they follow the
#: checkpoint.
TAKEN_OVER = (
    'global_token_cfg',
    'is_softmax_on_x',
    'layer_cfgs',
    'norm_topk_prob',
    'spatial_token_keep_ratios',
)

#: What is recorded of a backbone and not compared: how it was computed, where its file
#: lay, what else was in it, and what its settings say already.
_NOT_COMPARED = frozenset(
    {
        'arch',
        'dtype',
        'feature_kind',
        'file',
        'ignored_keys',
        'img_size',
        'implementation',
        'loaded_keys',
        'mamba2',
        'missing_keys',
        'parameters',
        'path_type',
        'repository',
        'revision',
        'sampling_scale',
        'scan',
        'settings',
        'shuffle_seed',
        'stored_dtypes',
        'trained_img_size',
        'trained_settings',
        'training',
        'upstream_commit',
        'upstream_edited',
    }
)

#: Earlier versions did not tell these of every backbone.
_COMPARED_IF_BOTH_TELL = (
    'precision',
    'tf32',
    'model.backbone.settings',
    'model.backbone.tensors',
)


def identity(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Give the settings that decide the features of an output.

    Args:
        provenance: What made the output, also as earlier versions wrote it.

    Returns:
        Names, with dots between their parts, and plain values: weights, settings of the
        backbone as they took effect, preprocessing, pooling and precision. Empty if
        nothing is told of the model.
    """
    made = jsonable(provenance)
    model = made.get('model')
    if not isinstance(model, Mapping) or not model:
        return {'model': model} if model else {}
    compared = {name: value for name, value in model.items() if name != 'numerics'}
    if 'backbone' in model:
        compared['backbone'] = _backbone(model['backbone'])
    numerics = {**(made.get('run') or {}), **(model.get('numerics') or {})}
    told = {name: numerics.get(name) for name in ('precision', 'tf32')}
    return {
        **dict(_flat(compared, 'model.')),
        **{name: value for name, value in told.items() if value is not None},
    }


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Name what differs between two identities."""
    return [
        name
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
        and (
            (name in one and name in other)
            or not name.startswith(_COMPARED_IF_BOTH_TELL)
        )
    ]


def _backbone(described: Any) -> Any:
    # What a user's own module says of itself is compared as it is.
    if not isinstance(described, Mapping) or 'weights' not in described:
        return described
    compared = {k: v for k, v in described.items() if k not in _NOT_COMPARED}
    if not described.get('sha256'):
        for name in ('repository', 'file', 'revision'):
            if described.get(name):
                compared[name] = described[name]
    settings = described.get('settings') or _settings_of_earlier_version(described)
    if settings:
        compared['settings'] = settings
    commit = described.get('upstream_commit')
    edited = described.get('upstream_edited')
    if described.get('implementation') == 'upstream' and (
        edited or commit != BackboneConfig.repo_commit
    ):
        compared['code'] = f'upstream at {commit}' + (', edited' if edited else '')
    return compared


def _settings_of_earlier_version(described: Mapping[str, Any]) -> dict[str, Any]:
    """Work out the settings of an output whose version recorded the checkpoint's."""
    if 'path_type' not in described:
        return {}
    trained = described.get('trained_settings') or {}
    # On this device no memory is taken.
    with torch.device('meta'):
        model = DynamicVis(
            arch=described['arch'],
            img_size=tuple(described['img_size']),
            path_type=described['path_type'],
            mamba2=described['mamba2'],
            shuffle_seed=described.get('shuffle_seed', 0),
            **{name: trained[name] for name in TAKEN_OVER if name in trained},
        )
    return model.settings


def _flat(value: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}', item
