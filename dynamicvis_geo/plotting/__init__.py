"""Pictures of chips and of their features, as matplotlib figures.

Figures are made without pyplot: they have no window and no global state. Save one with
``figure.savefig('picture.png')``.
"""

from dynamicvis_geo.plotting.confusion import plot_confusion_matrix
from dynamicvis_geo.plotting.features import (
    pca_false_colour,
    plot_features,
    stretch_rgb,
)

__all__ = [
    'pca_false_colour',
    'plot_confusion_matrix',
    'plot_features',
    'stretch_rgb',
]
