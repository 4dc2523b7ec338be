"""``dynamicvis-geo similar``: the places that are most like examples.

Find the chips of pooled embeddings, or the cells of feature maps, that are most similar
to examples: by the mean of the cosines with them, less the mean of the cosines with
counter-examples, if there are some. All are looked at, so that what is found is exact;
equals are in the order of their rows. Examples are left out of what is found.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from dynamicvis_geo.commands.options import (
    add_examples,
    add_images,
    add_overwrite,
    local_output_path,
    positive,
    source,
)
from dynamicvis_geo.commands.writing import FIGURES, write_file
from dynamicvis_geo.paths import check_picture_path

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from dynamicvis_geo.similarity import Similar

_TABLES = ('.parquet', '.geoparquet', '.csv')


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        'embeddings',
        type=source,
        nargs='+',
        metavar='EMBEDDINGS',
        help='files of pooled embeddings, or feature maps (GeoTIFFs or Zarr), all made '
        'with the same settings',
    )
    what = (
        'the id of a chip or of its point, the place of one, the number of its row '
        'from 0, or a file: embeddings made with the same settings, or points in a CSV '
        'or vector file; can be repeated'
    )
    parser.add_argument(
        '--like',
        action='append',
        required=True,
        metavar='ID|LON,LAT|FILE',
        help=f'an example: {what}',
    )
    parser.add_argument(
        '--unlike',
        action='append',
        metavar='ID|LON,LAT|FILE',
        help='a counter-example, likewise; can be repeated',
    )
    parser.add_argument(
        '-k',
        '--k',
        type=positive,
        default=50,
        metavar='N',
        help='how many to find (default: 50)',
    )
    parser.add_argument(
        '--keep-examples',
        action='store_true',
        help='let examples be found, too',
    )
    parser.add_argument(
        '--output',
        type=local_output_path,
        metavar='FILE',
        help='file that ends in .parquet (GeoParquet, with the embeddings) or .csv; '
        'without it a table is printed',
    )
    parser.add_argument(
        '--sheet',
        type=local_output_path,
        metavar='FILE',
        help='draw what was found, behind the examples: a file that ends in .png, .pdf '
        'or .svg; with --images as images, else as places',
    )
    add_images(parser)
    add_overwrite(parser, 'files')
    add_examples(
        parser,
        'dynamicvis-geo similar plots.parquet --like plot-17 --k 20',
        'dynamicvis-geo similar region.parquet --like 11.36,47.27 --like 11.52,47.31 '
        '--unlike 11.40,47.10 --output found.parquet',
        'dynamicvis-geo similar 2022.parquet 2023.parquet --like=-58.4,-34.6 --sheet '
        'found.png --images chips',
        'dynamicvis-geo similar maps.zarr --like examples.csv --output found.csv',
    )


def run(arguments: Namespace) -> None:
    """Search, and write or print what was found."""
    from dynamicvis_geo.similarity import find_similar

    for path, suffixes, option in (
        (arguments.output, _TABLES, '--output'),
        (arguments.sheet, FIGURES, '--sheet'),
    ):
        for given in arguments.embeddings if path is not None else ():
            check_picture_path(path, suffixes, arguments.overwrite, given, option)
    found = find_similar(
        arguments.embeddings,
        arguments.like,
        arguments.unlike,
        arguments.k,
        keep_examples=arguments.keep_examples,
    )
    if arguments.output is None:
        print(_text(found.table))
    else:
        write_file(arguments.output, found.write)
        kind = 'cells' if 'cell_row' in found.table else 'chips'
        print(f'Wrote {arguments.output}: {len(found.table)} {kind}.')
    if arguments.sheet is not None:
        write_file(arguments.sheet, _sheet(arguments, found).savefig, '--sheet')
        print(f'Wrote {arguments.sheet}.')


def _text(table: pd.DataFrame) -> str:
    """Write a table of what was found, a line each."""
    columns = ['similarity', 'lon', 'lat', 'cell_row', 'cell_column', 'point_id', 'id']
    if table['file'].nunique() > 1:
        columns.append('file')
    shown = table[[name for name in columns if name in table]]
    # Cosines of one model may all be near 1: as many digits as float32 has.
    forms = dict.fromkeys(('similarity', 'lon', 'lat'), '{:.6f}'.format)
    return shown.to_string(index=False, formatters=forms, max_colwidth=None)


def _sheet(arguments: Namespace, found: Similar) -> Figure:
    from dynamicvis_geo.outputs import recorded_bands
    from dynamicvis_geo.plotting import plot_similar
    from dynamicvis_geo.quicklooks import Quicklooks

    if arguments.images is None:
        return plot_similar(found)
    bands = arguments.bands or recorded_bands(dict(found.provenance))
    return plot_similar(found, Quicklooks(arguments.images, bands))
