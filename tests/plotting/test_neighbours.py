from io import BytesIO

import numpy as np
import pytest

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.plotting import nearest_neighbours, plot_neighbours

EMBEDDINGS = np.array(
    [[1, 0], [2, 0.1], [0, 3], [-1, 0], [0, 0], [np.nan, 1], [1, 1]], np.float32
)


def test_neighbours_are_ordered_by_angle_not_by_length() -> None:
    rows, similarity = nearest_neighbours(EMBEDDINGS, 0, k=10)
    assert rows.tolist() == [1, 6, 2, 3]
    expected = [2 / np.hypot(2, 0.1), np.sqrt(0.5), 0, -1]
    assert similarity == pytest.approx(expected, abs=1e-6)
    assert nearest_neighbours(EMBEDDINGS, 0, k=2)[0].tolist() == [1, 6]


def test_sheet_shows_images_or_places_and_names_them() -> None:
    ids = [f'EPSG32618_x{i}_$y_{"z" * 60}' for i in range(7)]
    lonlat = (np.linspace(10, 11, 7), np.linspace(50, 51, 7))
    figure = plot_neighbours(
        EMBEDDINGS,
        ids,
        0,
        k=3,
        images=lambda row: None if row == 6 else np.full((3, 8, 8), 100 * row),
        lonlat=lonlat,
    )
    assert len(figure.axes) >= 4
    captions = [axes.get_xlabel() for axes in figure.axes[:4]]
    assert captions[0].startswith('query\nEPSG32618_x0')
    assert captions[1].startswith('similarity 0.99')
    assert [len(axes.images) for axes in figure.axes[:4]] == [1, 1, 0, 1]
    assert figure.axes[2].collections
    figure.savefig(BytesIO())


def test_places_across_the_antimeridian_stay_together() -> None:
    lonlat = (np.array([179.8, -179.8, 179.9, 180, -179.9, 179.7, 179.6]), np.zeros(7))
    figure = plot_neighbours(EMBEDDINGS, list('abcdefg'), 0, k=1, lonlat=lonlat)
    assert np.ptp(figure.axes[0].get_xlim()) < 1


@pytest.mark.parametrize(
    ('query', 'k', 'message'),
    [
        (7, 3, 'none of the 7 rows'),
        (-1, 3, 'none of the 7 rows'),
        (4, 3, 'no direction'),
        (5, 3, 'no direction'),
        (0, 0, 'k=0'),
    ],
)
def test_queries_without_an_answer_are_refused(
    query: int, k: int, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        nearest_neighbours(EMBEDDINGS, query, k)


def test_a_single_chip_has_no_neighbours() -> None:
    with pytest.raises(SpecError, match='no neighbours'):
        plot_neighbours(EMBEDDINGS[:1], ['a'], 0)
    with pytest.raises(SpecError, match='1 entries for 7'):
        plot_neighbours(EMBEDDINGS, ['a'], 0)
