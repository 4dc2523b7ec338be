import numpy as np
import pytest

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.plotting import pca_false_colour, plot_features, stretch_rgb


def test_stretch_uses_each_band_and_survives_flat_and_missing_values() -> None:
    image = np.stack(
        [
            np.linspace(100, 9000, 64).reshape(8, 8),
            np.full((8, 8), 7.0),
            np.where(np.eye(8) > 0, np.nan, np.linspace(0, 1, 64).reshape(8, 8)),
        ]
    )
    picture = stretch_rgb(image)
    assert picture.shape == (8, 8, 3)
    assert picture.min() == 0
    assert picture.max() == 1
    assert picture[..., 1].max() == 0
    assert picture[0, 0, 2] == 0


def test_one_pca_gives_equal_cells_of_different_maps_equal_colours() -> None:
    generator = np.random.default_rng(0)
    one = generator.normal(size=(16, 4, 6)).astype(np.float32)
    other = generator.normal(size=(16, 5, 3)).astype(np.float32) * 3
    other[:, 2, 1] = one[:, 3, 3]
    first, second = pca_false_colour([one, other])
    assert first.shape == (4, 6, 3)
    assert second.shape == (5, 3, 3)
    assert np.array_equal(second[2, 1], first[3, 3])
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 20


def test_maps_too_small_for_three_components_are_refused() -> None:
    with pytest.raises(SpecError, match='1 cells of 768 channels'):
        pca_false_colour([np.zeros((768, 1, 1), np.float32)])


def test_figure_shows_image_and_features() -> None:
    generator = np.random.default_rng(0)
    figure = plot_features(
        generator.integers(0, 9000, (3, 40, 50)).astype(np.uint16),
        generator.normal(size=(8, 4, 5)),
        'A title',
    )
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        'image, 50 x 40 pixels',
        'features, 5 x 4 cells, 8 channels (PCA)',
    ]
