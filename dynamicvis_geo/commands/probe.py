"""``dynamicvis-geo probe``: how much embeddings know of labelled plots.

Join labels to pooled embeddings, divide the plots, and score baselines, nearest
neighbours, a logistic regression (a ridge, for numbers) and a linear probe on the test
split, with 95 % intervals. Writes results.json, results.csv (for classes also
classes.csv), the labels and predictions of each plot (predictions.parquet), the fitted
probe (probe.ckpt) and pictures.
"""

from __future__ import annotations

import os
import warnings
from argparse import ArgumentParser, ArgumentTypeError, Namespace, _ActionsContainer
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from dynamicvis_geo.commands.options import (
    add_examples,
    add_images,
    add_overwrite,
    count,
    local_output_path,
    metres,
    positive,
    source,
)
from dynamicvis_geo.errors import OutputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dynamicvis_geo.datamodules import EmbeddingDataModule
    from dynamicvis_geo.evaluation import Results
    from dynamicvis_geo.tasks import LinearProbe

#: Epochs without a smaller loss on the validation split after which training ends.
PATIENCE = 10

PROBE, JSON, CSV = 'probe.ckpt', 'results.json', 'results.csv'
CLASSES, PREDICTIONS = 'classes.csv', 'predictions.parquet'


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_examples(
        parser,
        'dynamicvis-geo probe plots.parquet --labels plots.csv --target cover',
        'dynamicvis-geo probe plots.parquet --labels plots.csv --target biomass '
        '--split region --output biomass',
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
    add_overwrite(parser, 'results')
    _add_labels(parser.add_argument_group('labels'))
    _add_split(parser.add_argument_group('splits'))
    add_images(parser)
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


def _add_labels(group: _ActionsContainer) -> None:
    group.add_argument(
        '--labels',
        type=source,
        metavar='FILE',
        help='CSV, Parquet or any vector file (default: the embeddings themselves)',
    )
    group.add_argument(
        '--join',
        dest='how',
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
        dest='max_distance_m',
        type=metres,
        metavar='METRES',
        help='of the nearest point to the centre of its chip',
    )


def _add_split(group: _ActionsContainer) -> None:
    group.add_argument(
        '--split',
        default='auto',
        metavar='spatial|random|stratified|COLUMN',
        help='how plots are divided, or the column that says train, val or test '
        '(default: spatial where places are known, else random)',
    )
    group.add_argument(
        '--fractions',
        type=_fractions,
        default=(0.6, 0.2, 0.2),
        metavar='TRAIN,VAL,TEST',
        help='shares of the splits (default: 0.6,0.2,0.2)',
    )
    group.add_argument(
        '--block',
        dest='block_m',
        type=metres,
        metavar='METRES',
        help='side of a block of --split spatial (default: chosen from the places)',
    )


def _fractions(text: str) -> tuple[float, float, float]:
    """Read the shares of the splits."""
    try:
        train, val, test = map(float, text.split(','))
    except ValueError as error:
        raise ArgumentTypeError(
            f'{text!r} must be three numbers, such as 0.6,0.2,0.2'
        ) from error
    return train, val, test


def run(arguments: Namespace) -> None:
    """Print the table of all methods, and write the results."""
    from dynamicvis_geo.evaluation.labels import labels_file
    from dynamicvis_geo.formats.geoparquet import find_parts

    output: Path = arguments.output
    _check_output(output, arguments.overwrite)
    find_parts(arguments.embeddings)
    if arguments.labels is not None:
        labels_file(arguments.labels)
    # What takes seconds to import comes after what can be told without.
    from dynamicvis_geo.datamodules import EmbeddingDataModule
    from dynamicvis_geo.evaluation import evaluate
    from dynamicvis_geo.evaluation.problem import as_problem

    data = EmbeddingDataModule(
        arguments.embeddings,
        arguments.target,
        labels=arguments.labels,
        split=arguments.split,
        fractions=arguments.fractions,
        block_m=arguments.block_m,
        how=arguments.how,
        on=arguments.on,
        max_distance_m=arguments.max_distance_m,
        task=arguments.task,
        seed=arguments.seed,
    )
    # What cannot be evaluated is refused here, before the training.
    as_problem(data)
    _print_data(data)
    colours = _colours(data, arguments)
    with _staged(output) as folder:
        probe = _fit(data, arguments, folder)
        results = evaluate(
            data,
            colours=colours,
            probe=probe,
            standardize=arguments.standardize,
            seed=arguments.seed,
        )
        print(f'\n{results.wide().reset_index().to_string(index=False)}\n')
        print(
            f'95 % intervals, from {results.n_groups} {results.grouped_by}s of the '
            'test split. Choose the row before you look: the best of several is too '
            'high.'
        )
        print(
            f'\n{results.table["metric"].iloc[0]} less that of the baselines, on the '
            'same draws; above 0 is better:\n'
            f'{results.less_baselines().reset_index().to_string(index=False)}'
        )
        if results.classes:
            print(f'\nF1 of each class:\n{results.f1_by_class().to_string()}\n')
        for note in results.notes:
            print(f'Note: {note}.')
        _write(results, data, arguments, folder)
    told = {PREDICTIONS: f'{PREDICTIONS} (of the linear probe)'}
    names = (told.get(name, name) for name in sorted(os.listdir(output)))
    print(f'Wrote {output}: {", ".join(names)}.')


def _check_output(output: Path, overwrite: bool) -> None:
    from dynamicvis_geo.provenance import carries_provenance, refuse_others

    if output.exists() and not output.is_dir():
        raise OutputError(f"cannot write '{output}': it is a file; name a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise OutputError(
            f"'{output}' holds files already: choose another --output, or allow "
            'results in it to be replaced (--overwrite)'
        )
    pictures = ('confusion-*.png', 'predicted-*.png')
    names = (PROBE, JSON, CSV, CLASSES, PREDICTIONS, *pictures)
    existing = [path for name in names for path in output.glob(name)]
    if existing and not carries_provenance(output / JSON):
        refuse_others(existing)


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """Give a hidden folder, whose files are moved to their place if all went well."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(
            suffix='.partial',
            prefix=f'.{output.name}.',
            dir=output.parent,
            ignore_cleanup_errors=True,
        ) as folder:
            yield Path(folder)
            output.mkdir(exist_ok=True)
            for file in sorted(Path(folder).iterdir()):
                os.replace(file, output / file.name)
    except OSError as error:
        raise OutputError(
            f"cannot write '{output}': {error}; choose another --output"
        ) from error


def _print_data(data: EmbeddingDataModule) -> None:
    joined = data.joined
    if joined is not None:
        print(
            f'Joined by {joined.how}: {len(joined.rows)} of {len(data.dataset)} chips '
            f'have a label; {joined.unused} labels belong to no chip, and '
            f'{joined.missing} have no value.'
        )
    counts = [len(data.rows(name)) for name in ('train', 'val', 'test')]
    division = data.division
    split = f'split {division["kind"]}'
    if division['block_m'] is not None:
        chosen = ', chosen from the places' * (data.block_m is None)
        split += f', blocks of {division["block_m"] / 1000:g} km{chosen}'
    of = f' of {data.num_classes} classes' if data.num_classes else ''
    print(
        f'{data.task.capitalize()}, {data.target}: {sum(counts)} plots{of}; '
        f'{counts[0]} to train, {counts[1]} to validate, {counts[2]} to test '
        f'({split}).'
    )


def _fit(data: EmbeddingDataModule, arguments: Namespace, folder: Path) -> LinearProbe:
    """Train the probe; its best state is left in the folder."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    from dynamicvis_geo.commands.trainer import quieten_lightning
    from dynamicvis_geo.tasks import LinearProbe, load_probe

    quieten_lightning()
    # The smaller splits need not have every class: the notes say so, once.
    warnings.filterwarnings('ignore', '.*No positive samples.*')
    warnings.filterwarnings('ignore', '.*for one or more classes was `nan`.*')
    warnings.filterwarnings('ignore', '.*number of training batches.*log interval.*')
    warnings.filterwarnings('ignore', '.*have no `val_dataloader`.*')
    # Small sets in small batches: an epoch is at least 16 steps where it can be.
    data.batch_size = min(data.batch_size, max(16, len(data.rows('train')) // 16))
    probe = LinearProbe(
        data.task, data.dim, data.classes, standardize=arguments.standardize
    )
    validated = len(data.rows('val')) > 0
    best = ModelCheckpoint(
        folder,
        filename=Path(PROBE).stem,
        monitor='val_loss' if validated else None,
        save_weights_only=True,
        enable_version_counter=False,
    )
    stop = [EarlyStopping('val_loss', patience=PATIENCE)] if validated else []
    trainer = Trainer(
        accelerator='cpu',
        max_epochs=arguments.epochs,
        callbacks=[best, *stop],
        limit_val_batches=None if validated else 0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(probe, datamodule=data)
    return load_probe(folder / PROBE)


def _colours(
    data: EmbeddingDataModule, arguments: Namespace
) -> dict[str, NDArray[np.float32]] | None:
    """Mean colours of the chips, if their images were named."""
    from dynamicvis_geo.evaluation.baselines import mean_colours
    from dynamicvis_geo.outputs import recorded_bands
    from dynamicvis_geo.quicklooks import Quicklooks

    if arguments.images is None:
        return None
    bands = arguments.bands or recorded_bands(data.provenance)
    return mean_colours(data, Quicklooks(arguments.images, bands, pixels=64))


def _write(
    results: Results, data: EmbeddingDataModule, arguments: Namespace, folder: Path
) -> None:
    from dynamicvis_geo.evaluation.predictions import write_predictions

    joined = data.joined
    text = results.to_json(
        embeddings=arguments.embeddings,
        labels=arguments.labels,
        target=arguments.target,
        join=None if joined is None else joined.description,
        split=data.division,
        probe={'standardize': arguments.standardize, 'epochs': arguments.epochs},
    )
    (folder / JSON).write_text(text + '\n', encoding='utf-8')
    results.table.to_csv(folder / CSV, index=False)
    if results.classes:
        results.by_class.to_csv(folder / CLASSES, index=False)
    (method,) = (name for name in results.predicted if name.startswith('linear probe'))
    write_predictions(folder / PREDICTIONS, data, results.predicted[method])
    if results.task == 'multilabel':
        return
    picture = 'predicted' if results.task == 'regression' else 'confusion'
    for method in results.predicted:
        kind = method.rpartition(' ')[0]
        if not kind.startswith(('knn', 'baseline')):
            name = f'{picture}-{kind.replace(" ", "-")}.png'
            results.plot(method).savefig(folder / name, dpi=120)
