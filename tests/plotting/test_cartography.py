import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pyproj import Geod

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.plotting.cartography import (
    draw_north,
    draw_scale_bar,
    extent_words,
    metres_per_degree,
)


def map_axes(west: float, south: float, east: float, north: float) -> Axes:
    axes: Axes = Figure().subplots()
    axes.set(xlim=(west, east), ylim=(south, north))
    return axes


def drawn_length(axes: Axes) -> float:
    """Length of the scale bar in units of the axes, as it is in the picture."""
    axes.figure.draw_without_rendering()
    halves = [bar for bar in axes.findobj(Rectangle) if bar is not axes.patch]
    boxes = [bar.get_window_extent() for bar in halves]
    left, right = min(box.x0 for box in boxes), max(box.x1 for box in boxes)
    inverse = axes.transData.inverted()
    return float(inverse.transform((right, 0))[0] - inverse.transform((left, 0))[0])


@pytest.mark.parametrize(
    ('box', 'words', 'metres'),
    [
        ((11, 46.9, 12, 47.1), '10 km', 10e3),
        ((11, 46.999, 11.01, 47.001), '100 m', 100),
        ((11, 44, 21, 48), '100 km', 100e3),
    ],
)
def test_scale_bar_is_round_and_true_in_the_middle(
    box: tuple[float, float, float, float], words: str, metres: float
) -> None:
    scale = metres_per_degree(box[1], box[3])
    assert scale is not None
    axes = map_axes(*box)
    assert draw_scale_bar(axes, scale) == words
    middle, width = (box[1] + box[3]) / 2, drawn_length(axes)
    on_ground = Geod(ellps='WGS84').inv(0, middle, width, middle)[2]
    assert on_ground == pytest.approx(metres, rel=0.01)


def test_scale_bar_of_a_projected_map() -> None:
    axes = map_axes(500e3, 0, 500e3 + 2560, 2560)
    assert draw_scale_bar(axes, 1) == '500 m'
    draw_north(axes)
    assert drawn_length(axes) == pytest.approx(500, rel=0.01)
    with pytest.raises(SpecError, match='must be positive'):
        draw_scale_bar(axes, 0)


@pytest.mark.parametrize('south_north', [(35, 60), (89, 90), (-90, 90), (-89.9, -89)])
def test_no_bar_is_true_on_maps_of_continents_or_poles(
    south_north: tuple[float, float],
) -> None:
    assert metres_per_degree(*south_north) is None
    assert metres_per_degree(-5, 5) == pytest.approx(111_320, rel=1e-3)


def test_crs_and_extent_are_said() -> None:
    words = extent_words(4326, (179.5, -17.25, 180.5, -16.75))
    assert words == 'EPSG:4326, WGS 84; 179.50°E to 179.50°W, 17.25°S to 16.75°S'
    words = extent_words(4326, (-180, -60, 180, 90))
    assert words.endswith('; all longitudes, 60.0°S to 90.0°N')
    words = extent_words('EPSG:2227', (6e6, 2e6, 6.1e6, 2.1e6))
    assert '6000000 to 6100000 US survey foot E, 2000000 to' in words
    words = extent_words('EPSG:32632', (500e3, 5.2e6, 501e3, 5.201e6))
    assert 'UTM zone 32N; 500000 to 501000 m E, 5200000 to 5201000 m N' in words
