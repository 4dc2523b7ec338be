import numpy as np
import pytest
from sklearn.decomposition import PCA

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.plotting import PCAColours, pca_false_colour


def test_colours_are_missing_where_a_vector_is_and_the_fit_ignores_it() -> None:
    vectors = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    colours = PCAColours.fit(vectors)(vectors)
    assert colours.min() == 0
    assert colours.max() == 1
    broken = np.vstack([vectors, np.full((1, 6), np.nan)])
    again = PCAColours.fit(broken)(broken)
    assert np.allclose(again[:-1], colours, atol=1e-6)
    assert np.isnan(again[-1]).all()


@pytest.mark.parametrize('shape', [(1, 8), (2, 8), (9, 1), (9, 2)])
def test_components_that_are_not_there_are_grey(shape: tuple[int, int]) -> None:
    vectors = np.random.default_rng(0).normal(size=shape)
    fitted = PCAColours.fit(vectors)
    colours = fitted(vectors)
    there = min(shape[0] - 1, shape[1])
    assert (fitted.explained[:there] > 0).all()
    assert colours[:, there:] == pytest.approx(0.5)


def test_equal_vectors_are_grey_not_coloured_by_rounding() -> None:
    vectors = np.full((50, 4), 1.1, np.float32)
    vectors[::2] = np.nextafter(vectors[0, 0], np.float32(2))
    assert PCAColours.fit(vectors)(vectors) == pytest.approx(0.5, abs=1e-4)


def test_maps_that_cannot_share_colours_are_refused() -> None:
    one, other = np.ones((8, 4, 4)), np.ones((9, 4, 4))
    with pytest.raises(SpecError, match='8 and 9 channels'):
        pca_false_colour([one, other])
    with pytest.raises(SpecError, match='0 cells'):
        pca_false_colour([])
    with pytest.raises(SpecError, match='none is finite'):
        PCAColours.fit(np.full((4, 4), np.nan))
    fitted = PCAColours.fit(np.random.default_rng(0).normal(size=(9, 8)))
    with pytest.raises(SpecError, match='fitted to 8'):
        fitted(other.T)


def test_less_variance_shows_less_colour() -> None:
    vectors = np.random.default_rng(0).normal(size=(5000, 4)) * [10, 1, 0.1, 0.01]
    fitted = PCAColours.fit(vectors)
    spread = np.ptp(np.percentile(fitted(vectors), (5, 95), axis=0), axis=0)
    assert spread[0] > 0.6
    assert spread[1] / spread[0] == pytest.approx(0.1, rel=0.1)
    assert spread[2] / spread[0] == pytest.approx(0.01, rel=0.1)
    assert (fitted.low + fitted.high) / 2 == pytest.approx(
        np.percentile((vectors - fitted.mean) @ fitted.components.T, (1, 99), axis=0)
        .mean(axis=0)
        .tolist(),
        abs=1e-3,
    )
    assert fitted.shares == '99.0, 1.0 and 0.0 % of the variance'


def test_shares_leave_out_components_that_are_not_there() -> None:
    ramp = np.arange(8.0)[:, None]
    assert PCAColours.fit(ramp).shares == '100 % of the variance'
    assert PCAColours.fit(ramp).words.endswith('green and blue: 100 % of the variance')
    assert PCAColours.fit(np.ones((5, 3))).shares == 'all are the same'


@pytest.mark.parametrize('count', [5, 40, 400])
def test_components_are_those_of_scikit_learn(count: int) -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(count, 40)) * np.geomspace(9, 0.1, 40) + 100
    fitted = PCAColours.fit(vectors)
    theirs = PCA(3).fit(vectors)
    assert np.allclose(fitted.explained, theirs.explained_variance_ratio_, atol=1e-5)
    along = (fitted.components * theirs.components_).sum(axis=1)
    assert np.allclose(np.abs(along), 1, atol=1e-4)
