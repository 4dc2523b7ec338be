"""``dynamicvis-geo plot``: pictures of images, feature maps and embeddings.

Draw what the other commands wrote. Each kind of picture has its own help:
dynamicvis-geo plot KIND --help.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from dynamicvis_geo.commands.options import (
    Commands,
    add_bands,
    add_class_colors,
    add_command,
    add_examples,
    add_images,
    add_input,
    add_overwrite,
    images,
    local_output_path,
    positive,
    read_colors,
    source,
)
from dynamicvis_geo.commands.writing import FIGURES, write_file
from dynamicvis_geo.errors import OutputError, SourceError, SpecError
from dynamicvis_geo.paths import Place, check_picture_path, kind_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynamicvis_geo.outputs import Output

_FIGURE = 'file that ends in .png, .pdf or .svg'
_SHEET = 24


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    kinds = parser.add_subparsers(dest='kind', required=True, metavar='KIND')
    _add_rgb(kinds)
    _add_pca(kinds)
    _add_neighbours(kinds)
    _add_map(kinds)
    _add_classes(kinds)


def _add_rgb(kinds: Commands) -> None:
    parser = add_command(
        kinds, 'rgb', 'an image, or a contact sheet of several', _rgb.__doc__
    )
    parser.add_argument(
        'input',
        type=images,
        metavar='INPUT',
        help='a GeoTIFF, a folder of them, or a cache of chips',
    )
    _add_output(parser, _FIGURE)
    parser.add_argument(
        '--chip', metavar='ID', help='a chip of a cache, instead of a contact sheet'
    )
    add_bands(parser, 'those that were embedded, if the input says so, else 1,2,3')
    add_examples(
        parser,
        'dynamicvis-geo plot rgb scene.tif --bands 4,3,2 --output scene.png',
        'dynamicvis-geo plot rgb chips --output chips.png',
    )


def _add_pca(kinds: Commands) -> None:
    parser = add_command(kinds, 'pca', 'feature maps in false colour', _pca.__doc__)
    add_input(parser, 'a folder of feature maps (embed --grid), or one of them')
    _add_output(
        parser,
        f'{_FIGURE}; or .tif for one map, or a folder for all: georeferenced GeoTIFFs, '
        'RGB of uint8',
    )
    add_examples(
        parser,
        'dynamicvis-geo plot pca maps --output maps.png',
        'dynamicvis-geo plot pca maps --output maps-in-colour',
    )


def _add_neighbours(kinds: Commands) -> None:
    parser = add_command(
        kinds, 'neighbours', 'a chip and those most similar to it', _neighbours.__doc__
    )
    add_input(parser, 'a .parquet file of pooled embeddings')
    _add_output(parser, _FIGURE)
    parser.add_argument(
        '--chip',
        required=True,
        metavar='ID',
        help='id of the chip, id of its point, or number of its row from 0',
    )
    parser.add_argument(
        '-k',
        type=positive,
        default=9,
        metavar='N',
        help='how many neighbours (default: 9)',
    )
    add_images(parser)
    add_examples(
        parser,
        'dynamicvis-geo plot neighbours embeddings.parquet --chip 0 --images scene.tif '
        '--output neighbours.png',
        'dynamicvis-geo plot neighbours plots.parquet --chip plot-17 --images chips '
        '--output neighbours.png',
    )


def _add_map(kinds: Commands) -> None:
    parser = add_command(
        kinds, 'map', 'a map of embeddings, or of a column', _map.__doc__
    )
    add_input(
        parser,
        'a .parquet file of pooled embeddings; with --color any table of places: what '
        'similar, change or probe wrote, a CSV with lon and lat, or a vector file',
    )
    _add_output(parser, _FIGURE)
    parser.add_argument(
        '--method',
        choices=('auto', 'pca', 'umap'),
        help='how embeddings become colours: main components, or UMAP (which needs '
        "pip install 'dynamicvis-geo[umap]' and takes minutes for many chips); auto is "
        'UMAP where it is installed, for 16 to 20,000 chips (default: auto)',
    )
    parser.add_argument(
        '--color',
        metavar='COLUMN',
        help='draw a column instead: classes with a legend, numbers with a colour bar',
    )
    parser.add_argument(
        '--labels',
        type=source,
        metavar='FILE',
        help='CSV, Parquet or any vector file that has the column, joined to the chips '
        'of embeddings by id or place, as probe does',
    )
    add_class_colors(parser)
    add_examples(
        parser,
        'dynamicvis-geo plot map embeddings.parquet --output map.png',
        'dynamicvis-geo plot map embeddings.parquet --color cover --labels plots.csv '
        '--output cover.png',
        'dynamicvis-geo plot map probe-output/predictions.parquet --color correct '
        '--output correct.png',
    )


def _add_classes(kinds: Commands) -> None:
    parser = add_command(
        kinds, 'classes', 'maps of a probe, with a legend', _classes.__doc__
    )
    add_input(parser, 'a folder of maps that predict-map wrote, or one of them')
    _add_output(parser, _FIGURE)
    add_class_colors(parser)
    add_examples(
        parser,
        'dynamicvis-geo plot classes classes --output classes.png',
        'dynamicvis-geo plot classes classes --class-colors colors.csv '
        '--output classes.pdf',
    )


def _add_output(parser: ArgumentParser, what: str) -> None:
    parser.add_argument(
        '--output', type=local_output_path, required=True, metavar='FILE', help=what
    )
    add_overwrite(parser)


def run(arguments: Namespace) -> None:
    """Draw a picture and print what was written."""
    kinds = {
        'rgb': _rgb,
        'pca': _pca,
        'neighbours': _neighbours,
        'map': _map,
        'classes': _classes,
    }
    kinds[arguments.kind](arguments)


def _rgb(arguments: Namespace) -> None:
    """Draw a GeoTIFF, a chip of a cache, or a contact sheet of a folder or cache.

    All bands have one stretch, from the 2nd to the 98th percentile of their values.
    Of a sheet, images of one place at several dates stand side by side.
    """
    from dynamicvis_geo.datasets.scene_files import find_images
    from dynamicvis_geo.mosaics import side_by_side
    from dynamicvis_geo.plotting import (
        plot_rgb,
        plot_sheet,
        stretch_limits,
        stretch_rgb,
    )
    from dynamicvis_geo.plotting.features import chip_label
    from dynamicvis_geo.plotting.marks import mark_ground
    from dynamicvis_geo.quicklooks import cached_chips, georeference, read_image

    source, bands = arguments.input, arguments.bands or (1, 2, 3)
    check_picture_path(arguments.output, FIGURES, arguments.overwrite, source)
    cached = cached_chips(source)
    if arguments.chip is not None:
        if arguments.chip not in cached:
            raise SpecError(
                f'--chip {arguments.chip}: {source} is a cache of {len(cached)} chips, '
                f'such as {next(iter(cached))}, but not of this one: name one that it '
                'holds'
                if cached
                else f'--chip {arguments.chip}: {source} is no cache of chips: leave '
                '--chip out'
            )
        files = [str(cached[arguments.chip])]
    else:
        files = list(map(str, cached.values())) or find_images(source)
    if len(files) == 1:
        name = arguments.chip or PurePath(files[0]).name
        figure = plot_rgb(read_image(files[0], bands), name)
        place = georeference(files[0])
        if place is not None:
            mark_ground(figure.axes[0], *place)
        _save(figure, arguments.output, {})
        return
    names = list(cached) or [PurePath(file).stem for file in files]
    chosen, columns = side_by_side(names, _SHEET)
    images = [read_image(files[i], bands, pixels=256) for i in chosen]
    limits = stretch_limits(images)
    folder = PurePath(str(source)).name or Path.cwd().name
    figure = plot_sheet(
        [stretch_rgb(image, limits=limits) for image in images],
        [chip_label(names[i]) for i in chosen],
        f'{len(chosen)} of {len(files)} images of {folder}',
        columns,
    )
    _save(figure, arguments.output, {})


def _pca(arguments: Namespace) -> None:
    """Show the three main components of feature maps as red, green and blue.

    One PCA is fitted to all maps, so that colours can be compared. Maps that cover
    an area are put together, dates side by side; others become a contact sheet.
    """
    from dynamicvis_geo.false_colour import (
        fit_file_colours,
        plot_false_colours,
        write_false_colour,
        write_false_colours,
    )
    from dynamicvis_geo.formats.geotiff import feature_map_files

    source, output = arguments.input, arguments.output
    if output.suffix.lower() in FIGURES or output.name.lower() in FIGURES:
        check_picture_path(output, FIGURES, arguments.overwrite, source)
        opened = _open(source, 'grid')
        _save(plot_false_colours(opened), output, opened.provenance)
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
    """Draw a chip and its nearest neighbours.

    They are found by cosine similarity of pooled embeddings, and drawn as their images
    if --images has them, else as their places.
    """
    from dynamicvis_geo.outputs import find_chip, recorded_bands
    from dynamicvis_geo.plotting import nearest_neighbours, plot_neighbours
    from dynamicvis_geo.plotting.features import chip_names
    from dynamicvis_geo.quicklooks import Quicklooks

    check_picture_path(arguments.output, FIGURES, arguments.overwrite, arguments.input)
    embedded = _open(arguments.input, 'pooled')
    chips = embedded.chips
    query = find_chip(chips, arguments.chip)
    embeddings = embedded.embeddings()
    images = None
    if arguments.images is not None:
        bands = arguments.bands or recorded_bands(embedded.provenance)
        quicklooks = Quicklooks(arguments.images, bands)

        def images(row: int) -> Any:
            return quicklooks(chips.iloc[row])

    ids = chips['id'].astype(str).tolist()
    figure = plot_neighbours(
        embeddings,
        chip_names(chips),
        query,
        arguments.k,
        images=images,
        lonlat=(chips['centre_lon'].to_numpy(), chips['centre_lat'].to_numpy()),
    )
    _save(figure, arguments.output, embedded.provenance)
    print('similarity  chip')
    for row, similarity in zip(
        *nearest_neighbours(embeddings, query, arguments.k), strict=True
    ):
        print(f'{similarity:10.4f}  {ids[row]}')


def _map(arguments: Namespace) -> None:
    """Draw pooled embeddings over their footprints, similar ones in similar colours.

    With --color, draw a column instead. Where places have several dates, each date is a
    panel; colours mean the same in all.
    """
    from dynamicvis_geo.map_tables import (
        FROM_FEATURES,
        has_embeddings,
        of_output,
        open_map_table,
    )
    from dynamicvis_geo.plotting.maps import (
        date_panels,
        panel_names,
        plot_column_map,
        plot_embedding_map,
    )

    source, column = arguments.input, arguments.color
    _check_map_options(arguments)
    check_picture_path(arguments.output, FIGURES, arguments.overwrite, source)
    if column is None and kind_of(source) == 'file' and not has_embeddings(source):
        raise SpecError(
            f'{source} has no embeddings: name the column to draw, --color COLUMN'
        )
    embedded = _open(source, 'pooled') if column is None else None
    opened = open_map_table(source) if embedded is None else of_output(embedded)
    panels = date_panels(opened.table)
    drawn: dict[str, Any] = {
        'footprints': opened.table.geometry.to_numpy(),
        'failures': opened.failures.geometry.to_numpy(),
        'title': f'{PurePath(str(source)).name}: {len(opened.table):,} rows',
    }
    if panels is not None:
        drawn |= {'panels': panels, 'failure_panels': panel_names(opened.failures)}
    if embedded is not None:
        vectors = embedded.embeddings()
        figure = plot_embedding_map(vectors, method=arguments.method or 'auto', **drawn)
    else:
        if arguments.labels is None:
            values = opened.column(column)
        else:
            values, words = opened.labels(arguments.labels, column)
            print(f'{words}.')
        figure = plot_column_map(values, class_colours=read_colors(arguments), **drawn)
    # Labels, splits and dates owe nothing to the weights.
    featured = embedded is not None or (
        arguments.labels is None and column in FROM_FEATURES
    )
    _save(figure, arguments.output, opened.provenance if featured else {})


def _check_map_options(arguments: Namespace) -> None:
    given = {'--labels': arguments.labels, '--class-colors': arguments.class_colors}
    for option, value in given.items():
        if value is not None and arguments.color is None:
            raise SpecError(f'{option} {value} needs --color COLUMN: name the column')
    if arguments.method is not None and arguments.color is not None:
        raise SpecError(
            f'--method {arguments.method} is of the colours of embeddings: leave it '
            'out with --color'
        )


def _classes(arguments: Namespace) -> None:
    """Draw the maps of a probe as mosaics, a panel each CRS and time window.

    The legend tells the shares of the area. A regression has a colour bar, and
    multilabel a panel each class.
    """
    from dynamicvis_geo.evaluation.class_pictures import plot_class_maps

    check_picture_path(arguments.output, FIGURES, arguments.overwrite, arguments.input)
    figure, shares = plot_class_maps(arguments.input, read_colors(arguments))
    _save(figure, arguments.output, {})
    for i, panel in enumerate(shares.columns if len(shares) else ()):
        print(f'share of the area  class ({panel})')
        for name, share in shares.iloc[:, i].items():
            print(f'{100 * share:15.2f} %  {name}')


def _open(path: Place, kind: str) -> Output:
    from dynamicvis_geo.outputs import open_output

    found = open_output(path)
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


def _save(figure: Figure, path: Path, provenance: Mapping[str, Any]) -> None:
    from dynamicvis_geo.plotting.marks import mark_random_weights

    mark_random_weights(figure, provenance)
    write_file(path, lambda file: figure.savefig(file, dpi=150))
    print(f'Wrote {path}.')
