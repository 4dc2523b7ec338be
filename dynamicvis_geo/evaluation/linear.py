"""Linear models by L-BFGS or in closed form, their regularisation chosen by validation.

Each strength of the grid is fitted on the training split and scored on the validation
split; the best (of equals the strongest) is fitted again on both together. Features are
standardised by the statistics of the training split alone, in both fits.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.evaluation.metrics import CHOSEN_BY, scores
from dynamicvis_geo.evaluation.problem import Problem

#: Inverse strengths of the logistic regression (scikit-learn's C), strongest first.
C_GRID = tuple(10.0**e for e in range(-6, 5))

#: Strengths of the ridge (scikit-learn's alpha), strongest first.
ALPHA_GRID = tuple(10.0**e for e in range(6, -4, -1))

#: Iterations of L-BFGS: while choosing, and for the final fit if it needs them.
ITERATIONS = (1000, 10_000)

_SCALERS = {
    'none': FunctionTransformer,
    'zscore': StandardScaler,
    'batchnorm': StandardScaler,
    'l2': Normalizer,
}

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LinearFit:
    """Predictions of a linear model for the test split.

    Attributes:
        name: 'logistic' or 'ridge'.
        predicted: Probabilities ``[n, C]``, or values ``[n]`` for regression.
        choice: The chosen strength, the scores of all of them on the validation split,
            and whether the final fit converged.
        notes: Warnings for a reader of the results.
    """

    name: str
    predicted: Floats
    choice: dict[str, Any]
    notes: tuple[str, ...]


def fit_linear(problem: Problem, standardize: str = 'zscore') -> LinearFit:
    """Fit a logistic regression, or for regression a ridge, and predict the test split.

    Without a validation split the strength is C = 1 or alpha = 1, as in scikit-learn.

    Args:
        problem: Features and labels. Several classes at once are fitted one by one,
            with the same C.
        standardize: 'zscore' ('batchnorm' is the same here), 'l2', or 'none'.

    Returns:
        The prediction, and how it came about.

    Raises:
        SpecError: If *standardize* is unknown.
    """
    if standardize not in _SCALERS:
        raise SpecError(
            f'standardize={standardize!r} is unknown: choose one of '
            f'{", ".join(_SCALERS)}'
        )
    train = problem.sizes['train']
    x, y = (
        np.concatenate([problem.splits[name][part] for name in ('train', 'val')])
        for part in (0, 1)
    )
    scaler = _SCALERS[standardize]().fit(x[:train].astype(np.float64))
    x, test = (
        scaler.transform(features.astype(np.float64))
        for features in (x, problem.splits['test'][0])
    )
    model: Any = LogisticRegression(max_iter=ITERATIONS[0])
    name, parameter, grid = 'logistic', 'C', C_GRID
    if problem.task == 'regression':
        model, name, parameter, grid = Ridge(), 'ridge', 'alpha', ALPHA_GRID
    choice: dict[str, Any] = {'standardize': standardize, parameter: 1.0}
    notes = []
    prefix = ''
    if problem.task == 'multilabel':
        model, prefix = OneVsRestClassifier(model), 'estimator__'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ConvergenceWarning)
        # Of a class that is always or never there, and of scores that are not defined.
        warnings.filterwarnings('ignore', 'Label .* is present in all|.*non-finite')
        if len(x) > train:
            found = _sweep(problem, model, prefix + parameter, grid, x, y, train)
            # What is not defined in this split (one class, a constant target) is so for
            # all strengths: the strongest is then taken.
            best = max(grid, key=lambda strength: np.nan_to_num(found[strength]))
            model.set_params(**{prefix + parameter: best})
            choice |= {
                parameter: best,
                'chosen_by': CHOSEN_BY[problem.task],
                'validation': {f'{strength:g}': found[strength] for strength in grid},
            }
            if best in (grid[0], grid[-1]):
                notes.append(
                    f'{name}: the best {parameter}, {best:g}, is at the end of the '
                    f'grid {min(grid):g} to {max(grid):g}'
                )
        converged = _converged(model.fit(x, y))
        if not converged:
            model.set_params(**{f'{prefix}max_iter': ITERATIONS[1]})
            converged = _converged(model.fit(x, y))
    choice['converged'] = converged
    if not converged:
        notes.append(
            f'{name}: the fit had not converged after {ITERATIONS[1]} iterations; its '
            'scores could be better'
        )
    return LinearFit(name, _predict(problem, model, test), choice, tuple(notes))


def _sweep(
    problem: Problem,
    model: Any,
    parameter: str,
    grid: tuple[float, ...],
    x: Floats,
    y: NDArray[Any],
    train: int,
) -> dict[float, float]:
    """Fit each strength on the first rows, and score it on the rest."""
    metric = CHOSEN_BY[problem.task]

    def score(fitted: Any, x: Floats, y: NDArray[Any]) -> float:
        values = _predict(problem, fitted, x)
        return float(scores(problem.task, y, values)[metric][0])

    search = GridSearchCV(
        model,
        {parameter: grid},
        scoring=score,
        cv=PredefinedSplit(np.where(np.arange(len(x)) < train, -1, 0)),
        refit=False,
        error_score='raise',
    ).fit(x, y)
    found = search.cv_results_['mean_test_score'].tolist()
    return dict(zip(grid, found, strict=True))


def _predict(problem: Problem, model: Any, x: Floats) -> Floats:
    """Give values; or probabilities of all classes, also of those without samples."""
    if problem.task == 'regression':
        return np.asarray(model.predict(x))
    values = np.zeros((len(x), len(problem.classes)))
    several = problem.task == 'multilabel'
    # Of a single class, scikit-learn gives the probability of its absence as well.
    columns = slice(None) if several else model.classes_
    values[:, columns] = model.predict_proba(x)[:, -len(problem.classes) :]
    return values


def _converged(model: Any) -> bool:
    """Say whether L-BFGS ended before its last iteration; a ridge has a closed form."""
    fits = getattr(model, 'estimators_', [model])
    return all(
        fit.n_iter_.max() < fit.max_iter
        for fit in fits
        if isinstance(fit, LogisticRegression)
    )
