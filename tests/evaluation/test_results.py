"""evaluate(): what it scores, and what it refuses."""

import json
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm, t
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import precision_recall_fscore_support
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.preprocessing import StandardScaler

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.evaluation import evaluate
from dynamicvis_geo.evaluation.linear import fit_linear
from dynamicvis_geo.evaluation.problem import as_problem
from dynamicvis_geo.tasks import LinearProbe

Splits = dict[str, tuple[np.ndarray, np.ndarray]]


def split(x: np.ndarray, y: np.ndarray) -> Splits:
    parts = {'train': slice(0, 90), 'val': slice(90, 130), 'test': slice(130, None)}
    return {name: (x[part], y[part]) for name, part in parts.items()}


def classes_data(noise: float = 1.0, classes: int = 3) -> Splits:
    rng = np.random.default_rng(0)
    y = rng.integers(0, classes, 200)
    x = 2 * np.eye(classes, 8)[y] + noise * rng.normal(size=(200, 8)) + 5
    return split((x * np.geomspace(0.1, 10, 8)).astype(np.float32), y)


def regression_data() -> Splits:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6)).astype(np.float32)
    return split(x, 3 * x[:, 0] - x[:, 1] + rng.normal(size=200) + 100)


def test_neighbours_are_those_of_scikit_learn() -> None:
    data = classes_data()
    results = evaluate(data, 'multiclass', resamples=20)
    for k in (5, 20):
        for name, metric in (('cosine', 'cosine'), ('l2', 'euclidean')):
            model = KNeighborsClassifier(k, metric=metric, algorithm='brute')
            expected = model.fit(*data['train']).predict_proba(data['test'][0])
            found = results.predicted[f'knn k={k} {name}']
            np.testing.assert_allclose(found, expected)
    regression = regression_data()
    found = evaluate(regression, 'regression', resamples=0).predicted['knn k=5 l2']
    nearest = KNeighborsRegressor(5).fit(*regression['train'])
    np.testing.assert_allclose(found, nearest.predict(regression['test'][0]))


def test_logistic_regression_is_chosen_on_validation_and_fitted_on_both() -> None:
    data = classes_data(noise=2.0)
    results = evaluate(data, 'multiclass', resamples=0)
    scaler = StandardScaler().fit(data['train'][0].astype(np.float64))
    x = {name: scaler.transform(v[0].astype(np.float64)) for name, v in data.items()}
    y = {name: v[1] for name, v in data.items()}
    best = None
    for c in [10.0**e for e in range(-6, 5)]:
        model = LogisticRegression(C=c, max_iter=1000).fit(x['train'], y['train'])
        score = model.score(x['val'], y['val'])
        if best is None or score > best[0]:
            best = score, c
    assert best is not None
    name = f'logistic C={best[1]:g}'
    assert results.choices[name]['C'] == best[1]
    assert results.choices[name]['converged']
    both = np.concatenate([x['train'], x['val']])
    final = LogisticRegression(C=best[1], max_iter=1000)
    final.fit(both, np.concatenate([y['train'], y['val']]))
    np.testing.assert_allclose(
        results.predicted[name], final.predict_proba(x['test']), atol=1e-5
    )


def test_ridge_is_that_of_scikit_learn() -> None:
    data = regression_data()
    fit = fit_linear(as_problem(data, 'regression'))
    scaler = StandardScaler().fit(data['train'][0].astype(np.float64))
    x = {name: scaler.transform(v[0].astype(np.float64)) for name, v in data.items()}
    alphas = [10.0**e for e in range(-3, 7)]
    scored = [
        Ridge(a).fit(x['train'], data['train'][1]).score(x['val'], data['val'][1])
        for a in alphas
    ]
    best = alphas[int(np.argmax(scored))]
    assert fit.choice['alpha'] == best
    both = np.concatenate([x['train'], x['val']])
    final = Ridge(best).fit(both, np.concatenate([data['train'][1], data['val'][1]]))
    np.testing.assert_allclose(fit.predicted, final.predict(x['test']))


def test_multilabel_is_one_against_the_rest() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5)).astype(np.float32)
    y = (x[:, :3] + rng.normal(size=(200, 3)) > [0, 0.5, 9]).astype(int)
    data = split(x, y)
    results = evaluate(data, 'multilabel', ('a', 'b', 'never'), resamples=20)
    (name,) = results.choices
    model = OneVsRestClassifier(LogisticRegression(C=results.choices[name]['C']))
    scaler = StandardScaler().fit(data['train'][0].astype(np.float64))
    both = np.concatenate([data[s][0] for s in ('train', 'val')]).astype(np.float64)
    labels = np.concatenate([data[s][1][:, :2] for s in ('train', 'val')])
    model.fit(scaler.transform(both), labels)
    expected = model.predict_proba(scaler.transform(data['test'][0].astype(float)))
    found = results.predicted[name]
    np.testing.assert_allclose(found[:, :2], expected, atol=1e-4)
    assert (found[:, 2] == 0).all()
    assert "split 'train' has no sample of never" in results.notes
    assert set(results.table['metric']) == {
        'accuracy_micro',
        'f1',
        'average_precision',
        'jaccard',
        'calibration_error',
    }


