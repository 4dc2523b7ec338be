import math

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnchoredOffsetbox

from dynamicvis_geo.plotting.marks import (
    RANDOM_WEIGHTS,
    mark_ground,
    mark_random_weights,
)

RANDOM = {'model': {'backbone': {'weights': 'random'}}}


def test_random_weights_are_said_once_under_the_title() -> None:
    figure = Figure()
    figure.suptitle('Price: $5')
    mark_random_weights(figure, RANDOM)
    mark_random_weights(figure, RANDOM)
    assert figure.get_suptitle().splitlines() == ['Price: $5', RANDOM_WEIGHTS]
    bare = Figure()
    mark_random_weights(bare, RANDOM)
    assert bare.get_suptitle() == RANDOM_WEIGHTS


def test_others_are_left_as_they_are() -> None:
    figure = Figure()
    for provenance in ({}, {'model': {'backbone': {'weights': 'pretrained'}}}):
        mark_random_weights(figure, provenance)
    assert figure.get_suptitle() == ''


def picture(crs: str, bounds: tuple[float, float, float, float]) -> Axes:
    axes = Figure().subplots()
    axes.imshow(np.zeros((4, 8, 3)))
    mark_ground(axes, crs, bounds)
    return axes


@pytest.mark.parametrize(
    ('crs', 'bounds', 'aspect', 'signs'),
    [
        ('EPSG:32632', (4e5, 5.2e6, 4.2e5, 5.21e6), 1, 2),
        ('EPSG:4326', (9.0, 59.9, 9.2, 60.0), 2, 2),
        # A degree is twice as long at 60 degrees.
        ('EPSG:4326', (0.0, 0.0, 60.0, 60.0), 1 / math.cos(math.radians(30)), 1),
        # Beside the pole, north is to the left.
        ('EPSG:3413', (6e5, 0.0, 6.2e5, 1e4), 1, 1),
    ],
)
def test_a_scale_bar_and_north_are_drawn_where_they_are_true(
    crs: str, bounds: tuple[float, float, float, float], aspect: float, signs: int
) -> None:
    axes = picture(crs, bounds)
    boxes = [a for a in axes.get_children() if isinstance(a, AnchoredOffsetbox)]
    assert len(boxes) == signs
    assert axes.get_aspect() == pytest.approx(aspect, rel=0.02)
    assert axes.get_xlim() == (bounds[0], bounds[2])
    assert axes.get_ylim() == (bounds[1], bounds[3])
    assert axes.get_xlabel().startswith(crs)
