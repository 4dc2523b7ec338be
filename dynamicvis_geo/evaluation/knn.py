"""Nearest neighbours: the distances between features as a classifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.evaluation.problem import Problem

#: Distances by name, and as scikit-learn calls them.
DISTANCES = {'cosine': 'cosine', 'l2': 'euclidean'}


def knn(
    problem: Problem,
    k: Sequence[int] = (5, 20),
    distances: Sequence[str] = ('cosine', 'l2'),
    split: str = 'test',
) -> Iterator[tuple[int, str, NDArray[np.float64]]]:
    """Predict each sample from its nearest training samples, all of equal weight.

    Features are taken as they are, without standardisation: a distance between vectors
    is what is tested. Votes are shares of the neighbours, so that a tie goes to the
    class that comes first.

    Args:
        problem: Features and labels.
        k: Numbers of neighbours; those above the number of training samples are left
            out.
        distances: 'cosine', 'l2', or both.
        split: Name of the split to predict.

    Yields:
        k, the distance, and the prediction: probabilities ``[n, C]``, or values ``[n]``
        for regression.

    Raises:
        SpecError: If an argument is wrong, or no k is small enough.
    """
    if not distances or not set(distances) <= set(DISTANCES):
        raise SpecError(f'distances={distances!r} must be some of cosine, l2')
    if not k or min(k) < 1:
        raise SpecError(f'k={k!r} must be numbers of neighbours, from 1')
    features, targets = problem.splits['train']
    possible = [number for number in k if number <= len(features)]
    if not possible:
        raise SpecError(
            f'{len(features)} training samples are fewer than {min(k)} neighbours: '
            'choose a smaller k, or give more samples'
        )
    if problem.task in ('binary', 'multiclass'):
        targets = np.eye(len(problem.classes))[targets]
    for distance in distances:
        # The neighbours of the largest k hold those of all.
        index = NearestNeighbors(
            n_neighbors=max(possible), metric=DISTANCES[distance], algorithm='brute'
        ).fit(features)
        near = index.kneighbors(problem.splits[split][0], return_distance=False)
        for number in possible:
            yield number, distance, targets[near[:, :number]].mean(axis=1)
