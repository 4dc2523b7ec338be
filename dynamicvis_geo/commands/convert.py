"""``dynamicvis-geo convert``: the backbone of a checkpoint, alone.

Write the backbone alone, which is smaller and loads faster; its metadata says which
file it was taken from.
"""

from argparse import ArgumentParser, Namespace

from dynamicvis_geo.commands.options import (
    add_examples,
    add_overwrite,
    local_output_path,
    local_source,
)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_examples(
        parser,
        'dynamicvis-geo convert weights.pth backbone.safetensors',
    )
    parser.add_argument('checkpoint', type=local_source, metavar='CHECKPOINT')
    parser.add_argument('out', type=local_output_path, metavar='OUT.safetensors')
    add_overwrite(parser)


def run(arguments: Namespace) -> None:
    """Write the safetensors file, and print what was written."""
    from dynamicvis_geo.models.safe_load import read_head

    read_head(arguments.checkpoint)
    from dynamicvis_geo.models.checkpoint import convert

    written = convert(arguments.checkpoint, arguments.out, arguments.overwrite)
    megabytes = written.stat().st_size / 1e6
    print(
        f'Wrote {written}: the backbone of {arguments.checkpoint}, {megabytes:.0f} MB.'
    )
