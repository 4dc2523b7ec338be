"""Dataset cards: what a Hugging Face repository of an output says in its README.md."""

from collections.abc import Iterable
from typing import Any

import pandas as pd
from huggingface_hub import DatasetCardData

from dynamicvis_geo import terms
from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.formats import FORMATS
from dynamicvis_geo.formats.zarr_group import group_name
from dynamicvis_geo.outputs import Output, open_output
from dynamicvis_geo.paths import AnyPath, Place, kind_of, output_path
from dynamicvis_geo.provenance import to_json
from dynamicvis_geo.report import tables
from dynamicvis_geo.store import Store

CARD = 'README.md'
#: Tells a card that may be written anew from a README.md of somebody's own.
_MARK = '<!-- Written by dynamicvis-geo card, which may replace it. -->'
#: Sizes that Hugging Face knows: least number of rows, and name.
_SIZES = (
    (0, 'n<1K'),
    (10**3, '1K<n<10K'),
    (10**4, '10K<n<100K'),
    (10**5, '100K<n<1M'),
    (10**6, '1M<n<10M'),
    (10**7, '10M<n<100M'),
    (10**8, '100M<n<1B'),
)
#: Way to what only provenances of DynamicVis have.
_ARCH = ('model', 'backbone', 'arch')
_BIBTEX = """\
@article{chen2025dynamicvis,
  title = {DynamicVis: An Efficient and General Visual Foundation Model for Remote
           Sensing Image Understanding},
  author = {Chen, Keyan and Liu, Chenyang and Chen, Bowen and Li, Wenyuan and
            Zou, Zhengxia and Shi, Zhenwei},
  journal = {arXiv preprint arXiv:2503.16426},
  year = {2025}
}"""


def write_card(
    path: AnyPath,
    output: AnyPath | None = None,
    license: str | None = None,  # noqa: A002 - the word of Hugging Face
    overwrite: bool = False,
) -> Place:
    """Write the dataset card of an output.

    The folder that holds the output, its STAC catalogue and the card is what to upload
    as a repository; ``datasets`` then loads its table.

    Args:
        path: An output of this package; or its URL.
        output: The file to write; ``README.md`` beside the output by default. An
            earlier card is replaced.
        license: Licence of the embeddings, as Hugging Face names it, such as
            'cc-by-4.0'. None has the card say that nobody has named one.
        overwrite: Whether to replace also a file that is no card of this package.

    Returns:
        The card.

    Raises:
        SourceError: If the output cannot be read.
        OutputError: If the card cannot be written, or another file is there.
    """
    opened = open_output(path)
    place = opened.path.resolve().parent / CARD
    if output is not None:
        place = output_path(output, 'output').resolve()
    if kind_of(place) == 'folder':
        raise OutputError(f'{place} is a folder: name a file in it, such as {CARD}')
    store = Store(str(place.parent))
    there = store.read(place.name)
    if there is not None and _MARK.encode() not in there and not overwrite:
        raise OutputError(
            f'{place} exists and was not written by this package: name another file, '
            'or replace it (overwrite=True)'
        )
    store.put(place.name, dataset_card(opened, license).encode())
    return place


def dataset_card(output: Output, license: str | None = None) -> str:  # noqa: A002
    """Write a dataset card as text.

    Args:
        output: The output.
        license: Licence of the embeddings, as Hugging Face names it.

    Returns:
        Markdown with a header of YAML.
    """
    made, name = output.provenance, output.path.name
    failures = output.failures()
    parts = [
        f'---\n{_header(output, license)}\n---',
        _MARK,
        f'# {terms.model_title(made)}: {name}',
        _notice(output),
        terms.description(made),
        '## What is in it',
        _table(tables.overview(output, failures)),
        '## How it was made',
        _table(tables.summary(made)),
        '## How to load it',
        _code('python', _loading(output)),
        f'`{name}.stac` describes it as STAC, for catalogues and browsers.',
        '## Licence and attribution',
        _attribution(output, license),
        '## Citation',
        _code('bibtex', _BIBTEX) if terms.find(made, *_ARCH) else 'Cite the model.',
        '## Provenance',
        '<details>\n<summary>All that the files tell of their making</summary>',
        _code('json', to_json(made, indent=2)),
        '</details>',
    ]
    return '\n\n'.join(part for part in parts if part) + '\n'


