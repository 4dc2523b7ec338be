"""What of a run decides its embeddings, and how two runs differ."""

from collections.abc import Iterator, Mapping
from typing import Any

from dynamicvis_geo.models.identity import differing, identity
from dynamicvis_geo.provenance import jsonable

#: What a source says of the places and times that were asked for. They may differ from
#: run to run: more plots, another region, one more month end up in the same output.
_PLACES = frozenset({'crs', 'roi', 'time', 'windows', 'files', 'points', 'chips'})

Settings = dict[str, Any]


def settings_of(provenance: Mapping[str, Any], dtype: str | None = None) -> Settings:
    """Return what must be equal in all runs that write one output.

    Args:
        provenance: What made an output, as ``run_provenance`` gives it.
        dtype: Type in which embeddings are stored; that of the provenance by default.

    Returns:
        Names, with dots between their parts, and values: all that is told of the model,
        the preprocessing and the pooling, the precision, the type, and of the images
        all but their places and times.
    """
    plain = jsonable(provenance)
    settings = identity(plain)
    settings |= _source_settings(plain.get('source', {}))
    settings['dtype'] = dtype or plain.get('data_type')
    return settings


def differences(old: Settings, new: Settings) -> list[tuple[str, str, str]]:
    """Return name, old value and new value of each setting that differs."""
    return [
        (name, _text(old.get(name)), _text(new.get(name)))
        for name in sorted(differing(old, new))
    ]


def table(rows: list[tuple[str, str, str]], titles: tuple[str, str, str]) -> str:
    """Return rows as text in aligned columns."""
    cells = [titles, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(2)]
    return '\n'.join(
        f'  {name:<{widths[0]}}  {old:<{widths[1]}}  {new}'.rstrip()
        for name, old, new in cells
    )


def _source_settings(source: Any) -> Settings:
    """Return the settings of the images, those of all sources together."""
    if not isinstance(source, Mapping):
        return {}
    sources = source.get('sources', [source])
    together: dict[str, list[Any]] = {}
    for one in sources:
        for name, value in _flatten('images', one):
            values = together.setdefault(name, [])
            if value not in values:
                values.append(value)
    return {
        name: values[0] if len(values) == 1 else sorted(values, key=str)
        for name, values in together.items()
    }


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, float):
        # Statistics of weights may differ in their last digits from machine to machine.
        value = float(f'{value:.9g}')
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    for key, item in value.items():
        if prefix == 'images' and key in _PLACES:
            continue
        if prefix == 'images.sampler' and key in _PLACES:
            continue
        yield from _flatten(f'{prefix}.{key}', item)


def _text(value: Any) -> str:
    text = 'not set' if value is None else str(value)
    return text if len(text) <= 60 else f'{text[:57]}...'
