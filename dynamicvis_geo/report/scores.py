"""Scores of ``dynamicvis-geo probe``, as a report shows them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dynamicvis_geo.errors import SourceError, one_line
from dynamicvis_geo.paths import AnyPath, input_path, kind_of, open_file
from dynamicvis_geo.plotting.confusion import plot_confusion_matrix
from dynamicvis_geo.provenance import to_json
from dynamicvis_geo.report.images import Image, figure_image
from dynamicvis_geo.report.predictions import PredictionMap, map_predictions
from dynamicvis_geo.report.tables import Row
from dynamicvis_geo.terms import find

#: File of the results in the folder that the command writes.
RESULTS = 'results.json'
#: Classes that are listed, at most.
CLASSES_LISTED = 60

# A picture of more classes is too large for a page.
_MATRIX_CLASSES = 60
_METRICS = {
    'accuracy_micro': 'Accuracy',
    'accuracy_macro': 'Accuracy, mean of classes',
    'f1': 'F1',
    'average_precision': 'Average precision',
    'jaccard': 'Jaccard index',
    'calibration_error': 'Calibration error',
    'r2': 'R²',
    'mae': 'Mean absolute error',
    'rmse': 'Root mean squared error',
}
_BY_CLASS = {'precision': 'Precision', 'recall': 'Recall', 'f1': 'F1'}


@dataclass(frozen=True)
class Score:
    """A value, and its interval in words; '' where there is none."""

    value: str
    interval: str

    @classmethod
    def of(cls, row: Mapping[str, Any], sign: str = '-') -> 'Score':
        """Write a row of results, whose numbers may be missing."""
        value, low, high = (row[name] for name in ('value', 'low', 'high'))
        if value is None:
            return cls('none', '')
        between = (
            ''
            if low is None or high is None
            else (f'{low:{sign}z.3f} to {high:{sign}z.3f}')
        )
        return cls(f'{value:{sign}z.3f}', between)


@dataclass(frozen=True)
class Scores:
    """The findings of a probe.

    Attributes:
        target: Column of the labels.
        facts: Task, labels, split and groups.
        notes: What a reader must know of the scores.
        metrics: Heads of the columns of *methods*.
        methods: Name and scores of each method; baselines come first.
        baselines: Heads of the columns of *differences*.
        differences: Name of each other method, and the first of its scores less that of
            each baseline; none in results of before.
        shown: Method whose classes and confusion matrix are shown; '' if none are.
        classes: Name, number of test samples and scores of each class, by
            *class_metrics*.
        class_metrics: Heads of the columns of *classes*.
        total_classes: Number of classes, also of those that are not listed.
        confusion: Picture of the confusion matrix; None if it has none.
        places: Where the linear probe is right and wrong; None if that is not told.
    """

    target: str
    facts: list[Row]
    notes: list[str]
    metrics: list[str]
    methods: list[tuple[str, list[Score]]]
    baselines: list[str]
    differences: list[tuple[str, list[Score]]]
    shown: str
    classes: list[tuple[str, int, list[Score]]]
    class_metrics: list[str]
    total_classes: int
    confusion: Image | None
    places: PredictionMap | None


def read_scores(path: AnyPath, provenance: Mapping[str, Any]) -> Scores:
    """Read what ``dynamicvis-geo probe`` wrote of an output.

    Args:
        path: Its folder, or results.json in it.
        provenance: Of the output.

    Returns:
        The scores.

    Raises:
        SourceError: If there are none, they cannot be read, or are of another output.
    """
    file = input_path(path)
    if kind_of(file) == 'folder':
        file = file / RESULTS
    if kind_of(file) != 'file':
        raise SourceError(
            f'{file}: no such file; give the folder that dynamicvis-geo probe wrote, '
            f'or {RESULTS} in it'
        )
    try:
        with open_file(file) as opened:
            found = json.load(opened)
        scores, features = _scores(found), found['features']
    except (
        OSError,
        StopIteration,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        raise SourceError(
            f'{file}: these are no results of dynamicvis-geo probe '
            f'({type(error).__name__}: {one_line(error)})'
        ) from error
    if features != json.loads(to_json(provenance)):
        raise SourceError(
            f'{file}: these results are of other features ({_made(features)}) than '
            f'this output ({_made(provenance)}): give the results of a probe of this '
            'output, or repeat the probe'
        )
    return replace(scores, places=map_predictions(file.parent))


def _made(provenance: Mapping[str, Any]) -> str:
    made = find(provenance, 'processing:datetime')
    return f'made {made}' if made else 'without provenance'


def _scores(found: Mapping[str, Any]) -> Scores:
    methods: dict[str, dict[str, Score]] = {}
    for row in found['results']:
        name = f'{row["method"]} {row["setting"]}'
        methods.setdefault(name, {})[str(row['metric'])] = Score.of(row)
    metrics = list(
        dict.fromkeys(name for scores in methods.values() for name in scores)
    )
    # A linear model, whatever the scores: the best one would be chosen by the test.
    shown = [name for name in methods if not name.startswith(('baseline ', 'knn '))][-1]
    classes: dict[str, dict[str, Score]] = {}
    counts: dict[str, int] = {}
    for row in found['by_class']:
        if f'{row["method"]} {row["setting"]}' == shown and row['metric'] in _BY_CLASS:
            name = str(row['class'])
            classes.setdefault(name, {})[str(row['metric'])] = Score.of(row)
            counts[name] = int(row['n'])
    differences: dict[str, dict[str, Score]] = {}
    for row in found.get('differences', []):
        if row['metric'] == metrics[0]:
            less = differences.setdefault(f'{row["method"]} {row["setting"]}', {})
            less[str(row['baseline'])] = Score.of(row, '+')
    by_class = [name for name in _BY_CLASS if any(name in c for c in classes.values())]
    none = Score('none', '')
    return Scores(
        str(found.get('target', 'the labels')),
        _facts(found),
        [str(note) for note in found['notes']],
        [_METRICS.get(name, name.replace('_', ' ')) for name in metrics],
        [
            (name, [scores.get(metric, none) for metric in metrics])
            for name, scores in methods.items()
        ],
        list(next(iter(differences.values()), {})),
        [(name, list(less.values())) for name, less in differences.items()],
        shown,
        [
            (name, counts[name], [scores.get(metric, none) for metric in by_class])
            for name, scores in list(classes.items())[:CLASSES_LISTED]
        ],
        [_BY_CLASS[name] for name in by_class],
        len(classes),
        _confusion(found, shown),
        None,
    )


def _facts(found: Mapping[str, Any]) -> list[Row]:
    splits, groups = found['splits'], found['groups']
    task, classes = str(found['task']), found['classes']
    rows = [
        ('Task', f'{task}, {len(classes)} classes' if classes else task),
        ('Labels', str(find(found, 'join') or find(found, 'labels') or '')),
        (
            'Plots',
            f'{splits["train"]:,} to train, {splits["val"]:,} to validate, '
            f'{splits["test"]:,} to test',
        ),
        ('Split', _split(found)),
        (
            'Intervals',
            f'95 %, from {groups["test"]:,} {groups["by"]}s of the test split',
        ),
    ]
    return [(name, value) for name, value in rows if value]


def _split(found: Mapping[str, Any]) -> str:
    """Say how plots were divided; '' if the results do not tell."""
    kind, block = find(found, 'split', 'kind'), find(found, 'split', 'block_m')
    words = str(kind or '')
    if block is not None:
        words += f', whole blocks of {block / 1000:g} km'
    left_out = find(found, 'split', 'left_out')
    if left_out:
        words += f'; {left_out:,} chips left out, which share ground across splits'
    return words


def _confusion(found: Mapping[str, Any], method: str) -> Image | None:
    matrix, classes = find(found, 'confusion', method), found['classes']
    if matrix is None or len(matrix) > _MATRIX_CLASSES:
        return None
    figure = plot_confusion_matrix(np.asarray(matrix), classes)
    right, total = int(np.trace(matrix)), int(np.sum(matrix))
    return figure_image(
        figure,
        f'Confusion matrix of {method}: {right:,} of {total:,} test samples are right',
    )
