"""``dynamicvis-geo report``: a page that tells of a run.

Write one HTML page that tells what a run made and how: counts, dates, a map, scores of
a probe, failures, pictures, and the complete provenance. It needs no other file and no
network.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from dynamicvis_geo.commands.options import (
    add_examples,
    add_images,
    add_input,
    add_overwrite,
    local_output_path,
    source,
)
from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.paths import check_picture_path


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_input(parser)
    parser.add_argument(
        '--output',
        type=local_output_path,
        metavar='FILE',
        help='file that ends in .html (default: the name of the input, with '
        '.report.html)',
    )
    add_overwrite(parser)
    add_images(parser)
    parser.add_argument(
        '--probe',
        type=source,
        metavar='RESULTS',
        help='folder that dynamicvis-geo probe wrote of the input, to show its scores',
    )
    add_examples(
        parser,
        'dynamicvis-geo report embeddings.parquet --images scene.tif',
        'dynamicvis-geo report plots.parquet --probe probe-output',
        'dynamicvis-geo report maps --images chips --output report.html',
    )


def run(arguments: Namespace) -> None:
    """Write the page and print where it is.

    Args:
        arguments: The options.

    Raises:
        OutputError: If the page may not be written there, or a URL is given without
            ``--output``.
    """
    from dynamicvis_geo.report import write_report

    given, output = arguments.input, arguments.output
    if output is None:
        if not isinstance(given, Path):
            raise OutputError(
                f'--output is needed beside {given}: pages are written to local disks '
                'only'
            )
        stem = given.resolve().name.removesuffix('.parquet')
        output = given.resolve().with_name(f'{stem}.report.html')
    check_picture_path(output, ('.html',), arguments.overwrite, given)
    path = write_report(
        given, output, arguments.images, arguments.bands, arguments.probe
    )
    print(f'Wrote {path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser.')