def test_table_is_tidy_and_json_is_strict() -> None:
    data = classes_data(noise=0.1)
    probe = LinearProbe('multiclass', 8, ('a', 'b', 'c'), standardize='none')
    results = evaluate(data, 'multiclass', ('a', 'b', 'c'), probe=probe, resamples=50)
    table = results.table
    assert list(table.columns) == [
        *('method', 'setting', 'metric', 'value', 'low', 'high'),
        *('n_train', 'n_val', 'n_test', 'n_groups'),
    ]
    assert list(dict.fromkeys(table['method'])) == [
        *('baseline', 'knn', 'logistic', 'linear probe'),
    ]
    assert len(table) == 7 * 6
    assert (table[['n_train', 'n_val', 'n_test']].iloc[0] == [90, 40, 70]).all()
    perfect = table[(table['method'] == 'logistic') & (table['metric'] == 'f1')]
    assert perfect[['value', 'low', 'high']].to_numpy().tolist() == [[1, 1, 1]]
    (logistic,) = results.choices
    truth = np.bincount(data['test'][1])
    np.testing.assert_array_equal(results.confusion(logistic), np.diag(truth))
    shifted = replace(results, predicted={'m': np.eye(3)[(data['test'][1] + 1) % 3]})
    # The truth is down, the predicted class across.
    np.testing.assert_array_equal(
        shifted.confusion('m'), np.roll(np.diag(truth), 1, axis=1)
    )
    for show in (results.confusion, results.plot):
        with pytest.raises(
            SpecError, match=rf"method='knn' is.*k=5 cosine.*{logistic}"
        ):
            show('knn')
    content = json.loads(results.to_json(labels='plots.csv'))
    assert content['classes'] == ['a', 'b', 'c']
    assert content['splits'] == {'train': 90, 'val': 40, 'test': 70}
    assert content['groups'] == {'by': 'sample', 'test': 70}
    assert content['labels'] == 'plots.csv'
    assert content['results'][0]['method'] == 'baseline'
    assert content['confusion'][logistic] == np.diag(truth).tolist()
    assert '1.000 [1.000, 1.000]' in results.wide().to_string()


def test_intervals_are_those_of_groups_and_few_are_said() -> None:
    data = classes_data(noise=3.0)
    alone = evaluate(data, 'multiclass', k=(5,), resamples=200)
    block = np.arange(70) % 7
    grouped = evaluate(data, 'multiclass', k=(5,), resamples=200, groups=block)
    assert (alone.n_groups, grouped.n_groups) == (70, 7)
    assert (grouped.table['n_groups'] == 7).all()
    assert not any('intervals of so few' in note for note in alone.notes)
    assert any('7 groups: intervals of so few' in note for note in grouped.notes)
    assert (alone.table['value'] == grouped.table['value']).all()
    logistic = alone.table['method'] == 'logistic'
    low, other = (found.table['low'][logistic] for found in (alone, grouped))
    assert (low != other).all()


