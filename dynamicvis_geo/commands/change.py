"""``dynamicvis-geo change``: what has changed between two dates.

Compare the embeddings of each place at two dates, or of each cell of feature maps. Its
distance is one minus the cosine of both; its change says how far that stands out from
the other places, most of which are taken not to have changed: what is common to all,
such as the season, is taken off first. That is an order in which to look at places, not
a test of significance.
"""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamicvis_geo.commands.options import (
    add_bands,
    add_examples,
    add_overwrite,
    images,
    local_output_path,
    positive,
    source,
)
from dynamicvis_geo.commands.writing import FIGURES, write_file
from dynamicvis_geo.errors import OutputError, SpecError
from dynamicvis_geo.paths import Place, check_picture_path

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from dynamicvis_geo.change import Change

_FILES = ('.parquet', '.geoparquet', '.csv', '.tif', '.tiff')


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        'first',
        type=source,
        metavar='A',
        help='pooled embeddings or feature maps (GeoTIFFs or Zarr) of the earlier '
        'date, or of both',
    )
    parser.add_argument(
        'second',
        type=source,
        nargs='?',
        metavar='B',
        help='those of the later date, made with the same settings; not needed if A '
        'has two time windows',
    )
    for name, what in (('before', 'earlier'), ('after', 'later')):
        parser.add_argument(
            f'--{name}',
            metavar='START/END',
            help=f'the {what} time window, where there are several: chips are taken '
            'whose own windows lie within',
        )
    parser.add_argument(
        '-k',
        '--k',
        type=positive,
        default=20,
        metavar='N',
        help='how many places are printed or drawn, those that changed most (default: '
        '20)',
    )
    parser.add_argument(
        '--output',
        type=local_output_path,
        metavar='PATH',
        help='all places, as .parquet (GeoParquet) or .csv; of feature maps also as '
        '.tif, or a folder of GeoTIFFs; without it a table of the first is printed',
    )
    parser.add_argument(
        '--map',
        type=local_output_path,
        metavar='FILE',
        help='draw the scores on a map: a file that ends in .png, .pdf or .svg',
    )
    parser.add_argument(
        '--sheet',
        type=local_output_path,
        metavar='FILE',
        help='draw the places that changed most at both dates, likewise; with --images '
        'as images, else as places',
    )
    parser.add_argument(
        '--images',
        type=_images,
        metavar='BEFORE[,AFTER]',
        help='where the images of the chips are: the GeoTIFF or the folder that was '
        'embedded, or the cache of chips; one for both dates or two',
    )
    add_bands(parser, 'those that were embedded, if the input says so, else 1,2,3')
    add_overwrite(parser, 'files')
    add_examples(
        parser,
        'dynamicvis-geo change plots-2022.parquet plots-2023.parquet',
        'dynamicvis-geo change plots-2022.parquet plots-2023.parquet --output '
        'change.parquet --map change.png --sheet top.png --images chips',
        'dynamicvis-geo change years.parquet --before 2018-06-01/2018-09-01 --after '
        '2024-06-01/2024-09-01 --k 50',
        'dynamicvis-geo change maps-2022 maps-2023 --output change.tif',
    )


def run(arguments: Namespace) -> None:
    """Compare, write what was asked for, and say what was found."""
    from dynamicvis_geo.change import find_change

    _check_paths(arguments)
    change = find_change(
        arguments.first,
        arguments.second,
        before=arguments.before,
        after=arguments.after,
    )
    output = arguments.output
    if output is None:
        print(_text(change.top(arguments.k)))
    else:
        _write(output, '--output', change.write)
    if arguments.map is not None:
        from dynamicvis_geo.plotting import plot_change_map

        _write(arguments.map, '--map', _saver(plot_change_map(change)))
    if arguments.sheet is not None:
        _write(arguments.sheet, '--sheet', _saver(_sheet(arguments, change)))
    print(change.summary())


def _check_paths(arguments: Namespace) -> None:
    given = [arguments.first, arguments.second or arguments.first]
    written: dict[Path, str] = {}
    for path, suffixes, option in (
        (arguments.output, _FILES, '--output'),
        (arguments.map, FIGURES, '--map'),
        (arguments.sheet, FIGURES, '--sheet'),
    ):
        if path is None:
            continue
        if other := written.get(path.resolve()):
            raise OutputError(f'{other} and {option} are both {path}: name two files')
        written[path.resolve()] = option
        if option == '--output' and (path.is_dir() or not path.suffix):
            _check_folder(path, arguments.overwrite, given)
            continue
        for one in given:
            check_picture_path(path, suffixes, arguments.overwrite, one, option)
    if arguments.images is not None and arguments.sheet is None:
        raise SpecError('--images are drawn on a sheet: give --sheet FILE, too')


def _check_folder(path: Path, overwrite: bool, inputs: Sequence[Place]) -> None:
    from dynamicvis_geo.provenance import refuse_others

    target = path.resolve()
    for one in inputs:
        if isinstance(one, Path) and (
            target.is_relative_to(one.resolve()) or target == one.resolve().parent
        ):
            raise OutputError(
                f'--output {path} is where the input {one} is: choose another folder'
            )
    if path.is_file():
        raise OutputError(f'--output {path} is a file: give a folder, or add .parquet')
    there = sorted(path.glob('*')) if path.is_dir() else []
    if there and not overwrite:
        raise OutputError(f'{path} is not empty: give --overwrite to replace its files')
    refuse_others(there)


def _text(table: pd.DataFrame) -> str:
    """Write a table of places, a line each."""
    names = ['change', 'distance', 'valid_fraction', 'lon', 'lat']
    names += ['cell_row', 'cell_column', 'point_id' if 'point_id' in table else 'id']
    forms: dict[str, Callable[[Any], str]] = {
        'change': '{:.2f}'.format,
        'distance': '{:.4f}'.format,
        'valid_fraction': '{:.2f}'.format,
        'lon': '{:.6f}'.format,
        'lat': '{:.6f}'.format,
    }
    shown = table[[name for name in names if name in table]]
    return shown.to_string(index=False, formatters=forms, max_colwidth=None)


def _sheet(arguments: Namespace, change: Change) -> Figure:
    from dynamicvis_geo.outputs import recorded_bands
    from dynamicvis_geo.plotting import plot_change_sheet
    from dynamicvis_geo.quicklooks import Quicklooks

    if arguments.images is None:
        return plot_change_sheet(change, arguments.k)
    looks = []
    for path, made in zip(arguments.images, change.made, strict=True):
        looks.append(Quicklooks(path, arguments.bands or recorded_bands(dict(made))))
    same = arguments.images[0] == arguments.images[1]
    if same and not looks[0].cached and change.chips['start'].isna().any():
        raise SpecError(
            f'--images {arguments.images[0]}: {arguments.first} does not tell dates, '
            'so that images of both dates cannot be told apart: give BEFORE,AFTER'
        )
    return plot_change_sheet(change, arguments.k, *looks)


def _images(text: str) -> tuple[Any, Any]:
    """Read one path for both dates, or two."""
    parts = text.split(',')
    if Path(text).exists() or len(parts) == 1:
        parts = [text, text]
    if len(parts) != 2:
        raise ArgumentTypeError(
            f'{text!r} must be one path, or two with a comma between them'
        )
    return images(parts[0]), images(parts[1])


def _saver(figure: Figure) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        figure.savefig(path, dpi=150)

    return save


def _write(path: Path, option: str, write: Callable[[Path], None]) -> None:
    write_file(path, write, option)
    print(f'Wrote {path}.')
