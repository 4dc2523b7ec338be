"""Settings: what decides the numbers of an output, as one flat dictionary.

They are read off a provenance, which holds the values that took effect, under the names
that these have there. A run that continues an output compares all of them, a probe that
meets features those of the features.
"""

from collections.abc import Iterable, Iterator, Mapping
from textwrap import indent
from typing import Any

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models.config import BackboneConfig
from dynamicvis_geo.paths import Place
from dynamicvis_geo.provenance import jsonable

Settings = dict[str, Any]

# They may differ from run to run: more plots, another region, one more month end up in
# the same output.
_PLACES = frozenset({'crs', 'roi', 'time', 'windows', 'files', 'points', 'chips'})

#: What a provenance tells of each of its parts and the numbers do not depend on.
_NOT_COMPARED = {
    'images': _PLACES,
    'images.sampler': _PLACES,
    # What of it counts is taken by itself.
    'model': frozenset({'numerics'}),
    # How it was computed, where its file lay, what else was in it, and what its
    # settings say already.
    'backbone': frozenset(
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
    ),
}

#: Earlier versions did not tell these of every backbone.
_COMPARED_IF_BOTH_TELL = (
    'precision',
    'tf32',
    'model.backbone.settings',
    'model.backbone.tensors',
)

#: The stage, and what told it in earlier versions, if anything did.
_STAGE, _OUT_INDICES = 'model.stage', 'model.backbone.settings.out_indices'

#: What differs between pooled features and the maps that they were pooled from.
_POOLING = ('model.output', 'model.pooling')


def settings_of(provenance: Mapping[str, Any], dtype: str | None = None) -> Settings:
    """Collect the settings that must be equal in all runs that write one output.

    Args:
        provenance: What made an output, as ``run_provenance`` gives it.
        dtype: Type in which embeddings are stored; that of the provenance by default.

    Returns:
        Names, with dots between their parts, and plain values: those of
        :func:`feature_settings`, the type, and of the images all but their places and
        times.
    """
    plain = jsonable(provenance)
    return {
        **feature_settings(plain),
        **_image_settings(plain.get('source', {})),
        'dtype': dtype or plain.get('data_type'),
    }


def feature_settings(provenance: Mapping[str, Any]) -> Settings:
    """Collect the settings that decide features, whatever images they are of.

    Args:
        provenance: What made an output, also as earlier versions wrote it.

    Returns:
        Names, with dots between their parts, and plain values: weights and settings of
        the backbone, preprocessing, stage, pooling and precision. Empty if nothing is
        told of the model.
    """
    made = jsonable(provenance)
    model = made.get('model')
    if not isinstance(model, Mapping) or not model:
        return {'model': model} if model else {}
    compared = dict(model)
    if 'backbone' in model:
        compared['backbone'] = _compared_of_backbone(model['backbone'])
    numerics = {**(made.get('run') or {}), **(model.get('numerics') or {})}
    told = {name: numerics.get(name) for name in ('precision', 'tf32')}
    return _with_stage(
        {
            **dict(_flat('model', compared)),
            **{name: value for name, value in told.items() if value is not None},
        }
    )


def differing(one: Settings, other: Settings) -> list[str]:
    """Name the settings that differ.

    Args:
        one: Some settings.
        other: Those to compare.

    Returns:
        Names. Settings of which earlier versions said nothing differ only if both have
        them.
    """
    return [
        name
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
        and (
            (name in one and name in other)
            or not name.startswith(_COMPARED_IF_BOTH_TELL)
        )
    ]


def differences(old: Settings, new: Settings) -> list[tuple[str, str, str]]:
    """List the settings that differ, with their values.

    Args:
        old: Settings of what is there.
        new: Those that were asked for.

    Returns:
        Name, old and new value, sorted by name.
    """
    # Those of an unfinished run are as its version wrote them.
    old, new = _with_stage(old), _with_stage(new)
    return [
        (name, _text(old.get(name)), _text(new.get(name)))
        for name in sorted(differing(old, new))
    ]


def difference_table(rows: Iterable[tuple[str, str, str]]) -> str:
    """Write differences as text, indented, below titles.

    Args:
        rows: As :func:`differences` gives them.

    Returns:
        Lines, joined.
    """
    return indent(aligned([('setting', 'there', 'now'), *rows]), '  ')


