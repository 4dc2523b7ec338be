"""Pictures of chips and of their features, as matplotlib figures.

Figures are made without pyplot: they have no window and no global state. Save one with
``figure.savefig('picture.png')``.
"""

from dynamicvis_geo.plotting.colours import (
    PCAColours,
    fit_map_colours,
    map_picture,
    pca_false_colour,
    stretch_limits,
    stretch_rgb,
)
from dynamicvis_geo.plotting.confusion import plot_confusion_matrix
from dynamicvis_geo.plotting.features import plot_features, plot_rgb, plot_sheet
from dynamicvis_geo.plotting.maps import (
    embedding_colours,
    plot_embedding_map,
    plot_footprints,
)
from dynamicvis_geo.plotting.neighbours import nearest_neighbours, plot_neighbours
from dynamicvis_geo.plotting.similar import plot_similar

__all__ = [
    'PCAColours',
    'embedding_colours',
    'fit_map_colours',
    'map_picture',
    'nearest_neighbours',
    'pca_false_colour',
    'plot_confusion_matrix',
    'plot_embedding_map',
    'plot_features',
    'plot_footprints',
    'plot_neighbours',
    'plot_rgb',
    'plot_sheet',
    'plot_similar',
    'stretch_limits',
    'stretch_rgb',
]