@pytest.mark.once
def test_differences_are_those_on_the_same_draws() -> None:
    data = classes_data(noise=3.0)
    truth, block = data['test'][1], np.arange(70) % 7
    colours = {name: x[:, :4] for name, (x, _) in data.items()}
    options: dict[str, Any] = {'resamples': 300, 'seed': 3, 'groups': block, 'k': (5,)}
    results = evaluate(data, 'multiclass', colours=colours, **options)
    rng = np.random.default_rng(3)
    draws = [
        np.concatenate([np.flatnonzero(block == i) for i in rng.integers(0, 7, 7)])
        for _ in range(300)
    ]
    tail = norm.cdf(t.ppf(0.025, 6) * np.sqrt(7 / 6))
    right = {n: v.argmax(axis=1) == truth for n, v in results.predicted.items()}
    found = results.differences
    assert list(found.columns) == [
        *('method', 'setting', 'baseline', 'metric', 'value', 'low', 'high')
    ]
    # Three methods, each less two baselines.
    assert len(found) == 3 * 2 * 6
    rows = found[found['metric'] == 'accuracy_micro']
    unsure: dict[str, list[str]] = {}
    for row in rows.itertuples():
        name = f'{row.method} {row.setting}'
        less = right[name].astype(float) - right[f'baseline {row.baseline}']
        low, high = np.quantile([less[i].mean() for i in draws], [tail, 1 - tail])
        assert row[5:] == pytest.approx((less.mean(), low, high), abs=1e-12)
        if low <= 0:
            unsure.setdefault(str(row.baseline), []).append(name)
        text = results.less_baselines()[row.baseline][row.method, row.setting]
        assert text == f'{less.mean():+z.3f} [{low:+z.3f}, {high:+z.3f}]'
    assert unsure
    told = [note for note in results.notes if 'not shown to be better' in note]
    assert [note.split(' (the interval')[0] for note in told] == [
        f'not shown to be better than {baseline}: {", ".join(names)}'
        for baseline, names in unsure.items()
    ]
    content = json.loads(results.to_json())['differences']
    assert content[0]['value'] == found['value'].iloc[0]
    # What is better in every draw needs no such word, nor do scores without intervals.
    for sure in (
        evaluate(classes_data(0.1), 'multiclass', **options),
        evaluate(data, 'multiclass', **{**options, 'resamples': 0}),
    ):
        assert not any('not shown' in note for note in sure.notes)
    assert '[' not in sure.less_baselines().to_string()


def test_baselines_know_no_features() -> None:
    data = classes_data()
    known = np.concatenate([data['train'][1], data['val'][1]])
    shares = np.bincount(known) / len(known)
    results = evaluate(data, 'multiclass', k=(5,), resamples=20)
    np.testing.assert_allclose(
        results.predicted['baseline largest class'], np.tile(shares, (70, 1))
    )
    rows = results.table[results.table['setting'] == 'largest class']
    accuracy = rows[rows['metric'] == 'accuracy_micro']['value'].iloc[0]
    assert accuracy == (data['test'][1] == shares.argmax()).mean()
    regression = regression_data()
    mean = np.concatenate([regression['train'][1], regression['val'][1]]).mean()
    found = evaluate(regression, 'regression', k=(5,), resamples=0)
    np.testing.assert_allclose(found.predicted['baseline mean'], np.full(70, mean))
    assert found.by_class.empty
    several = {name: (x, np.eye(3, dtype=int)[y]) for name, (x, y) in data.items()}
    results = evaluate(several, 'multilabel', k=(5,), resamples=0)
    np.testing.assert_allclose(results.predicted['baseline class shares'][0], shares)


def test_colours_are_fitted_as_the_features_are() -> None:
    data = classes_data(noise=2.0)
    colours = {name: x[:, :3] for name, (x, _) in data.items()}
    results = evaluate(data, 'multiclass', colours=colours, k=(5,), resamples=20)
    alone = {name: (colours[name], y) for name, (_, y) in data.items()}
    fit = fit_linear(as_problem(alone, 'multiclass'))
    np.testing.assert_array_equal(
        results.predicted['baseline mean colour'], fit.predicted
    )
    assert results.choices['baseline mean colour'] == fit.choice
    short = {**colours, 'test': colours['test'][:9]}
    with pytest.raises(SpecError, match="'test' has features"):
        evaluate(data, 'multiclass', colours=short, resamples=0)


@pytest.mark.filterwarnings('ignore')
def test_scores_of_each_class_are_those_of_scikit_learn() -> None:
    data = classes_data(noise=3.0)
    x, y = data['test']
    # One class has no test sample, and is predicted.
    data['test'] = x[y != 1], y[y != 1]
    names = ('a', 'b', 'c')
    results = evaluate(data, 'multiclass', names, resamples=50)
    (name,) = results.choices
    truth, values = results.truth, results.predicted[name]
    expected = precision_recall_fscore_support(
        truth, values.argmax(1), labels=range(3), zero_division=0
    )
    table = results.by_class
    assert list(table.columns) == [
        *('method', 'setting', 'class', 'metric', 'value', 'low', 'high', 'n'),
    ]
    for metric, per_class in zip(('precision', 'recall', 'f1'), expected, strict=False):
        rows = table[(table['method'] == 'logistic') & (table['metric'] == metric)]
        assert rows['class'].tolist() == list(names)
        assert rows['n'].tolist() == expected[3].tolist()
        np.testing.assert_allclose(rows['value'], per_class)
        assert (rows['low'] <= rows['value']).all()
    wide = results.f1_by_class()
    assert wide.index.tolist() == list(names)
    assert wide['n'].tolist() == expected[3].tolist()
    assert wide.columns.tolist()[1:] == list(results.predicted)
    assert wide[name].tolist() == [f'{value:.3f}' for value in expected[2]]
    assert json.loads(results.to_json())['by_class'][0]['class'] == 'a'


