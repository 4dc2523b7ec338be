import numpy as np
import pytest
import shapely

from dynamicvis_geo.report.places import PLACES, PlaceMap, place_map


def draw(shapes: list[object], failed: list[object] | None = None) -> PlaceMap:
    drawn = place_map(
        'chips',
        np.array(shapes, object),
        np.tile(np.array([1, 0, 0.5], np.float32), (len(shapes), 1)),
        lambda row: f'place {row}',
        np.array(failed or [], object),
        lambda row: f'failure {row}',
    )
    assert drawn is not None
    return drawn


def corners(path: str) -> np.ndarray:
    """Corners ``[n, 2]`` of a path of straight lines."""
    pairs = path.replace('M', 'L').replace('z', '').replace('h0', '').split('L')[1:]
    return np.array([pair.split() for pair in pairs], float)


def test_squares_on_the_ground_are_squares_north_up_beside_a_true_scale_bar() -> None:
    # 0.01 degrees at 60 degrees north: 558 m to the east, 1114 m to the north.
    north = shapely.box(10.0, 60.02, 10.02, 60.03)
    south = shapely.box(10.02, 60.0, 10.04, 60.01)
    drawn = draw([north, south], failed=[shapely.Point(10.02, 60.015)])
    one, other = (corners(mark.path) for mark in drawn.marks)
    assert [mark.title for mark in drawn.marks] == ['place 0', 'place 1']
    assert drawn.marks[0].colour == '#ff0080'
    assert one[:, 1].max() < other[:, 1].min()
    assert one[:, 0].max() == pytest.approx(other[:, 0].min(), abs=0.01)
    wide, high = np.ptp(one, axis=0)
    assert wide == pytest.approx(high, rel=0.01)
    for path in (one, other):
        assert (path > 0).all()
        assert (path < [drawn.width, drawn.height]).all()
    assert drawn.bar_metres in (200, 500, 1000)
    metres = drawn.bar_metres / (drawn.bar * drawn.width)
    assert wide * metres == pytest.approx(1116, rel=0.005)
    (cross,) = drawn.crosses
    assert cross.title == 'failure 0'
    middle = (one.mean(axis=0) + other.mean(axis=0)) / 2
    assert (cross.x, cross.y) == pytest.approx(tuple(middle), abs=0.2)
    assert not drawn.small
    assert not drawn.hidden
    assert drawn.bar_at == ''


def test_places_across_the_antimeridian_stay_together() -> None:
    cut = shapely.MultiPolygon(
        [shapely.box(179.9, 0, 180, 0.2), shapely.box(-180, 0, -179.9, 0.2)]
    )
    drawn = draw([shapely.box(179.6, 0, 179.8, 0.2), cut])
    assert drawn.bar_metres < 50_000
    (west, halves) = (mark.path for mark in drawn.marks)
    assert halves.count('M') == 2
    across = corners(halves)[:, 0]
    assert np.ptp(across) == pytest.approx(np.ptp(corners(west)[:, 0]), rel=0.01)
    assert across.min() > corners(west)[:, 0].max()


def test_many_places_are_thinned_and_small_ones_are_seen() -> None:
    points = [shapely.Point(x, y) for x in range(-60, 60) for y in range(-30, 30)]
    drawn = draw([*points, None, shapely.Point()], failed=points[:400])
    assert len(drawn.marks) in (PLACES - 1, PLACES)
    assert drawn.thinned == '2,000 of 7,202 chips and 300 of 400 failures'
    assert drawn.small
    assert all(mark.path.endswith('h0') for mark in drawn.marks)
    assert drawn.bar_at == '0°'
    assert draw([shapely.box(10, 80, 12, 83)]).bar_at == '82°N'


def test_a_single_point_has_a_kilometre_around_it() -> None:
    drawn = draw([shapely.Point(-75, 40)])
    assert drawn.bar_metres == 200
    assert corners(drawn.marks[0].path)[0] == pytest.approx(
        [drawn.width / 2, drawn.height / 2]
    )


def test_failures_alone_are_a_map() -> None:
    drawn = draw([], failed=[shapely.Point(7, 50), shapely.box(7, 50, 8, 51)])
    assert [cross.title for cross in drawn.crosses] == ['failure 0', 'failure 1']
    assert not drawn.marks


def test_two_dates_of_a_place_are_said_to_lie_on_each_other() -> None:
    square = shapely.box(0, 0, 1, 1)
    assert draw([square, square]).hidden


def test_a_shape_of_many_corners_costs_little() -> None:
    angles = np.linspace(0, 2 * np.pi, 5000)
    radii = 1 + 0.5 * np.sin(400 * angles)
    rough = shapely.Polygon(
        np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
    )
    assert len(draw([rough]).marks[0].path) < 100


def test_nothing_with_a_place_is_no_map() -> None:
    nothing = np.array([None, shapely.Point()], object)
    colours = np.zeros((2, 3), np.float32)
    assert place_map('chips', nothing, colours, str, nothing, str) is None
