import numpy as np
import pandas as pd
import pytest

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.plotting import (
    pca_false_colour,
    plot_features,
    plot_rgb,
    stretch_limits,
    stretch_rgb,
)
from dynamicvis_geo.plotting.features import chip_label, chip_names


def test_bands_keep_their_proportions_and_missing_pixels_are_white() -> None:
    ramp = np.linspace(100, 1000, 64).reshape(8, 8)
    image = np.stack([ramp, 2 * ramp, np.full((8, 8), 100.0)])
    image[1, 0, 0] = np.nan
    picture = stretch_rgb(image, percentiles=(0, 100))
    assert picture.shape == (8, 8, 3)
    assert picture[-1, -1].tolist() == pytest.approx([900 / 1900, 1, 0])
    assert picture[0, 0].tolist() == [1, 1, 1]
    grey = stretch_rgb(np.full((1, 4, 5), 7, np.uint8))
    assert grey.shape == (4, 5, 3)
    assert np.isfinite(grey).all()


def test_images_share_a_stretch() -> None:
    dark, bright = np.full((3, 4, 4), 100.0), np.full((3, 4, 4), 900.0)
    bright[:, 0] = np.nan
    limits = stretch_limits([dark, bright], (0, 100))
    assert limits == (100, 900)
    assert stretch_rgb(dark, limits=limits).max() == 0
    assert stretch_limits([np.full((3, 2, 2), np.nan)]) == (0, 1)


@pytest.mark.parametrize('shape', [(2, 4, 4), (4, 4), (3, 0, 4)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match=r'\[3, height, width\]'):
        plot_rgb(np.zeros(shape))


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
        'features, 5 x 4 cells, 8 channels',
    ]
    assert '% of the variance' in figure.axes[1].get_xlabel()


def test_chips_have_the_names_of_their_points_and_dates() -> None:
    chips = pd.DataFrame(
        {
            'id': ['EPSG32618_x1_y2', 'EPSG32618_x3_y4', 'c'],
            'point_id': ['plot_17', None, 'plot 5'],
            'start': pd.to_datetime(['2022-06-01', '2022-06-01', None]),
            'end': pd.to_datetime(['2022-08-31', '2022-08-31', None]),
        }
    )
    names = chip_names(chips)
    assert names == ['plot_17\n2022-06-01 to 2022-08-31', 'EPSG32618_x3_y4', 'plot 5']
    assert chip_label(names[0]) == names[0]
    assert chip_names(chips[['id']]) == chips['id'].tolist()
    long = f'{"z" * 90}\n2022-06-01'
    assert chip_label(long).splitlines()[-1] == '2022-06-01'
