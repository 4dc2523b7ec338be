"""``dynamicvis-geo predict-map``: a fitted probe, applied to every cell."""

from argparse import Namespace

from dynamicvis_geo.evaluation.class_maps import predict_maps


def run(arguments: Namespace) -> None:
    """Write the maps, and print how many."""
    written, skipped = predict_maps(
        arguments.probe, arguments.maps, arguments.output, arguments.overwrite
    )
    there = f'; {len(skipped)} were there already' if skipped else ''
    print(f'Wrote {arguments.output}: {len(written)} maps{there}.')
