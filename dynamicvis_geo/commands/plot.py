"""``dynamicvis-geo plot``: pictures of images, feature maps and embeddings."""

from argparse import Namespace
from pathlib import Path, PurePath
from typing import Any

from matplotlib.figure import Figure

from dynamicvis_geo.datasets.scene_files import find_images
from dynamicvis_geo.errors import OutputError, SourceError, SpecError
from dynamicvis_geo.false_colour import (
    fit_file_colours,
    plot_false_colours,
    write_false_colour,
    write_false_colours,
)
from dynamicvis_geo.paths import Place
from dynamicvis_geo.plotting import (
    nearest_neighbours,
    plot_embedding_map,
    plot_neighbours,
    plot_rgb,
    plot_sheet,
    stretch_limits,
    stretch_rgb,
)
from dynamicvis_geo.plotting.features import chip_label
from dynamicvis_geo.quicklooks import (
    Quicklooks,
    cached_chips,
    read_image,
)
from dynamicvis_geo.runs import (
    Run,
    check_picture_path,
    feature_map_files,
    find_chip,
    open_run,
    read_embeddings,
    recorded_bands,
    spread,
)

FIGURES = ('.png', '.pdf', '.svg')
_SHEET = 24


def run(arguments: Namespace) -> None:
    """Draw a picture and print what was written."""
    {'rgb': _rgb, 'pca': _pca, 'neighbours': _neighbours, 'map': _map}[arguments.kind](
        arguments
    )


def _rgb(arguments: Namespace) -> None:
    source, bands = arguments.input, arguments.bands or (1, 2, 3)
    check_picture_path(arguments.output, FIGURES, arguments.overwrite, source)
    cached = cached_chips(source)
    if arguments.chip is not None:
        if arguments.chip not in cached:
            some = f', such as {next(iter(cached))}' if cached else ''
            raise SpecError(
                f'--chip {arguments.chip}: {source} is a cache of {len(cached)} chips'
                f'{some}, but not of this one: name one that it holds'
            )
        files = [str(cached[arguments.chip])]
    else:
        files = list(map(str, cached.values())) or find_images(source)
    if len(files) == 1:
        name = arguments.chip or PurePath(files[0]).name
        _save(plot_rgb(read_image(files[0], bands), name), arguments.output)
        return
    names = list(cached) or [PurePath(file).stem for file in files]
    chosen = spread(len(files), _SHEET)
    images = [read_image(files[i], bands, pixels=256) for i in chosen]
    limits = stretch_limits(images)
    figure = plot_sheet(
        [stretch_rgb(image, limits=limits) for image in images],
        [chip_label(names[i]) for i in chosen],
        f'{len(chosen)} of {len(files)} images of {PurePath(str(source)).name}',
    )
    _save(figure, arguments.output)


def _pca(arguments: Namespace) -> None:
    source, output = arguments.input, arguments.output
    if output.suffix.lower() in FIGURES or output.name.lower() in FIGURES:
        check_picture_path(output, FIGURES, arguments.overwrite, source)
        _save(plot_false_colours(_open(source, 'grid')), output)
        return
    files = feature_map_files(source)
    if output.suffix.lower() in ('.tif', '.tiff'):
        check_picture_path(output, ('.tif', '.tiff'), arguments.overwrite, source)
        if source.is_dir():
            raise OutputError(
                f'--output {output} is one file for the {len(files)} maps of {source}: '
                'give a folder, or one map as the input'
            )
        write_false_colour(source, output, fit_file_colours(files))
        print(f'Wrote {output}.')
        return
    if output.suffix and not output.is_dir():
        raise OutputError(
            f'--output {output}: {output.suffix} is unknown: give a name that ends in '
            '.png, .pdf, .svg or .tif, or a folder'
        )
    if output.is_file():
        raise OutputError(f'--output {output} is a file: give a folder')
    if output.is_dir() and any(output.iterdir()) and not arguments.overwrite:
        raise OutputError(
            f'{output} is not empty: give --overwrite to replace files of the same name'
        )
    write_false_colours(files, output)
    print(f'Wrote {output}: {len(files)} GeoTIFFs.')


def _neighbours(arguments: Namespace) -> None:
    check_picture_path(arguments.output, FIGURES, arguments.overwrite, arguments.input)
    embedded = _open(arguments.input, 'pooled')
    chips = embedded.chips
    query = find_chip(chips, arguments.chip)
    embeddings = read_embeddings(embedded.path)
    images = None
    if arguments.images is not None:
        bands = arguments.bands or recorded_bands(embedded.provenance)
        quicklooks = Quicklooks(arguments.images, bands)

        def images(row: int) -> Any:
            return quicklooks(chips.iloc[row])

    ids = chips['id'].astype(str).tolist()
    figure = plot_neighbours(
        embeddings,
        ids,
        query,
        arguments.k,
        images=images,
        lonlat=(chips['centre_lon'].to_numpy(), chips['centre_lat'].to_numpy()),
    )
    _save(figure, arguments.output)
    print('similarity  chip')
    for row, similarity in zip(
        *nearest_neighbours(embeddings, query, arguments.k), strict=True
    ):
        print(f'{similarity:10.4f}  {ids[row]}')


def _map(arguments: Namespace) -> None:
    check_picture_path(arguments.output, FIGURES, arguments.overwrite, arguments.input)
    embedded = _open(arguments.input, 'pooled')
    figure = plot_embedding_map(
        read_embeddings(embedded.path),
        embedded.chips.geometry.to_numpy(),
        arguments.method,
        f'{embedded.path.name}: {embedded.total} chips',
    )
    _save(figure, arguments.output)


def _open(path: Place, kind: str) -> Run:
    found = open_run(path)
    if found.kind != kind:
        wanted = {
            'pooled': 'a .parquet file of pooled embeddings, which embed writes '
            'without --grid',
            'grid': 'a folder of feature maps, which embed --grid writes',
        }[kind]
        raise SourceError(f'{path} holds {found.kind} features: give {wanted}')
    if not found.total:
        raise SourceError(
            f'{path} holds no chips, so there is nothing to draw: give another output'
        )
    return found


def _save(figure: Figure, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise OutputError(
            f'cannot write {path}: {error}; choose another --output'
        ) from error
    print(f'Wrote {path}.')
