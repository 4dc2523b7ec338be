"""The study of docs/study.md, as examples/study.py runs it, finds what it says."""

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import geopandas as gpd
import pandas as pd
import pytest

from dynamicvis_geo import cli
from tests.documents.blocks import ROOT, arguments, blocks

PAGE = ROOT / 'docs' / 'study.md'


def words(text: str) -> str:
    """Leave out numbers and line breaks."""
    return re.sub(r'\d+(\.\d+)?', '#', ' '.join(text.split()))


@pytest.mark.once
def test_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['study.py', 'study'])
    study = runpy.run_path(str(ROOT / 'examples' / 'study.py'), run_name='__main__')
    out = capsys.readouterr().out
    assert 'from 15 blocks of the test split' in out
    assert 'the features are those of random weights' in out

    table = pd.read_csv('probe/results.csv')
    table = table[table['metric'] == 'accuracy_macro'].set_index('method')
    largest, colour = table.loc['baseline'].to_dict('records')
    model = table.loc['logistic']
    assert model['low'] > largest['high']
    # The intervals overlap, and yet that of the difference does not include 0.
    assert colour['high'] > model['low']
    differences = pd.DataFrame(
        json.loads(Path('probe/results.json').read_text())['differences']
    ).query("metric == 'accuracy_macro' and baseline == 'mean colour'")
    low = differences.set_index('method')['low']
    assert low['logistic'] > 0 > low['linear probe']

    cover = pd.read_csv('plots.csv').set_index('id')['cover']
    forest, built = (
        (cover[pd.read_csv(f'{name}.csv')['point_id']] == name).mean()
        for name in ('forest', 'built')
    )
    assert forest > 0.8
    assert built < (cover == 'built').mean() + 0.1

    cleared = set(pd.read_csv('cleared.csv')['id'])
    change = gpd.read_parquet('change.parquet').sort_values('change', ascending=False)
    assert set(change['point_id'][:5]) <= cleared
    assert set(change['point_id'][change['change'] > 3.5]) <= cleared
    assert len(cleared & set(change['point_id'][:20])) >= 8
    check_page(study, out)


def check_page(study: dict[str, Any], out: str) -> None:
    """See that the page has the commands and the sentences of the study."""
    shown: set[str] = set()
    for block in blocks(PAGE):
        if block.language == 'python':
            exec(compile(block.code, str(PAGE), 'exec'), {})
        else:
            shown |= set(block.commands)
    assert shown >= {f'dynamicvis-geo {line}' for line in study['COMMANDS']}
    # What needs an account is read, not run: other pages run such commands.
    for command in shown - {'python examples/study.py study'}:
        given = arguments(command)
        assert given is not None, command
        cli._parse(given)
    page = words(PAGE.read_text(encoding='utf-8'))
    sentences = out.partition('one may write:')[2].strip().splitlines()
    assert len(sentences) == 7
    for sentence in sentences:
        assert words(sentence.removeprefix('- ')) in page
