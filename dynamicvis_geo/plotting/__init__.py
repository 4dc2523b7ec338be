"""Pictures of chips and of their features, as matplotlib figures.

Figures are made without pyplot: they have no window and no global state. Save one with
``figure.savefig('picture.png')``.
"""

from typing import TYPE_CHECKING

from dynamicvis_geo.lazy import importer

if TYPE_CHECKING:
    from dynamicvis_geo.plotting.change import plot_change_map, plot_change_sheet
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
        plot_column_map,
        plot_embedding_map,
        plot_footprints,
    )
    from dynamicvis_geo.plotting.neighbours import nearest_neighbours, plot_neighbours
    from dynamicvis_geo.plotting.similar import plot_similar

# Each kind of picture has needs of its own.
_MODULES = {
    'PCAColours': 'plotting.colours',
    'embedding_colours': 'plotting.maps',
    'fit_map_colours': 'plotting.colours',
    'map_picture': 'plotting.colours',
    'nearest_neighbours': 'plotting.neighbours',
    'pca_false_colour': 'plotting.colours',
    'plot_change_map': 'plotting.change',
    'plot_change_sheet': 'plotting.change',
    'plot_column_map': 'plotting.maps',
    'plot_confusion_matrix': 'plotting.confusion',
    'plot_embedding_map': 'plotting.maps',
    'plot_features': 'plotting.features',
    'plot_footprints': 'plotting.maps',
    'plot_neighbours': 'plotting.neighbours',
    'plot_rgb': 'plotting.features',
    'plot_sheet': 'plotting.features',
    'plot_similar': 'plotting.similar',
    'stretch_limits': 'plotting.colours',
    'stretch_rgb': 'plotting.colours',
}

__all__ = [
    'PCAColours',
    'embedding_colours',
    'fit_map_colours',
    'map_picture',
    'nearest_neighbours',
    'pca_false_colour',
    'plot_change_map',
    'plot_change_sheet',
    'plot_column_map',
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

__getattr__ = importer(__name__, _MODULES)
