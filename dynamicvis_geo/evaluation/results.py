"""All methods on one division of the data, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import PredictionErrorDisplay, confusion_matrix

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.evaluation.baselines import constant
from dynamicvis_geo.evaluation.bootstrap import check_resamples, draw_scores
from dynamicvis_geo.evaluation.knn import knn
from dynamicvis_geo.evaluation.linear import fit_linear
from dynamicvis_geo.evaluation.problem import Arrays, Problem, as_problem
from dynamicvis_geo.plotting import plot_confusion_matrix
from dynamicvis_geo.provenance import software_versions, to_json
from dynamicvis_geo.terms import random_weights

if TYPE_CHECKING:
    from dynamicvis_geo.evaluation.datamodule import EmbeddingDataModule
    from dynamicvis_geo.tasks import LinearProbe

#: Columns of :attr:`Results.table`.
COLUMNS = (
    'method',
    'setting',
    'metric',
    'value',
    'low',
    'high',
    'n_train',
    'n_val',
    'n_test',
    'n_groups',
)

#: Columns of :attr:`Results.by_class`.
CLASS_COLUMNS = ('method', 'setting', 'class', 'metric', 'value', 'low', 'high', 'n')

#: Columns of :attr:`Results.differences`.
DIFFERENCE_COLUMNS = (
    'method',
    'setting',
    'baseline',
    'metric',
    'value',
    'low',
    'high',
)

_BASELINE = 'baseline'

#: With fewer groups, an interval is hardly one.
_FEW_GROUPS = 10


@dataclass(frozen=True)
class Results:
    """Scores of all methods on the test split.

    Attributes:
        table: A row a method and metric: ``method``, ``setting``, ``metric``,
            ``value``, ``low`` and ``high`` (of the 95 % interval), ``n_train``,
            ``n_val``, ``n_test``, ``n_groups``.
        by_class: A row a method, class and metric: ``method``, ``setting``, ``class``,
            ``metric`` (precision, recall, F1, average precision, Jaccard index),
            ``value``, ``low``, ``high``, and ``n``, the test samples of the class; no
            row for regression.
        differences: A row a method, baseline and metric: ``method``, ``setting``,
            ``baseline`` (its setting), ``metric``, and ``value``, ``low`` and ``high``
            of the metric less that of the baseline, on the same draws. An interval that
            includes 0 does not show which of both is better.
        task: 'binary', 'multiclass', 'multilabel' or 'regression'.
        classes: Names of the classes; none for regression.
        sizes: Number of samples in each split.
        n_groups: Number of groups in the test split, which the intervals resample.
        grouped_by: Their kind: 'block' of land, 'place', 'group', or 'sample'.
        truth: Labels of the test split.
        predicted: For each method, as 'knn k=5 cosine', the probabilities ``[n, C]`` of
            the test split, or the values ``[n]`` of a regression.
        choices: Chosen hyper-parameters of each method that has any.
        notes: Warnings for a reader: classes that a split lacks, fits that did not
            converge.
        provenance: Provenance of the features.
        settings: Arguments of :func:`evaluate`.
    """

    table: pd.DataFrame
    by_class: pd.DataFrame
    differences: pd.DataFrame
    task: str
    classes: tuple[str, ...]
    sizes: dict[str, int]
    n_groups: int
    grouped_by: str
    truth: NDArray[Any]
    predicted: dict[str, NDArray[np.float64]]
    choices: dict[str, dict[str, Any]]
    notes: tuple[str, ...]
    provenance: dict[str, Any]
    settings: dict[str, Any]

    def __repr__(self) -> str:
        """Say in two lines what was scored, and the methods that were."""
        what = f'{len(self.classes)} classes, ' if self.classes else ''
        sizes = ', '.join(f'{count:,} {name}' for name, count in self.sizes.items())
        return (
            f'<Results: {self.task}, {what}{sizes} samples\n '
            f'{", ".join(self.predicted)}; see .table>'
        )

    def confusion(self, method: str) -> NDArray[np.int64]:
        """Count the test samples of each true (down) and predicted class (across).

        Args:
            method: A key of :attr:`predicted`; the task must have one class a sample.

        Returns:
            int64 ``[C, C]``.

        Raises:
            SpecError: If there is no such method.
        """
        chosen = self._values(method).argmax(axis=1)
        counts: NDArray[np.int64] = confusion_matrix(
            self.truth, chosen, labels=np.arange(len(self.classes))
        )
        return counts

    def plot(self, method: str) -> Figure:
        """Draw the confusion matrix; of a regression predicted against true values.

        Args:
            method: A key of :attr:`predicted`; several classes at once have no such
                picture.

        Returns:
            The figure.

        Raises:
            SpecError: If there is no such method.
        """
        if self.task != 'regression':
            figure = plot_confusion_matrix(self.confusion(method), self.classes)
        else:
            figure = Figure(figsize=(5, 5), layout='constrained')
            PredictionErrorDisplay(y_true=self.truth, y_pred=self._values(method)).plot(
                figure.subplots(),
                kind='actual_vs_predicted',
                scatter_kwargs={'alpha': 0.5 if len(self.truth) < 2000 else 0.1},
            )
        random = ' (random weights)' if random_weights(self.provenance) else ''
        figure.axes[0].set_title(method + random)
        return figure

    def _values(self, method: str) -> NDArray[np.float64]:
        if method not in self.predicted:
            raise SpecError(
                f'method={method!r} is unknown: choose one of '
                f'{", ".join(self.predicted)}'
            )
        return self.predicted[method]

    def wide(self) -> pd.DataFrame:
        """Return the table with a row a method and a column a metric, as text.

        Returns:
            Texts such as '0.812 [0.790, 0.834]'.
        """
        text = self.table.assign(
            text=[_text(*row) for row in self.table[['value', 'low', 'high']].values]
        )
        wide = text.pivot(index=['method', 'setting'], columns='metric', values='text')
        pairs = list(zip(text['method'], text['setting'], strict=True))
        order, metrics = dict.fromkeys(pairs), dict.fromkeys(text['metric'])
        return wide.loc[list(order), list(metrics)]

    def less_baselines(self) -> pd.DataFrame:
        """Return the differences of the first metric, as text.

        Returns:
            Texts such as '+0.112 [-0.020, +0.240]', a row a method and a column a
            baseline, whose metric is taken off.
        """
        first = self.differences['metric'] == self.table['metric'].iloc[0]
        rows = self.differences[first]
        numbers = zip(rows['value'], rows['low'], rows['high'], strict=True)
        text = rows.assign(text=[_text(*row, '+') for row in numbers])
        index = ['method', 'setting']
        wide: pd.DataFrame = text.pivot(index=index, columns='baseline', values='text')
        order = dict.fromkeys(zip(text['method'], text['setting'], strict=True))
        baselines = dict.fromkeys(text['baseline'])
        return wide.loc[list(order)][list(baselines)]

    def f1_by_class(self) -> pd.DataFrame:
        """Return the F1 of each class, a row a class and a column a method, as text.

        Returns:
            Texts such as '0.812'; and ``n``, the test samples of the class. No row for
            regression.
        """
        chosen = self.by_class[self.by_class['metric'] == 'f1']
        text = chosen.assign(
            method=chosen['method'] + ' ' + chosen['setting'],
            value=chosen['value'].map('{:.3f}'.format),
        )
        wide = text.pivot(index=['class', 'n'], columns='method', values='value')
        wide = wide.reset_index('n').loc[list(dict.fromkeys(text['class']))]
        return wide[['n', *dict.fromkeys(text['method'])]]

    def to_json(self, **further: Any) -> str:
        """Write everything but the predictions as JSON, strictly: NaN becomes null.

        Args:
            **further: More to write, such as how labels were joined.

        Returns:
            The JSON.
        """
        matrices = (
            {name: self.confusion(name).tolist() for name in self.predicted}
            if self.task in ('binary', 'multiclass')
            else {}
        )
        return to_json(
            {
                'task': self.task,
                'classes': self.classes,
                'splits': self.sizes,
                'groups': {'by': self.grouped_by, 'test': self.n_groups},
                'results': self.table.to_dict('records'),
                'by_class': self.by_class.to_dict('records'),
                'differences': self.differences.to_dict('records'),
                'choices': self.choices,
                'confusion': matrices,
                'notes': self.notes,
                'settings': self.settings,
                **further,
                'software': software_versions(),
                'features': self.provenance,
            },
            indent=2,
        )


def evaluate(
    data: EmbeddingDataModule | Mapping[str, Arrays],
    task: str | None = None,
    classes: Sequence[str] = (),
    *,
    groups: ArrayLike | None = None,
    colours: Mapping[str, NDArray[np.float32]] | None = None,
    probe: LinearProbe | None = None,
    k: Sequence[int] = (5, 20),
    distances: Sequence[str] = ('cosine', 'l2'),
    standardize: str = 'zscore',
    resamples: int = 1000,
    seed: int = 0,
) -> Results:
    """Score nearest neighbours and a linear model on the test split, and baselines.

    Baselines need no features: the largest class of the other splits (their mean, for a
    regression), and if *colours* are given, the same linear model on these.

    kNN takes the features as they are and the training split alone. The logistic
    regression (L-BFGS; one against the rest for multilabel) or the ridge takes
    standardised features, its strength is chosen on the validation split, and it is
    fitted again on training and validation split together. Metrics are those of
    :mod:`~dynamicvis_geo.evaluation.metrics`.

    Args:
        data: A datamodule; or arrays: features float32 ``[n, D]`` and labels of
            'train', 'val' and 'test' (int ``[n]``; 0 and 1 ``[n, C]`` for multilabel;
            float ``[n]`` for regression).
        task: Of arrays: 'binary', 'multiclass', 'multilabel' or 'regression'.
        classes: Of arrays: names of the classes; their numbers if left out.
        groups: Of arrays: group of each test sample, ``[n]``, such as its block of
            land; intervals resample groups. Each sample for itself if left out.
        colours: Mean colours of the samples of each split, ``[n, 3]``, as
            :func:`~dynamicvis_geo.evaluation.baselines.mean_colours` gives them.
        probe: A fitted probe to score beside the others.
        k: Numbers of neighbours.
        distances: Of neighbours: 'cosine', 'l2', or both.
        standardize: For the linear model: 'zscore', 'l2' or 'none', fitted on the
            training split.
        resamples: Draws of the bootstrap behind the intervals.
        seed: Of the bootstrap.

    Returns:
        The scores of all methods.

    Raises:
        SpecError: If an argument or a split cannot be used, the training split has one
            class or a constant target, or fewer samples than the smallest k.
    """
    check_resamples(resamples)
    problem = as_problem(data, task, classes, groups)
    n_groups = len(np.unique(problem.groups))
    train = problem.sizes['train']
    notes = list(problem.notes)
    if random_weights(problem.provenance):
        notes.insert(
            0,
            'the features are those of random weights: these scores say nothing of '
            'DynamicVis',
        )
    if n_groups < _FEW_GROUPS:
        notes.append(
            f'the test split has {n_groups} {problem.grouped_by}{"s" * (n_groups != 1)}'
            ': intervals of so few say little; add places, or use smaller blocks'
        )
    name, values = constant(problem)
    predicted = {(_BASELINE, name): values}
    choices = {}
    if colours is not None:
        coloured = as_problem(
            {name: (colours[name], y) for name, (_, y) in problem.splits.items()},
            problem.task,
            problem.classes,
        )
        fit = fit_linear(coloured, standardize)
        predicted[_BASELINE, 'mean colour'] = fit.predicted
        choices[f'{_BASELINE} mean colour'] = fit.choice
        notes += [f'mean colour, {note}' for note in fit.notes]
    predicted |= {
        ('knn', f'k={number} {distance}'): values
        for number, distance, values in knn(problem, k, distances)
    }
    notes += [
        f'knn: k={number} was left out: there are only {train} training samples'
        for number in k
        if number > train
    ]
    fit = fit_linear(problem, standardize)
    notes += fit.notes
    parameter = 'alpha' if problem.task == 'regression' else 'C'
    setting = f'{parameter}={fit.choice[parameter]:g}'
    predicted[fit.name, setting] = fit.predicted
    choices[f'{fit.name} {setting}'] = fit.choice
    if probe is not None:
        values = _probe_values(probe, problem)
        predicted['linear probe', probe.standardize] = values
    truth = problem.splits['test'][1]
    sizes = {f'n_{name}': count for name, count in problem.sizes.items()}
    sizes['n_groups'] = n_groups
    drawn = {
        name: draw_scores(
            problem.task, truth, values, resamples, seed, groups=problem.groups
        )
        for name, values in predicted.items()
    }
    rows, class_rows, differences = [], [], []
    counts = _count(truth, problem)
    for (method, chosen), draws in drawn.items():
        named = {'method': method, 'setting': chosen}
        rows += [
            named | {'metric': metric} | interval._asdict() | sizes
            for metric, interval in draws.intervals().items()
        ]
        class_rows += [
            named
            | {'class': label, 'metric': metric}
            | intervals[i]._asdict()
            | {'n': counts[i]}
            for i, label in enumerate(problem.classes)
            for metric, intervals in draws.intervals_by_class().items()
        ]
        differences += [
            named | {'baseline': baseline, 'metric': metric} | interval._asdict()
            for (kind, baseline), other in drawn.items()
            if kind == _BASELINE != method
            for metric, interval in draws.less(other).items()
        ]
    notes += _not_better(differences)
    return Results(
        pd.DataFrame(rows, columns=COLUMNS),
        pd.DataFrame(class_rows, columns=CLASS_COLUMNS),
        pd.DataFrame(differences, columns=DIFFERENCE_COLUMNS),
        problem.task,
        problem.classes,
        problem.sizes,
        n_groups,
        problem.grouped_by,
        truth,
        {' '.join(name): values for name, values in predicted.items()},
        choices,
        tuple(notes),
        problem.provenance,
        {'standardize': standardize, 'resamples': resamples, 'seed': seed},
    )


def _probe_values(probe: LinearProbe, problem: Problem) -> NDArray[np.float64]:
    features = torch.from_numpy(problem.splits['test'][0]).to(probe.device)
    values = probe.eval().probabilities(features)
    return values.cpu().numpy().astype(np.float64)


def _count(truth: NDArray[Any], problem: Problem) -> list[int]:
    """Count the test samples of each class."""
    several = problem.task == 'multilabel'
    there = truth if several else truth[:, None] == np.arange(len(problem.classes))
    counts: list[int] = there.astype(np.int64).sum(axis=0).tolist()
    return counts


def _not_better(differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the methods whose first metric may be that of a baseline, or less."""
    metric = differences[0]['metric']
    names: dict[str, list[str]] = {}
    for row in differences:
        if row['metric'] == metric and row['low'] <= 0:
            name = f'{row["method"]} {row["setting"]}'
            names.setdefault(row['baseline'], []).append(name)
    return [
        f'not shown to be better than {baseline}: {", ".join(found)} (the interval of '
        f'the difference in {metric} includes 0, or lies below)'
        for baseline, found in names.items()
    ]


def _text(value: float, low: float, high: float, sign: str = '-') -> str:
    if not np.isfinite(low):
        return f'{value:{sign}z.3f}'
    return f'{value:{sign}z.3f} [{low:{sign}z.3f}, {high:{sign}z.3f}]'
