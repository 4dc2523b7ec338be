"""What is found, against all cosines in float64."""

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from dynamicvis_geo.similarity.search import direction_of, most_similar, unit_vectors

pytestmark = pytest.mark.once

Found = tuple[NDArray[np.int64], NDArray[np.float64]]


def blocks(vectors: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    buffer = np.empty((size, vectors.shape[1]), np.float32)
    for first in range(0, len(vectors), size):
        some = buffer[: len(vectors) - first]
        some[:] = vectors[first : first + size]
        yield first, some


def oracle(
    vectors: np.ndarray, like: np.ndarray, unlike: np.ndarray, without: list[int]
) -> Found:
    """Mean cosines with examples, less those with counter-examples, one by one."""
    exact = vectors.astype(np.float64)
    values = np.zeros(len(exact))
    for examples, sign in ((like, 1), (unlike, -1)):
        for example in examples.astype(np.float64):
            cosine = exact @ example / np.linalg.norm(exact, axis=1)
            values += sign * cosine / np.linalg.norm(example) / len(examples)
    values[without] = np.nan
    rows = np.flatnonzero(np.isfinite(values))
    order = rows[np.lexsort((rows, -values[rows].round(13)))]
    return order, values[order]


@pytest.mark.parametrize('size', [1, 7, 64, 1000])
@pytest.mark.parametrize('spread', [1.0, 1e-2, 1e-4])
def test_the_best_are_those_of_all_cosines_in_float64(size: int, spread: float) -> None:
    # With little spread, float32 cannot tell neighbours apart.
    random = np.random.default_rng(size)
    vectors = (1 + spread * random.normal(size=(500, 24))).astype(np.float32)
    like, unlike = vectors[:3], vectors[10:12]
    expected, values = oracle(vectors, like, unlike, [0, 1, 2, 10, 11])
    found, similarity = most_similar(
        blocks(vectors, size),
        direction_of(like, unlike),
        9,
        np.array([0, 1, 2, 10, 11]),
    )
    np.testing.assert_allclose(similarity, values[:9], rtol=0, atol=1e-12)
    known = dict(zip(expected.tolist(), values, strict=True))
    np.testing.assert_allclose([known[row] for row in found], values[:9], atol=1e-12)


def test_equals_are_in_the_order_of_rows_wherever_they_lie() -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(300, 13)).astype(np.float32)
    twins = [3, 50, 51, 128, 299]
    vectors[twins] = vectors[3]
    for size in (1, 10, 128, 300):
        found, similarity = most_similar(
            blocks(vectors, size),
            direction_of(vectors[3:4], vectors[:0]),
            4,
            np.empty(0, np.int64),
        )
        assert found.tolist() == twins[:4]
        assert len(set(similarity.tolist())) == 1
        assert similarity[0] == pytest.approx(1, abs=1e-12)


def test_lengths_do_not_count_and_what_has_no_direction_is_nowhere() -> None:
    vectors = np.array(
        [[1, 1], [2e30, 1e30], [1e-30, 0], [0, 0], [np.nan, 1], [np.inf, 1], [-1, 0]],
        np.float32,
    )
    found, similarity = most_similar(
        blocks(vectors, 3), np.array([1.0, 0.0]), 10, np.empty(0, np.int64)
    )
    assert found.tolist() == [2, 1, 0, 6]
    assert similarity == pytest.approx([1, 2 / 5**0.5, 0.5**0.5, -1])
    assert np.isnan(unit_vectors(vectors[3:4])).all()
