"""``dynamicvis-geo merge``: an output made of the blocks of unfinished runs.

Join the blocks that lie beside OUT, where embed has been ended, or its last shard has.
Exits with 3 if the images of some chips could not be had.
"""

from argparse import ArgumentParser, Namespace

from dynamicvis_geo.commands import SOME_FAILED
from dynamicvis_geo.commands.options import (
    add_examples,
    output,
)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_examples(
        parser,
        'dynamicvis-geo merge embeddings.parquet',
    )
    parser.add_argument(
        'out', type=output, metavar='OUT', help='--output of that embed'
    )
    parser.add_argument(
        '--partial',
        action='store_true',
        help='join what there is, also if blocks are missing; the run may still go on',
    )


def run(arguments: Namespace) -> int:
    """Join the blocks, and print what was joined.

    Returns:
        the exit code: 0, or :data:`SOME_FAILED`.
    """
    from dynamicvis_geo.callbacks.output import merge

    merged = merge(arguments.out, arguments.partial)
    text = f'Wrote {arguments.out}: {merged.rows} chips joined'
    if not merged.rows + merged.missing:
        text = f'{arguments.out} is finished: there are no blocks to join'
    if merged.missing:
        text += f'; {merged.missing} blocks are missing, which embed still makes'
    if merged.failed:
        text += f'; {merged.failed} chips have failed'
    print(f'{text}.')
    return SOME_FAILED if merged.failed else 0
