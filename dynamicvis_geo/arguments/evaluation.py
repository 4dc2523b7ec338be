"""Arguments of the commands that use embeddings."""

import argparse
from pathlib import Path

from dynamicvis_geo.arguments.common import (
    Commands,
    command,
    count,
    local_output_path,
    local_source,
    metres,
    positive,
    source,
)


def add_commands(commands: Commands) -> None:
    """Add probe and predict-map."""
    _add_probe(commands)
    _add_predict_map(commands)


def _add_probe(commands: Commands) -> None:
    parser = command(
        commands,
        'probe',
        'score embeddings on labelled plots',
        'Join labels to pooled embeddings, divide the plots, and score nearest '
        'neighbours, a logistic regression (a ridge, for numbers) and a linear probe '
        'on the test split, with 95 % intervals. Writes results.json, results.csv, the '
        'fitted probe (probe.ckpt) and pictures.',
    )
    parser.add_argument(
        'embeddings',
        type=source,
        metavar='EMBEDDINGS',
        help='GeoParquet file of pooled embeddings, or a folder of its parts',
    )
    parser.add_argument(
        '--target', required=True, metavar='COLUMN', help='column of the labels'
    )
    parser.add_argument(
        '--task',
        choices=('binary', 'multiclass', 'multilabel', 'regression'),
        help='what to learn (default: told by the labels)',
    )
    parser.add_argument(
        '--output',
        type=local_output_path,
        default=Path('probe-output'),
        metavar='DIR',
        help='folder for the results (default: probe-output)',
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='replace results that exist'
    )
    _add_labels(parser.add_argument_group('labels'))
    _add_split(parser.add_argument_group('splits'))
    group = parser.add_argument_group('linear models')
    group.add_argument(
        '--standardize',
        choices=('none', 'zscore', 'batchnorm', 'l2'),
        default='zscore',
        help='of the features, by the training split (default: zscore)',
    )
    group.add_argument(
        '--epochs',
        type=positive,
        default=100,
        metavar='N',
        help='of the linear probe, at most; the epoch with the smallest loss on the '
        'validation split is kept (default: 100)',
    )
    group.add_argument(
        '--seed',
        type=count,
        default=0,
        metavar='N',
        help='of splits, training and intervals (default: 0)',
    )


def _add_labels(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        '--labels',
        type=source,
        metavar='FILE',
        help='CSV, Parquet or any vector file (default: the embeddings themselves)',
    )
    group.add_argument(
        '--join',
        choices=('auto', 'id', 'nearest', 'within'),
        default='auto',
        help='labels to chips: by id, the nearest point, or within footprints or '
        'polygons (default: auto)',
    )
    group.add_argument(
        '--on', metavar='COLUMN', help='column of the labels that holds the ids'
    )
    group.add_argument(
        '--max-distance',
        type=metres,
        metavar='METRES',
        help='of the nearest point to the centre of its chip',
    )


def _add_split(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        '--split',
        default='random',
        metavar='random|stratified|spatial|COLUMN',
        help='how plots are divided, or the column that says train, val or test '
        '(default: random)',
    )
    group.add_argument(
        '--fractions',
        type=fractions,
        default=(0.6, 0.2, 0.2),
        metavar='TRAIN,VAL,TEST',
        help='shares of the splits (default: 0.6,0.2,0.2)',
    )
    group.add_argument(
        '--block',
        type=metres,
        default=10_000.0,
        metavar='METRES',
        help='side of a block of --split spatial (default: 10000)',
    )


def _add_predict_map(commands: Commands) -> None:
    parser = command(
        commands,
        'predict-map',
        'turn feature maps into class maps',
        'Apply a fitted probe to every cell of feature maps, and write one '
        'georeferenced map a chip: classes with their names and colours, or values. '
        'Interrupted and started again, it continues where it stopped.',
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
    parser.add_argument(
        '--overwrite', action='store_true', help='replace maps that exist'
    )


def fractions(text: str) -> tuple[float, float, float]:
    """Read the shares of the splits."""
    try:
        train, val, test = map(float, text.split(','))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f'{text!r} must be three numbers, such as 0.6,0.2,0.2'
        ) from error
    return train, val, test
