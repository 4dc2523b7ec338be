"""Scores of features: labels, splits, simple models and their metrics."""

from typing import TYPE_CHECKING

from dynamicvis_geo.lazy import importer

if TYPE_CHECKING:
    from dynamicvis_geo.evaluation.labels import JoinedLabels, join_labels
    from dynamicvis_geo.evaluation.results import Results, evaluate

# Data modules use the labels and splits, which need no scikit-learn.
_MODULES = {
    'JoinedLabels': 'evaluation.labels',
    'Results': 'evaluation.results',
    'evaluate': 'evaluation.results',
    'join_labels': 'evaluation.labels',
}

__all__ = ('JoinedLabels', 'Results', 'evaluate', 'join_labels')

__getattr__ = importer(__name__, _MODULES)
