"""Metrics and intervals, against scikit-learn and torchmetrics."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_calibration_error,
)

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.evaluation.bootstrap import bootstrap
from dynamicvis_geo.evaluation.metrics import scores
from dynamicvis_geo.tasks.probe_scores import probe_metrics

pytestmark = pytest.mark.once


def weightings(count: int, rng: np.random.Generator) -> np.ndarray:
    """All samples once; a draw with replacement; one that lacks most samples."""
    drawn = np.bincount(rng.integers(0, count, count), minlength=count)
    few = np.where(np.arange(count) % 5 == 0, 2, 0)
    return np.stack([np.ones(count), drawn, few]).astype(float)


@pytest.mark.parametrize('classes', [2, 4])
def test_classes_are_scored_as_scikit_learn_does(classes: int) -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, classes, 80)
    # Few distinct values, as kNN gives, so that there are ties.
    values = rng.multinomial(5, np.ones(classes) / classes, 80) / 5
    chosen = values.argmax(1)
    weights = weightings(80, rng)
    task = 'binary' if classes == 2 else 'multiclass'
    found = scores(task, truth, values, weights)
    for i, w in enumerate(weights):
        average = 'binary' if classes == 2 else 'macro'
        positive = (truth == 1) if classes == 2 else np.eye(classes)[truth]
        rated = values[:, 1] if classes == 2 else values
        options = {'sample_weight': w, 'average': average}
        expected = {
            'accuracy_micro': sk.accuracy_score(truth, chosen, sample_weight=w),
            'accuracy_macro': sk.balanced_accuracy_score(
                truth, chosen, sample_weight=w
            ),
            'f1': sk.f1_score(truth, chosen, **options),
            'jaccard': sk.jaccard_score(truth, chosen, **options),
            'average_precision': sk.average_precision_score(
                positive, rated, sample_weight=w, average='macro'
            ),
        }
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(value), (name, i)
    smooth = rng.dirichlet(np.ones(classes), 80)
    error = multiclass_calibration_error(
        torch.tensor(smooth), torch.tensor(truth), classes, n_bins=15
    )
    ours = scores(task, truth, smooth)['calibration_error'][0]
    assert ours == pytest.approx(float(error), abs=1e-6)


def test_a_class_that_was_only_predicted_counts_as_0_in_means() -> None:
    truth = np.array([0, 0, 2, 2])
    values = np.eye(4)[[0, 1, 2, 2]]
    found = scores('multiclass', truth, values)
    assert found['accuracy_macro'][0] == pytest.approx((0.5 + 0 + 1) / 3)
    assert found['f1'][0] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert found['average_precision'][0] == pytest.approx((1 * 0.5 + 0.5 * 0.5 + 1) / 2)


def random_case(seed: int) -> tuple[str, int, np.ndarray, np.ndarray]:
    """Few samples of several classes, some absent, some predicted, with ties."""
    rng = np.random.default_rng(seed)
    task = ('binary', 'multiclass', 'multilabel')[seed % 3]
    classes = 2 if task == 'binary' else rng.integers(2, 7)
    count = rng.integers(2, 12)
    votes = rng.choice((3, 5, 1000))
    if task == 'multilabel':
        truth = rng.random((count, classes)) < rng.choice((0.0, 0.2, 0.6), classes)
        return (
            task,
            classes,
            truth.astype(int),
            rng.integers(0, votes + 1, truth.shape) / votes,
        )
    there = rng.choice(classes, rng.integers(1, classes + 1), replace=False)
    values = rng.multinomial(votes, rng.dirichlet(np.ones(classes)), count) / votes
    return task, classes, rng.choice(there, count), values


@pytest.mark.filterwarnings('ignore')
def test_values_equal_those_of_both_libraries_where_classes_are_absent() -> None:
    for seed in range(240):
        task, classes, truth, values = random_case(seed)
        found = {name: v[0] for name, v in scores(task, truth, values).items()}
        average = 'binary' if task == 'binary' else 'macro'
        chosen = values > 0.5 if task == 'multilabel' else values.argmax(1)
        expected = {
            'f1': sk.f1_score(truth, chosen, average=average),
            'jaccard': sk.jaccard_score(truth, chosen, average=average),
        }
        if task != 'multilabel':
            expected['accuracy_micro'] = sk.accuracy_score(truth, chosen)
            expected['accuracy_macro'] = sk.recall_score(truth, chosen, average='macro')
        for name, value in expected.items():
            assert found[name] == pytest.approx(value), (seed, name)
        logged = probe_metrics(task, int(classes))
        theirs = logged(torch.tensor(values).float(), torch.tensor(truth))
        assert set(theirs) == set(found)
        if task == 'multiclass' and not truth.any():
            # torchmetrics takes a test split of the first class for one of negatives.
            del theirs['average_precision']
        for name, value in theirs.items():
            one = value[1] if value.ndim else value
            assert found[name] == pytest.approx(one.item(), abs=1e-5), (seed, name)


def test_multilabel_is_scored_as_scikit_learn_does() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (60, 3))
    values = rng.integers(0, 11, (60, 3)) / 10
    weights = weightings(60, rng)
    found = scores('multilabel', truth, values, weights)
    for i, w in enumerate(weights):
        options = {'sample_weight': w, 'average': 'macro'}
        chosen = values > 0.5
        expected = {
            'accuracy_micro': np.average((truth == chosen).mean(1), weights=w),
            'f1': sk.f1_score(truth, chosen, **options),
            'jaccard': sk.jaccard_score(truth, chosen, **options),
            'average_precision': sk.average_precision_score(truth, values, **options),
        }
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(value), (name, i)
    smooth = rng.random((60, 3))
    error = binary_calibration_error(
        torch.tensor(smooth.ravel()), torch.tensor(truth.ravel()), n_bins=15
    )
    ours = scores('multilabel', truth, smooth)['calibration_error'][0]
    assert ours == pytest.approx(float(error), abs=1e-6)


@pytest.mark.parametrize('offset', [0.0, 1e6])
def test_regression_is_scored_as_scikit_learn_does(offset: float) -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=50) + offset
    values = truth + rng.normal(size=50) / 3
    weights = weightings(50, rng)
    found = scores('regression', truth, values, weights)
    for i, w in enumerate(weights):
        expected = {
            'r2': sk.r2_score(truth, values, sample_weight=w),
            'mae': sk.mean_absolute_error(truth, values, sample_weight=w),
            'rmse': sk.root_mean_squared_error(truth, values, sample_weight=w),
        }
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(value, rel=1e-6), (name, i)


def test_what_is_not_defined_is_nan() -> None:
    constant = scores('regression', np.full(3, 0.1), np.array([0.1, 0.2, 0.3]))
    assert np.isnan(constant['r2'][0])
    assert constant['mae'][0] == pytest.approx(0.1)
    negative = scores('binary', np.zeros(3, int), np.eye(2)[[0, 0, 0]])
    assert negative['f1'][0] == 0
    draws = np.array([[0.0, 0, 0, 1], [1, 1, 1, 1]])
    drawn = scores('binary', np.array([1, 0, 0, 0]), np.eye(2)[[1, 0, 0, 0]], draws)
    np.testing.assert_equal(drawn['f1'], [np.nan, 1])
    assert negative['average_precision'][0] == 0
    assert negative['accuracy_micro'][0] == 1


def test_intervals_are_those_of_resampled_test_sets() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 2, 100)
    values = np.eye(2)[np.where(rng.random(100) < 0.8, truth, 1 - truth)]
    found = bootstrap('binary', truth, values, resamples=2000, seed=4)
    share = (values.argmax(1) == truth).mean()
    interval = found['accuracy_micro']
    assert interval.value == pytest.approx(share)
    # The number of right samples of a draw is binomial.
    half = 1.96 * np.sqrt(share * (1 - share) / 100)
    assert interval.low == pytest.approx(share - half, abs=0.015)
    assert interval.high == pytest.approx(share + half, abs=0.015)
    assert found == bootstrap('binary', truth, values, resamples=2000, seed=4)
    assert found != bootstrap('binary', truth, values, resamples=2000, seed=5)


def test_intervals_leave_out_draws_without_positives() -> None:
    truth = np.array([1, 0, 0, 0])
    found = bootstrap('binary', truth, np.eye(2)[truth], resamples=200)
    assert found['f1'] == (1, 1, 1)
    assert np.isnan(bootstrap('binary', truth, np.eye(2)[truth], 0)['f1'].low)
    with pytest.raises(SpecError, match='level=2'):
        bootstrap('binary', truth, np.eye(2)[truth], level=2)


def test_intervals_resample_groups() -> None:
    rng = np.random.default_rng(0)
    block = np.repeat(np.arange(40), 25)
    # Right in some blocks throughout, and wrong in others.
    truth = rng.integers(0, 2, 1000)
    right = (rng.random(40) < 0.7)[block]
    values = np.eye(2)[np.where(right, truth, 1 - truth)]
    found = bootstrap('binary', truth, values, 2000, groups=block)['accuracy_micro']
    share = right.mean()
    half = 1.96 * np.sqrt(share * (1 - share) / 40)
    assert found.low == pytest.approx(share - half, abs=0.02)
    assert found.high == pytest.approx(share + half, abs=0.02)
    alone = bootstrap('binary', truth, values, 2000)['accuracy_micro']
    assert alone.high - alone.low < (found.high - found.low) / 3
    # Groups of one sample are no groups, whatever they are called.
    each = bootstrap(
        'binary', truth, values, 2000, groups=[f'{i:4}' for i in range(1000)]
    )
    assert each['accuracy_micro'] == alone
    one = bootstrap('binary', truth, values, 50, groups=np.zeros(1000))
    assert np.isnan(one['f1'].low)
    with pytest.raises(SpecError, match=r'groups of shape \(3,\)'):
        bootstrap('binary', truth, values, 50, groups=[1, 2, 3])
