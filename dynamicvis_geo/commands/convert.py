"""``dynamicvis-geo convert``: the backbone of a checkpoint, alone."""

from argparse import Namespace

from dynamicvis_geo.models.checkpoint import convert


def run(arguments: Namespace) -> None:
    """Write the safetensors file, and print what was written."""
    written = convert(arguments.checkpoint, arguments.out, arguments.overwrite)
    megabytes = written.stat().st_size / 1e6
    print(
        f'Wrote {written}: the backbone of {arguments.checkpoint}, {megabytes:.0f} MB.'
    )