def test_random_weights_are_said() -> None:
    results = evaluate(classes_data(), 'multiclass', k=(5,), resamples=0)
    made = {'model': {'backbone': {'weights': 'random', 'seed': 0}}}
    (name,) = results.choices
    for provenance, end in (({}, name), (made, f'{name} (random weights)')):
        figure = replace(results, provenance=provenance).plot(name)
        assert figure.axes[0].get_title() == end


def test_the_test_split_decides_nothing() -> None:
    data = classes_data(noise=2.0)
    other = {**data, 'test': (data['test'][0] * 9 - 4, data['test'][1][::-1].copy())}
    one, two = (evaluate(d, 'multiclass', resamples=0) for d in (data, other))
    assert one.choices == two.choices


def test_a_class_that_training_lacks_is_said_and_never_predicted() -> None:
    data = classes_data()
    x, y = data['train']
    data['train'] = x[y != 1], y[y != 1]
    data['val'] = data['train'][0][:20], data['train'][1][:20]
    results = evaluate(data, 'multiclass', ('a', 'b', 'c'), resamples=10)
    assert "split 'train' has no sample of b" in results.notes
    for values in results.predicted.values():
        assert values.shape == (70, 3)
        assert (values[:, 1] == 0).all()
    assert results.table['value'].notna().all()


def test_without_validation_nothing_is_chosen() -> None:
    data = classes_data()
    del data['val']
    results = evaluate(data, 'multiclass', resamples=0)
    assert 'logistic C=1' in results.choices
    assert any("'val' has no samples" in note for note in results.notes)
    assert results.sizes['val'] == 0


def test_tiny_training_sets_leave_out_large_k() -> None:
    data = classes_data()
    data['train'] = data['train'][0][:8], data['train'][1][:8]
    results = evaluate(data, 'multiclass', resamples=0)
    assert 'knn k=5 l2' in results.predicted
    assert 'knn k=20 l2' not in results.predicted
    assert any('k=20 was left out' in note for note in results.notes)


def test_fits_that_do_not_converge_are_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr('dynamicvis_geo.evaluation.linear.ITERATIONS', (1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit = fit_linear(as_problem(classes_data(noise=0.3), 'multiclass'))
    assert fit.choice['converged'] is False
    assert any('not converged' in note for note in fit.notes)


@pytest.mark.parametrize(
    ('changes', 'options', 'words'),
    [
        ({}, {'task': None}, 'task=None'),
        ({'test': None}, {}, "split 'test' has no samples"),
        ({'train': (np.ones((9, 8)), np.zeros(9, int))}, {}, 'one class'),
        ({'train': (np.ones((3, 8)), np.arange(3))}, {}, 'fewer than 5 neighbours'),
        ({'val': (np.ones((9, 7)), np.zeros(9, int))}, {}, r"'val'.*\[n, 8\]"),
        ({'val': (np.full((9, 8), np.nan), np.zeros(9, int))}, {}, "'val' has NaN"),
        ({'val': (np.ones((9, 8)), np.full(9, 7))}, {}, 'labels from 7'),
        ({}, {'k': (0,)}, 'k='),
        ({}, {'groups': [1, 2]}, r'groups has shape \(2,\).*each of 70'),
        ({}, {'distances': ('l1',)}, 'distances='),
        ({}, {'standardize': 'minmax'}, "standardize='minmax'"),
        # Before anything is fitted, which would fail for other reasons.
        ({}, {'resamples': -1, 'k': (-3,)}, 'resamples=-1'),
    ],
)
def test_what_cannot_be_evaluated(
    changes: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    data = {**classes_data(), **changes}
    data = {name: part for name, part in data.items() if part is not None}
    arguments = {'task': 'multiclass', 'classes': ('a', 'b', 'c'), 'resamples': 0}
    with pytest.raises(SpecError, match=words):
        evaluate(data, **{**arguments, **options})


def test_constant_targets() -> None:
    data = regression_data()
    x, y = data['test']
    data['test'] = x, np.full_like(y, 2)
    table = evaluate(data, 'regression', resamples=10).table
    assert table[table['metric'] == 'r2']['value'].isna().all()
    assert table[table['metric'] == 'mae']['value'].notna().all()
    data['train'] = data['train'][0], np.full(90, 2.0)
    with pytest.raises(SpecError, match='all 90 training samples is 2'):
        evaluate(data, 'regression')
