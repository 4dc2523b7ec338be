"""``dynamicvis-geo card``: the dataset card of an output.

Write a README.md as Hugging Face shows it for a dataset: what the output holds, how it
was made, how to load it, whom to name. Its folder is then what to upload.
"""

from argparse import ArgumentParser, Namespace

from dynamicvis_geo.commands.options import (
    add_examples,
    add_input,
    add_overwrite,
    output,
)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_input(parser)
    parser.add_argument(
        '--output',
        type=output,
        metavar='FILE',
        help='the card (default: README.md in the folder that holds the input); an '
        'earlier card is replaced',
    )
    parser.add_argument(
        '--license',
        metavar='ID',
        help='licence of the embeddings, as Hugging Face names it, such as cc-by-4.0',
    )
    add_overwrite(parser, 'a file of your own')
    add_examples(
        parser,
        'dynamicvis-geo card region/embeddings.parquet --license cc-by-4.0',
        'dynamicvis-geo card region/maps.zarr --output card.md',
    )


def run(arguments: Namespace) -> None:
    """Write the card and print where it is."""
    from dynamicvis_geo.card import write_card

    path = write_card(
        arguments.input, arguments.output, arguments.license, arguments.overwrite
    )
    print(f'Wrote {path}: edit what you know better, and upload its folder.')