def aligned(rows: Iterable[tuple[str, ...]]) -> str:
    """Write rows as text, with all columns but the last aligned.

    Args:
        rows: Texts; at least one row.

    Returns:
        Lines, joined.
    """
    cells = list(rows)
    count = max(map(len, cells))
    widths = [max(len(r[i]) for r in cells if len(r) > i) for i in range(count - 1)]
    lines = []
    for row in cells:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append('  '.join([*padded[: len(row) - 1], row[-1]]).rstrip())
    return '\n'.join(lines)


def check_comparable(
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    what: str,
    *,
    any_pooling: bool = False,
) -> None:
    """Refuse features that were made otherwise than those that a probe has learnt from.

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
    mine, other = (
        {
            name: value
            for name, value in feature_settings(made).items()
            if not (any_pooling and name in _POOLING)
        }
        for made in (ours, theirs)
    )
    if not mine:
        return
    if not other:
        raise SpecError(
            f'{what} carry no provenance, those that the probe was fitted on do: give '
            'features that this package wrote, with the same settings'
        )
    found = [
        f'{key}: {mine.get(key, "not told")} (probe), {other.get(key, "not told")}'
        for key in differing(mine, other)
    ]
    if found:
        raise SpecError(
            f'{what} were made otherwise than those that the probe was fitted on: '
            f'{"; ".join(found)}. Embed again with the same settings, or fit another '
            'probe'
        )


def check_same_settings(
    path: Place,
    made: Mapping[str, Any],
    other: Place,
    theirs: Mapping[str, Any],
    *,
    images: bool = False,
) -> None:
    """Refuse to compare features that were made with different settings.

    Args:
        path: Some features.
        made: Their provenance.
        other: Other features.
        theirs: Their provenance.
        images: Whether their images must have been made alike, too.

    Raises:
        SpecError: If they differ, with a table of the differences.
    """
    collect = _without_type if images else feature_settings
    rows = differences(collect(made), collect(theirs))
    if rows:
        table = indent(aligned([('setting', path.name, other.name), *rows]), '  ')
        raise SpecError(
            f'{other} and {path} were made with different settings, so that their '
            f'features cannot be compared: embed one of them again.\n{table}'
        )


def _without_type(made: Mapping[str, Any]) -> Settings:
    """Collect the settings of features and images, however features are stored."""
    return {name: v for name, v in settings_of(made).items() if name != 'dtype'}


def _compared_of_backbone(described: Any) -> Any:
    # What a user's own module says of itself is compared as it is.
    if not isinstance(described, Mapping) or 'weights' not in described:
        return described
    compared = {
        k: v for k, v in described.items() if k not in _NOT_COMPARED['backbone']
    }
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


def _with_stage(settings: Settings) -> Settings:
    """Tell the stage of features also where an earlier version did not."""
    if not any(name.startswith('model.backbone.') for name in settings):
        return settings
    stages = settings.get(_OUT_INDICES)
    known = stages[-1] if isinstance(stages, list) and stages else 3
    told = {name: v for name, v in settings.items() if name != _OUT_INDICES}
    return {_STAGE: known, **told}


def _settings_of_earlier_version(described: Mapping[str, Any]) -> dict[str, Any]:
    """Work out the settings of an output whose version recorded the checkpoint's."""
    if 'path_type' not in described:
        return {}
    import torch

    from dynamicvis_geo.models.config import following
    from dynamicvis_geo.models.dynamicvis import DynamicVis

    # On this device no memory is taken.
    with torch.device('meta'):
        return DynamicVis(
            arch=described['arch'],
            img_size=tuple(described['img_size']),
            path_type=described['path_type'],
            mamba2=described['mamba2'],
            shuffle_seed=described.get('shuffle_seed', 0),
            **following(described.get('trained_settings') or {}),
        ).settings


def _image_settings(source: Any) -> Settings:
    """Give the settings of the images, those of all sources together."""
    if not isinstance(source, Mapping):
        return {}
    together: dict[str, list[Any]] = {}
    for one in source.get('sources', [source]):
        for name, value in _flat('images', one):
            if isinstance(value, float):
                # Arithmetic may differ in the last digits from machine to machine.
                value = float(f'{value:.9g}')
            values = together.setdefault(name, [])
            if value not in values:
                values.append(value)
    return {
        name: values[0] if len(values) == 1 else sorted(values, key=str)
        for name, values in together.items()
    }


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Name what mappings in mappings hold, but for what is not compared."""
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, item in value.items():
        if key not in _NOT_COMPARED.get(name, ()):
            yield from _flat(f'{name}.{key}', item)


def _text(value: Any) -> str:
    text = 'not set' if value is None else str(value)
    return text if len(text) <= 60 else f'{text[:57]}...'
