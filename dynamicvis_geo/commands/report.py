"""``dynamicvis-geo report``: a page that tells of a run."""

from argparse import Namespace
from pathlib import Path

from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.report import write_report
from dynamicvis_geo.runs import check_picture_path


def run(arguments: Namespace) -> None:
    """Write the page and print where it is."""
    source, output = arguments.input, arguments.output
    if output is None:
        if not isinstance(source, Path):
            raise OutputError(
                f'--output is needed beside {source}: pages are written to local disks '
                'only'
            )
        stem = source.resolve().name.removesuffix('.parquet')
        output = source.resolve().with_name(f'{stem}.report.html')
    check_picture_path(output, ('.html',), arguments.overwrite, source)
    path = write_report(source, output, arguments.images, arguments.bands)
    print(f'Wrote {path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser.')
