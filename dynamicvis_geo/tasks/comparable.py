"""Whether two sets of features were made in the same way."""

from collections.abc import Iterator, Mapping
from typing import Any

from dynamicvis_geo.errors import SpecError

#: What a backbone of this package says of itself that does not change its features
#: beyond rounding: how it was computed, where its file lay, and what else was in it.
#: Its architecture, settings and the SHA-256 or seed of its weights remain.
_HARMLESS = frozenset(
    {
        'scan',
        'implementation',
        'upstream_commit',
        'parameters',
        'repository',
        'file',
        'revision',
        'loaded_keys',
        'ignored_keys',
        'missing_keys',
        'stored_dtypes',
        'trained_img_size',
        'trained_settings',
        'training',
    }
)

#: What differs between pooled features and the maps that they were pooled from.
_POOLING = frozenset({'output', 'pooling'})


def check_comparable(
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    what: str,
    *,
    any_pooling: bool = False,
) -> None:
    """Refuse features that were made otherwise than those that a probe has learnt from.

    The descriptions of the model are compared: backbone, preprocessing, and how the
    feature map was pooled; not the images, nor where and when it ran.

    Args:
        ours: Provenance of the features that the probe was fitted on; if they came
            without one, there is nothing to compare, and all features pass.
        theirs: Provenance of the other features.
        what: Names the other features in the error.
        any_pooling: Whether features may be pooled otherwise, or not at all.

    Raises:
        SpecError: If they differ, with a list of the differences; also if the others do
            not say how they were made.
    """
    mine, other = (_identity(made, any_pooling) for made in (ours, theirs))
    if not mine:
        return
    if not other:
        raise SpecError(
            f'{what} carry no provenance, those that the probe was fitted on do: give '
            'features that this package wrote, with the same settings'
        )
    found = [
        f'{key}: {mine.get(key, "not told")} (probe), {other.get(key, "not told")}'
        for key in dict.fromkeys([*mine, *other])
        if mine.get(key) != other.get(key)
    ]
    if found:
        raise SpecError(
            f'{what} were made otherwise than those that the probe was fitted on: '
            f'{"; ".join(found)}. Embed again with the same settings, or fit another '
            'probe'
        )


def _identity(provenance: Mapping[str, Any], any_pooling: bool) -> dict[str, Any]:
    """Return what decides the features, flat: 'backbone.arch', ..."""
    model = provenance.get('model') or {}
    backbone = model.get('backbone')
    # A module of the user's says nothing but its class and its parameters.
    ours = isinstance(backbone, Mapping) and 'weights' in backbone
    return {
        key: value
        for key, value in _flat(model)
        if not (ours and key.partition('backbone.')[2].split('.')[0] in _HARMLESS)
        and not (any_pooling and key in _POOLING)
    }


def _flat(value: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}', item
