"""Words and signs that a figure must not go without."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pyproj import CRS, Geod, Transformer

from dynamicvis_geo.plotting.cartography import (
    SCALE_TOLERANCE,
    draw_north,
    draw_scale_bar,
    extent_words,
)
from dynamicvis_geo.terms import random_weights

#: Written on whatever was made with random weights.
RANDOM_WEIGHTS = 'random weights: colours and distances mean nothing'

# Degrees that north may be off from up: at the edges of a UTM zone it is 3.
_NORTH_TOLERANCE = 5.0
_WGS84 = Geod(ellps='WGS84')


def mark_random_weights(figure: Figure, provenance: Mapping[str, Any]) -> None:
    """Say above a figure that its features are those of random weights, if they are.

    Args:
        figure: With all its texts; the words become the last line of its title.
        provenance: Of the output that it shows.
    """
    title = figure.get_suptitle()
    if random_weights(provenance) and RANDOM_WEIGHTS not in title:
        figure.suptitle(
            f'{title}\n{RANDOM_WEIGHTS}'.lstrip(),
            fontsize=10,
            wrap=True,
            parse_math=False,
        )


def add_legend(figure: Figure, handles: Sequence[Artist], **settings: Any) -> None:
    """Draw a legend whose texts are shown as they are, also with dollar signs.

    Args:
        figure: To be drawn on.
        handles: With their labels.
        settings: Further arguments of ``Figure.legend``.
    """
    legend = figure.legend(
        handles=handles, fontsize=8, title_fontsize=9, frameon=False, **settings
    )
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_parse_math(False)


def mark_ground(
    axes: Axes, crs: str, bounds: tuple[float, float, float, float]
) -> None:
    """Give a picture of the ground its extent, a scale bar and north.

    A scale bar is drawn where its length is the same all over the picture, and north
    where it is up.

    Args:
        axes: Those of one picture, north up; they get the units of the CRS.
        crs: Of the picture.
        bounds: West, south, east and north, CRS units.
    """
    west, south, east, north = bounds
    # Where the picture is widest, in its middle, and where it is least wide.
    x, y = (
        np.tile([west, (west + east) / 2, east], 3),
        np.repeat([south, (south + north) / 2, north], 3),
    )
    step = (east - west) / 1000
    to_lonlat = Transformer.from_crs(crs, 'EPSG:4326', always_xy=True)
    here, right, above = (
        to_lonlat.transform(*place) for place in ((x, y), (x + step, y), (x, y + step))
    )
    metres = _WGS84.inv(*here, *right)[2] / step
    azimuths, _, upwards = _WGS84.inv(*here, *above)
    axes.images[0].set_extent((west, east, south, north))
    axes.set_aspect(upwards[4] / step / metres[4])
    if np.ptp(metres) <= SCALE_TOLERANCE * metres[4]:
        draw_scale_bar(axes, metres[4])
    if np.abs(azimuths).max() <= _NORTH_TOLERANCE:
        draw_north(axes)
    words = extent_words(CRS.from_user_input(crs), bounds).replace('; ', '\n')
    axes.set_xlabel(words, fontsize=7, parse_math=False)
