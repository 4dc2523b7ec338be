"""Arguments of the commands that show what a run wrote."""

import argparse
import textwrap

from dynamicvis_geo.arguments.common import (
    Commands,
    bands,
    command,
    images,
    local_output_path,
    positive,
    source,
)

_FIGURE = 'file that ends in .png, .pdf or .svg'


def add_commands(commands: Commands) -> None:
    """Add plot and report."""
    _add_plot(commands)
    _add_report(commands)


def _add_plot(commands: Commands) -> None:
    parser = command(
        commands,
        'plot',
        'draw images, feature maps and embeddings',
        'Draw what the other commands wrote. Each kind of picture has its own help: '
        'dynamicvis-geo plot KIND --help.',
    )
    kinds = parser.add_subparsers(dest='kind', required=True, metavar='KIND')
    _add_rgb(kinds)
    _add_pca(kinds)
    _add_neighbours(kinds)
    _add_map(kinds)


def _add_rgb(kinds: Commands) -> None:
    parser = command(
        kinds,
        'rgb',
        'an image, or a contact sheet of several',
        'Draw a GeoTIFF, a chip of a cache, or a contact sheet of a folder or of a '
        'cache. All bands have one stretch, from the 2nd to the 98th percentile of '
        'their values.',
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
    _add_bands(parser)
    _examples(
        parser,
        'dynamicvis-geo plot rgb scene.tif --bands 4,3,2 --output scene.png',
        'dynamicvis-geo plot rgb chips --output chips.png',
    )


def _add_pca(kinds: Commands) -> None:
    parser = command(
        kinds,
        'pca',
        'feature maps in false colour',
        'Show the three main components of feature maps as red, green and blue. One '
        'PCA is fitted to all maps, so that colours can be compared. Maps that cover '
        'an area are put together, others become a contact sheet.',
    )
    _add_input(parser, 'a folder of feature maps (embed --grid), or one of them')
    _add_output(
        parser,
        f'{_FIGURE}; or .tif for one map, or a folder for all: georeferenced GeoTIFFs, '
        'RGB of uint8',
    )
    _examples(
        parser,
        'dynamicvis-geo plot pca maps --output maps.png',
        'dynamicvis-geo plot pca maps --output maps-in-colour',
    )


def _add_neighbours(kinds: Commands) -> None:
    parser = command(
        kinds,
        'neighbours',
        'a chip and those most similar to it',
        'Draw a chip and its nearest neighbours by cosine similarity of their pooled '
        'embeddings, with their images if --images has them, else their places.',
    )
    _add_input(parser, 'a .parquet file of pooled embeddings')
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
    _add_images(parser)
    _add_bands(parser)
    _examples(
        parser,
        'dynamicvis-geo plot neighbours embeddings.parquet --chip 0 --images scene.tif '
        '--output neighbours.png',
        'dynamicvis-geo plot neighbours plots.parquet --chip plot-17 --images chips '
        '--output neighbours.png',
    )


def _add_map(kinds: Commands) -> None:
    parser = command(
        kinds,
        'map',
        'a map of pooled embeddings',
        'Draw pooled embeddings over their footprints, similar ones in similar '
        'colours.',
    )
    _add_input(parser, 'a .parquet file of pooled embeddings')
    _add_output(parser, _FIGURE)
    parser.add_argument(
        '--method',
        choices=('auto', 'pca', 'umap'),
        default='auto',
        help='how embeddings become colours: main components, or UMAP (which needs '
        "pip install 'dynamicvis-geo[umap]' and takes minutes for many chips); auto is "
        'UMAP where it is installed, for 16 to 20,000 chips (default: auto)',
    )
    _examples(parser, 'dynamicvis-geo plot map embeddings.parquet --output map.png')


def _add_report(commands: Commands) -> None:
    parser = command(
        commands,
        'report',
        'write a page that tells of a run',
        'Write one HTML page that tells what a run made and how: counts, dates, a map, '
        'failures, pictures, and the complete provenance. It needs no other file and '
        'no network.',
    )
    _add_input(parser, 'a .parquet file of pooled embeddings, or a folder of maps')
    parser.add_argument(
        '--output',
        type=local_output_path,
        metavar='FILE',
        help='file that ends in .html (default: the name of the input, with '
        '.report.html)',
    )
    _add_overwrite(parser)
    _add_images(parser)
    _add_bands(parser)
    _examples(
        parser,
        'dynamicvis-geo report embeddings.parquet --images scene.tif',
        'dynamicvis-geo report maps --images chips --output report.html',
    )


def _add_input(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument('input', type=source, metavar='INPUT', help=what)


def _add_output(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        '--output', type=local_output_path, required=True, metavar='FILE', help=what
    )
    _add_overwrite(parser)


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--overwrite', action='store_true', help='replace an output that exists'
    )


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--images',
        type=images,
        metavar='PATH',
        help='where the images of the chips are: the GeoTIFF or the folder that was '
        'embedded, or the cache of chips',
    )


def _add_bands(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--bands',
        type=bands,
        metavar='R,G,B',
        help='bands of a GeoTIFF that stand for red, green and blue (default: those '
        'that were embedded, if the input says so, else 1,2,3)',
    )


def _examples(parser: argparse.ArgumentParser, *lines: str) -> None:
    parser.description = textwrap.fill(str(parser.description), 78)
    parser.epilog = '\n  '.join(['examples:', *lines])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
