"""``dynamicvis-geo predict-map``: a fitted probe, applied to every cell.

Apply a fitted probe to every cell of feature maps, and write one georeferenced map a
chip: classes with their names and colours, or values. Interrupted and started again, it
continues where it stopped.
"""

from argparse import ArgumentParser, Namespace

from dynamicvis_geo.commands.options import (
    add_class_colors,
    add_examples,
    add_overwrite,
    local_output_path,
    local_source,
    read_colors,
    source,
)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_examples(
        parser,
        'dynamicvis-geo predict-map probe-output/probe.ckpt maps --output classes',
    )
    parser.add_argument(
        'probe',
        type=local_source,
        metavar='PROBE',
        help='probe.ckpt, written by probe',
    )
    parser.add_argument(
        'maps',
        type=source,
        metavar='MAPS',
        help='folder of feature maps, written by embed --grid, or one of them',
    )
    parser.add_argument(
        '--output',
        type=local_output_path,
        required=True,
        metavar='DIR',
        help='folder for the maps',
    )
    add_class_colors(parser)
    add_overwrite(parser, 'maps')


def run(arguments: Namespace) -> None:
    """Write the maps, and print how many."""
    from dynamicvis_geo.datasets.scene_files import find_files
    from dynamicvis_geo.models.safe_load import read_head

    read_head(arguments.probe)
    find_files(arguments.maps)
    # What takes seconds to import comes after what can be told without.
    from dynamicvis_geo.evaluation.class_maps import predict_maps

    written, skipped = predict_maps(
        arguments.probe,
        arguments.maps,
        arguments.output,
        arguments.overwrite,
        read_colors(arguments),
    )
    there = f'; {len(skipped)} were there already' if skipped else ''
    print(f'Wrote {arguments.output}: {len(written)} maps{there}.')
