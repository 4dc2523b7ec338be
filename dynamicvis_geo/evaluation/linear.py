"""Linear models in closed form or by L-BFGS, their regularisation chosen by validation.

Each strength of the grid is fitted on the training split and scored on the validation
split; the best (of equals the strongest) is fitted again on both together. Features are
standardised by the statistics of the training split alone, in both fits.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
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

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LinearFit:
    """What a linear model predicts for the test split.

    Attributes:
        name: 'logistic' or 'ridge'.
        predicted: Probabilities ``[n, C]``, or values ``[n]`` for regression.
        choice: The chosen strength, the scores of all of them on the validation split,
            and whether the final fit converged.
        notes: What a reader of the results should know.
    """

    name: str
    predicted: Floats
    choice: dict[str, Any]
    notes: tuple[str, ...]


class _Model(Protocol):
    def fit(self, x: Floats, y: NDArray[Any]) -> bool:
        """Fit, and say whether it converged."""

    def predict(self, x: Floats) -> Floats:
        """Give probabilities or values."""


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
    scale = _scaler(standardize, problem.splits['train'][0])
    inputs: dict[str, Floats] = {
        # scikit-learn refuses to transform nothing.
        name: scale.transform(x) if len(x) else x
        for name, x in (
            (n, x.astype(np.float64)) for n, (x, _) in problem.splits.items()
        )
    }
    labels = {name: y for name, (_, y) in problem.splits.items()}
    regression = problem.task == 'regression'
    grid = ALPHA_GRID if regression else C_GRID
    name, parameter = ('ridge', 'alpha') if regression else ('logistic', 'C')
    choice: dict[str, Any] = {'standardize': standardize, parameter: 1.0}
    notes = []
    if len(labels['val']):
        swept = _sweep(problem, grid, inputs, labels)
        best = max(swept, key=lambda strength: swept[strength])
        choice |= {
            parameter: best,
            'chosen_by': CHOSEN_BY[problem.task],
            'validation': {f'{strength:g}': value for strength, value in swept.items()},
        }
        if best in (grid[0], grid[-1]):
            notes.append(
                f'{name}: the best {parameter}, {best:g}, is at the end of the grid '
                f'{min(grid):g} to {max(grid):g}'
            )
    both = (
        np.concatenate([inputs['train'], inputs['val']]),
        np.concatenate([labels['train'], labels['val']]),
    )
    model = _model(problem, choice[parameter], ITERATIONS)
    choice['converged'] = model.fit(*both)
    if not choice['converged']:
        notes.append(
            f'{name}: the fit had not converged after {ITERATIONS[-1]} iterations; its '
            'scores could be better'
        )
    return LinearFit(name, model.predict(inputs['test']), choice, tuple(notes))


def _scaler(standardize: str, features: NDArray[np.float32]) -> Any:
    scalers = {
        'none': FunctionTransformer,
        'zscore': StandardScaler,
        'batchnorm': StandardScaler,
        'l2': Normalizer,
    }
    if standardize not in scalers:
        raise SpecError(
            f'standardize={standardize!r} is unknown: choose one of '
            f'{", ".join(scalers)}'
        )
    return scalers[standardize]().fit(features.astype(np.float64))


def _sweep(
    problem: Problem,
    grid: tuple[float, ...],
    inputs: dict[str, Floats],
    labels: dict[str, NDArray[Any]],
) -> dict[float, float]:
    """Score each strength on the validation split; strongest first."""
    metric = CHOSEN_BY[problem.task]
    values = {}
    for strength in grid:
        model = _model(problem, strength, ITERATIONS[:1])
        model.fit(inputs['train'], labels['train'])
        found = scores(problem.task, labels['val'], model.predict(inputs['val']))
        value = float(found[metric][0])
        # Undefined on this split (one class, a constant target): nothing to choose by.
        values[strength] = value if np.isfinite(value) else -np.inf
    return values


def _model(problem: Problem, strength: float, iterations: tuple[int, ...]) -> _Model:
    if problem.task == 'regression':
        return _Ridge(strength)
    if problem.task == 'multilabel':
        return _OneVsRest(strength, iterations)
    return _Logistic(strength, iterations, len(problem.classes))


class _Ridge:
    def __init__(self, alpha: float) -> None:
        self._model = Ridge(alpha)

    def fit(self, x: Floats, y: NDArray[Any]) -> bool:
        self._model.fit(x, y)
        return True

    def predict(self, x: Floats) -> Floats:
        values: Floats = self._model.predict(x)
        return values


class _Logistic:
    """Multinomial logistic regression; classes without samples have probability 0."""

    def __init__(self, c: float, iterations: tuple[int, ...], classes: int) -> None:
        self._c, self._iterations, self._classes = c, iterations, classes

    def fit(self, x: Floats, y: NDArray[Any]) -> bool:
        for iterations in self._iterations:
            self._model = LogisticRegression(C=self._c, max_iter=iterations)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter('always')
                self._model.fit(x, y)
            failed = [w for w in caught if issubclass(w.category, ConvergenceWarning)]
            for warning in caught:
                if warning not in failed:
                    warnings.warn(warning.message, stacklevel=2)
            if not failed:
                return True
        return False

    def predict(self, x: Floats) -> Floats:
        values = np.zeros((len(x), self._classes))
        values[:, self._model.classes_] = self._model.predict_proba(x)
        return values


class _OneVsRest:
    """A logistic regression a class; the share of a class that never varies."""

    def __init__(self, c: float, iterations: tuple[int, ...]) -> None:
        self._c, self._iterations = c, iterations

    def fit(self, x: Floats, y: NDArray[Any]) -> bool:
        self._models = [_Logistic(self._c, self._iterations, 2) for _ in y.T]
        self._shares = y.mean(axis=0)
        converged = [
            model.fit(x, column)
            for model, column in zip(self._models, y.T, strict=True)
            if np.ptp(column)
        ]
        return all(converged)

    def predict(self, x: Floats) -> Floats:
        columns = [
            model.predict(x)[:, 1] if 0 < share < 1 else np.full(len(x), share)
            for model, share in zip(self._models, self._shares, strict=True)
        ]
        return np.stack(columns, axis=1)
