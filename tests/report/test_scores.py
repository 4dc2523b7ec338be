import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely

from dynamicvis_geo.errors import SourceError
from dynamicvis_geo.evaluation import Results, evaluate
from dynamicvis_geo.report import write_report
from dynamicvis_geo.report.scores import read_scores
from tests.outputs import PROVENANCE, write_pooled
from tests.report.test_report import HOSTILE, SVG, check_alone, parse, words


def results(task: str, classes: tuple[str, ...] = ()) -> Results:
    """Scores of 60 samples whose labels follow from the features, nearly."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)).astype(np.float32)
    rough = x + 0.5 * rng.normal(size=x.shape)
    y = {
        'multiclass': rough[:, :3].argmax(axis=1),
        'multilabel': (rough[:, :2] > 0).astype(np.int64),
        'regression': rough[:, 0].astype(np.float64),
    }[task]
    parts = {'train': slice(0, 30), 'val': slice(30, 40), 'test': slice(40, 60)}
    return evaluate(
        {name: (x[part], y[part]) for name, part in parts.items()},
        task,
        classes,
        groups=np.arange(20) // 2,
        k=(5,),
        resamples=50,
    )


def write(
    folder: Path, found: Results, provenance: dict[str, Any], **further: Any
) -> Path:
    folder.mkdir()
    text = replace(found, provenance=provenance).to_json(**further)
    (folder / 'results.json').write_text(text)
    return folder


def test_page_shows_scores_beside_baselines_with_intervals(tmp_path: Path) -> None:
    found = results('multiclass', ('sand', HOSTILE, 'water'))
    division = {'kind': 'spatial', 'block_m': 5000.0, 'left_out': 7}
    write_pooled(tmp_path / 'e.parquet')
    folder = write(tmp_path / 'out', found, PROVENANCE, target='cover', split=division)
    page = write_report(tmp_path / 'e.parquet', tmp_path / 'e.html', probe=folder)
    check_alone(page)
    text = words(parse(page))
    assert 'How much the features know of cover' in text
    assert 'Task multiclass, 3 classes' in text
    assert 'Plots 30 to train, 10 to validate, 20 to test' in text
    assert 'spatial, whole blocks of 5 km; 7 chips left out' in text
    assert '95 %, from 10 groups of the test split' in text
    methods, differences, classes = (
        {
            row.findtext('th'): [words(cell) for cell in row.iter('td')]
            for row in table.findall('tbody/tr')
        }
        for table in parse(page).findall(".//table[@class='scores']")
    )
    assert next(iter(methods)) == 'baseline largest class'
    assert set(methods) == set(found.predicted)
    (row,) = found.table.query("method == 'logistic' and metric == 'f1'").itertuples()
    (name,) = (name for name in methods if name and name.startswith('logistic'))
    shown = f'{row.value:.3f} {row.low:.3f} to {row.high:.3f}'
    assert shown in methods[name]
    less = found.differences.query("metric == 'accuracy_micro'").set_index('method')
    one = less.loc['logistic']
    assert differences[name] == [
        f'{one["value"]:+.3f} {one["low"]:+.3f} to {one["high"]:+.3f}'
    ]
    assert len(differences) == len(methods) - 1
    assert 'Less largest class' in text
    assert f'What follows is of the {name} alone' in text
    assert list(classes)[::2] == ['sand', 'water']
    assert classes['water'][0] == str((found.truth == 2).sum())
    right = np.trace(found.confusion(name))
    assert f'{right} of 20 test samples are right' in text
    # Those of before have no differences.
    content = json.loads((folder / 'results.json').read_text())
    del content['differences']
    (folder / 'results.json').write_text(json.dumps(content))
    assert not read_scores(folder, PROVENANCE).differences
    # Results may be named by their file, too.
    assert read_scores(folder / 'results.json', PROVENANCE).target == 'cover'


@pytest.mark.parametrize(
    ('task', 'metrics'),
    [
        ('multilabel', ['Accuracy', 'F1', 'Average precision', 'Jaccard index']),
        ('regression', ['R²', 'Mean absolute error', 'Root mean squared error']),
    ],
)
def test_numbers_and_several_classes_have_no_matrix(
    tmp_path: Path, task: str, metrics: list[str]
) -> None:
    scores = read_scores(write(tmp_path / 'out', results(task), {}), {})
    assert set(metrics) <= set(scores.metrics)
    assert scores.confusion is None
    assert len(scores.classes) == (2 if task == 'multilabel' else 0)


def plots(count: int = 6, **columns: Any) -> gpd.GeoDataFrame:
    """Predictions as a probe writes them: the last three plots are tested."""
    return gpd.GeoDataFrame(
        {
            'id': [f'plot-{i}' for i in range(count)],
            'split': ['train'] * (count - 3) + ['test'] * 3,
            **columns,
        },
        geometry=[shapely.box(i, 40, i + 1, 41) for i in range(count)],
        crs='EPSG:4326',
    )


def test_map_shows_where_predictions_are_wrong(tmp_path: Path) -> None:
    write_pooled(tmp_path / 'e.parquet')
    folder = write(
        tmp_path / 'out', results('multiclass', ('a', HOSTILE, 'c')), PROVENANCE
    )
    none = [None] * 3
    table = plots(
        label=['a', 'c', 'a', 'a', HOSTILE, 'c'],
        prediction=[*none, 'a', 'c', 'c'],
        correct=pd.array([*none, True, False, True], 'boolean'),
    )
    # Wherever they are in the table, those that are tested are drawn on top.
    table.iloc[::-1].to_parquet(folder / 'predictions.parquet')
    page = write_report(tmp_path / 'e.parquet', tmp_path / 'e.html', probe=folder)
    check_alone(page)
    text = words(parse(page))
    assert '2 right 1 wrong 3 plots of other splits' in text
    _, drawn = parse(page).iter(f'{SVG}svg')
    paths = drawn.findall(f"{SVG}g[@class='marks']/{SVG}path")
    told = [path.findtext(f'{SVG}title') or '' for path in paths]
    colours = [path.get('fill') for path in paths]
    assert told[:3] == ['plot-2: a (train)', 'plot-1: c (train)', 'plot-0: a (train)']
    assert told[3] == 'plot-5: c, predicted c'
    assert told[4].startswith('plot-4: </td>')
    assert len(set(colours)) == 3
    assert colours[3] == colours[5] != colours[4]


def test_map_shows_errors_of_numbers(tmp_path: Path) -> None:
    folder = write(tmp_path / 'out', results('regression'), {})
    values = {'label': [1.0] * 6, 'prediction': [None] * 3 + [1.0, 3.0, -3.0]}
    table = plots(**values, error=[None] * 3 + [0.0, 2.0, -4.0])
    table.to_parquet(folder / 'predictions.parquet')
    found = read_scores(folder, {}).places
    assert found is not None
    meanings = [meaning for _, meaning in found.legend]
    assert meanings[0] == '0'
    assert meanings[-2].endswith('and more')
    colours = [mark.colour for mark in found.map.marks]
    assert colours[3] == found.legend[0][0]
    assert colours[5] == found.legend[-2][0]
    assert len(set(colours)) == 4


def test_predictions_without_places_have_no_map_and_broken_ones_are_an_error(
    tmp_path: Path,
) -> None:
    folder = write(tmp_path / 'out', results('regression'), {})
    pd.DataFrame({'id': ['a']}).to_parquet(folder / 'predictions.parquet')
    assert read_scores(folder, {}).places is None
    for broken in (plots(), plots().drop(columns='split')):
        broken.to_parquet(folder / 'predictions.parquet')
        with pytest.raises(SourceError, match=r'predictions\.parquet: the predictions'):
            read_scores(folder, {})
    (folder / 'predictions.parquet').write_text('text')
    with pytest.raises(SourceError, match='remove the file'):
        read_scores(folder, {})


def test_results_of_other_features_are_refused(tmp_path: Path) -> None:
    write_pooled(tmp_path / 'e.parquet')
    other = {**PROVENANCE, 'processing:datetime': '2025-12-31T00:00:00+00:00'}
    folder = write(tmp_path / 'out', results('regression'), other)
    with pytest.raises(SourceError) as refused:
        write_report(tmp_path / 'e.parquet', tmp_path / 'e.html', probe=folder)
    told = str(refused.value)
    assert 'of other features (made 2025-12-31T00:00:00+00:00)' in told
    assert '(made 2026-01-02T03:04:05+00:00)' in told
    assert not (tmp_path / 'e.html').exists()


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (None, 'no such file'),
        ('text', 'no results of dynamicvis-geo probe'),
        ('[]', 'no results of dynamicvis-geo probe'),
        ('{"results": []}', 'no results of dynamicvis-geo probe'),
        ({'results': [{'method': 'x'}]}, 'KeyError'),
        ({'splits': None}, 'no results of dynamicvis-geo probe'),
        ({'confusion': {}, 'notes': 3}, 'no results of dynamicvis-geo probe'),
    ],
)
def test_what_is_no_result_is_an_error_that_names_the_file(
    tmp_path: Path, change: Any, said: str
) -> None:
    file = tmp_path / 'results.json'
    if isinstance(change, str):
        file.write_text(change)
    elif change is not None:
        content = json.loads(results('regression').to_json())
        file.write_text(json.dumps({**content, **change}))
    with pytest.raises(SourceError, match=re.escape(str(file))) as refused:
        read_scores(tmp_path, {})
    assert said in str(refused.value)
