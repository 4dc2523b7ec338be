"""``dynamicvis-geo merge``: an output made of the blocks of unfinished runs."""

from argparse import Namespace

from dynamicvis_geo.callbacks.output import merge
from dynamicvis_geo.commands.prediction import SOME_FAILED


def run(arguments: Namespace) -> int:
    """Join the blocks, and print what was joined.

    Returns:
        the exit code: 0, or :data:`SOME_FAILED`.
    """
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
