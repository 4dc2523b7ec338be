"""The vectors that are most similar to examples, found by going through all."""

from collections.abc import Iterable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

T = TypeVar('T', np.float32, np.float64)

#: Lengths whose squares float32 holds well enough.
_LEAST, _MOST = 1e-15, 1e19


def unit_vectors(vectors: NDArray[np.floating]) -> Floats:
    """Scale vectors to length 1.

    Args:
        vectors: ``[n, D]``.

    Returns:
        float64 ``[n, D]``; NaN where one is zero or not finite, and has no direction.
    """
    exact = np.asarray(vectors, np.float64)
    with np.errstate(divide='ignore', invalid='ignore'):
        units: Floats = exact / np.sqrt(np.einsum('ij,ij->i', exact, exact))[:, None]
    return units


def direction_of(like: NDArray[np.floating], unlike: NDArray[np.floating]) -> Floats:
    """Compute the direction in which vectors are like examples.

    The product of a unit vector with it is the mean of its cosines with the examples
    less the mean of its cosines with the counter-examples.

    Args:
        like: Examples, ``[n, D]``, at least one; all have a direction.
        unlike: Counter-examples, ``[m, D]``; there may be none.

    Returns:
        float64 ``[D]``.
    """
    towards: Floats = unit_vectors(like).mean(axis=0)
    return towards - unit_vectors(unlike).mean(axis=0) if len(unlike) else towards


def most_similar(
    blocks: Iterable[tuple[int, NDArray[np.float32]]],
    direction: Floats,
    k: int,
    without: Ints,
) -> tuple[Ints, Floats]:
    """Find the rows that point most into a direction.

    All rows are looked at in float32; those that may be among the best, whatever its
    rounding, again in float64. What is found is exact, then, and rows that are equal
    have equal values wherever they lie.

    Args:
        blocks: Number of the first row, and float32 ``[n, D]``. Rows that are zero or
            not finite have no direction and are left out.
        direction: ``[D]``.
        k: How many rows, fewer if there are fewer.
        without: Rows that are left out.

    Returns:
        Numbers of rows, the most similar first, equals in the order of their numbers;
        and the products of their unit vectors with the direction.
    """
    rough = direction.astype(np.float32)
    # The worst that sums of D products in float32 can be wrong by.
    margin = np.linalg.norm(direction) * (len(direction) + 8) * np.finfo(np.float32).eps
    rows, values, least = np.empty(0, np.int64), np.empty(0), -np.inf
    for first, vectors in blocks:
        about, lengths = _products(vectors, rough)
        about[(lengths < _LEAST) | (lengths > _MOST)] = np.inf
        found = np.flatnonzero(about >= least - margin)
        found = found[~np.isin(first + found, without)]
        exact, _ = _products(vectors[found].astype(np.float64), direction)
        known = np.isfinite(exact)
        rows = np.concatenate([rows, first + found[known]])
        values = np.concatenate([values, exact[known]])
        if len(rows) >= 2 * k:
            rows, values = _best(rows, values, k)
            least = values[-1]
    return _best(rows, values, k)


def _products(
    vectors: NDArray[T], direction: NDArray[T]
) -> tuple[NDArray[T], NDArray[T]]:
    """Multiply unit vectors with a direction; gives the lengths they had, too."""
    # Row by row, unlike a product of matrices, where neighbours decide rounding.
    with np.errstate(over='ignore', divide='ignore', invalid='ignore'):
        lengths = np.sqrt(np.einsum('ij,ij->i', vectors, vectors))
        return np.einsum('ij,j->i', vectors, direction) / lengths, lengths


def _best(rows: Ints, values: Floats, k: int) -> tuple[Ints, Floats]:
    order = np.lexsort((rows, -values))[:k]
    return rows[order], values[order]