def _header(output: Output, license: str | None) -> str:  # noqa: A002
    size = next(name for least, name in reversed(_SIZES) if output.total >= least)
    programmes = [
        name.partition('/')[0].lower() for name in terms.collections(output.provenance)
    ]
    tags = [
        'embeddings',
        'remote-sensing',
        'earth-observation',
        'geospatial',
        'stac',
        *dict.fromkeys(programmes),
    ]
    if terms.find(output.provenance, *_ARCH):
        tags.append('dynamicvis')
    files = _data_files(output)
    more: dict[str, Any] = {}
    if files:
        more['configs'] = [{'config_name': 'default', 'data_files': files}]
    data = DatasetCardData(
        license=license or 'unknown',
        pretty_name=f'{terms.model_title(output.provenance)}: {output.path.name}',
        size_categories=[size],
        task_categories=['image-feature-extraction'],
        tags=tags,
        **more,
    )
    return str(data.to_yaml())


def _data_files(output: Output) -> str | None:
    """Name the table that ``datasets`` is to load, relative to the card."""
    name, path = output.path.name, output.path
    if output.kind == 'pooled':
        folder = kind_of(path) == 'folder'
        return f'{name}/*.parquet' if folder else name
    for table in (f'{name}/chips.parquet', f'{name}.stac/chips.parquet'):
        if kind_of(path.parent / table) == 'file':
            return table
    return None


def _notice(output: Output) -> str:
    if not terms.random_weights(output.provenance):
        return ''
    return (
        '> **Random weights.** These features show that everything works, and mean '
        'nothing.'
    )


def _loading(output: Output) -> str:
    name = output.path.name
    match next((key for key, one in FORMATS.items() if one is output.format), None):
        case 'geoparquet':
            lines = [
                'import geopandas',
                f'table = geopandas.read_parquet({name!r})',
                "table[['id', 'embedding', 'geometry']]",
            ]
            if output.provenance.get('data_type') == 'int8':
                lines.append("table['embedding'] * table['scale']  # stored as int8")
        case 'geotiff':
            lines = [
                'from dynamicvis_geo import FeatureMaps',
                f'maps = FeatureMaps({name!r})  # a TorchGeo RasterDataset',
                'maps[maps.bounds]',
            ]
        case 'zarr' if output.total:
            group = group_name(str(output.chips['crs'].iloc[0]))
            lines = [
                'import xarray',
                f'mosaic = xarray.open_zarr({name!r}, group={group!r})',
                "mosaic['embeddings']",
            ]
        case _:
            lines = [
                'from dynamicvis_geo.outputs import open_output',
                f'output = open_output({name!r})',
                'output.chips',
            ]
    return '\n'.join(lines)


def _attribution(output: Output, license: str | None) -> str:  # noqa: A002
    collections = terms.collections(output.provenance)
    lines = [
        f'The embeddings: {license}.'
        if license
        else 'The embeddings: no licence was named.',
    ]
    if any(name.startswith('COPERNICUS/S') for name in collections):
        lines.append(f'Contains modified Copernicus Sentinel data{_years(output)}.')
    links = [f'[{name}]({terms.collection_url(name)})' for name in collections]
    if links:
        lines.append(
            f'The images came through Google Earth Engine: {", ".join(links)}.'
        )
    else:
        lines.append(
            f'Made of {terms.images(output.provenance)}: name their source and its '
            'licence here before you publish this.'
        )
    url = terms.model_url(output.provenance)
    if url:
        lines.append(f'The model: [{terms.model_name(output.provenance)}]({url}).')
    return '\n'.join(f'- {line}' for line in lines)


def _years(output: Output) -> str:
    times = pd.concat([output.chips[name] for name in ('start', 'end')]).dropna()
    years = sorted(set(times.dt.year))
    if not years:
        return ''
    return f' {years[0]}' if len(years) == 1 else f' {years[0]}-{years[-1]}'


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = [
        f'| {name} | {value} |'
        for name, value in (
            (name, value.replace('|', '\\|').replace('\n', ' ')) for name, value in rows
        )
    ]
    return '\n'.join(['| | |', '|---|---|', *lines]) if lines else ''


def _code(language: str, text: str) -> str:
    return f'```{language}\n{text}\n```'
