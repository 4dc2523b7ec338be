"""Scores of features: labels, splits, simple models and their metrics."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamicvis_geo.evaluation.labels import JoinedLabels, join_labels
    from dynamicvis_geo.evaluation.results import Results, evaluate

# Data modules use the labels and splits, which need no scikit-learn.
_MODULES = {
    'JoinedLabels': 'labels',
    'Results': 'results',
    'evaluate': 'results',
    'join_labels': 'labels',
}

__all__ = ('JoinedLabels', 'Results', 'evaluate', 'join_labels')


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{_MODULES[name]}'), name)
