from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import DatasetCard, metadata_load

from dynamicvis_geo.callbacks import EmbeddingWriter
from dynamicvis_geo.card import write_card
from dynamicvis_geo.errors import OutputError
from tests.callbacks.standins import Chips, Task
from tests.callbacks.test_writer import predict
from tests.outputs import PROVENANCE, write_grid, write_pooled

Cli = Callable[..., tuple[int, str, str]]


def test_a_card_stands_beside_its_output(run_cli: Cli, tmp_path: Path) -> None:
    made = {'emb:type': 'chip', 'emb:dimensions': 6, 'data_type': 'float32'}
    write_pooled(tmp_path / 'a.parquet', provenance=PROVENANCE | made)
    code, out, err = run_cli('card', tmp_path / 'a.parquet', '--license', 'cc-by-4.0')
    assert (code, err) == (0, '')
    assert str(tmp_path / 'README.md') in out
    card = DatasetCard.load(tmp_path / 'README.md')
    assert card.data.license == 'cc-by-4.0'
    assert card.data.size_categories == ['n<1K']
    (config,) = metadata_load(tmp_path / 'README.md')['configs']
    assert config == {'config_name': 'default', 'data_files': 'a.parquet'}
    for text in (
        'Contains modified Copernicus Sentinel data 2024.',
        'geopandas.read_parquet',
        'weights.pth',
        'arXiv:2503.16426',
        '| Chips | 12 |',
        '"cloudy_pct": 30.0',
    ):
        assert text in card.text
    assert 'andom weights' not in card.text


@pytest.mark.parametrize(
    ('name', 'format_', 'dtype', 'data', 'loading'),
    [
        ('a.parquet', None, 'int8', 'a.parquet', "* table['scale']"),
        ('folder', 'geoparquet', 'float32', 'folder/*.parquet', "('folder')"),
        ('maps', None, 'float32', 'maps.stac/chips.parquet', "FeatureMaps('maps')"),
        ('a.zarr', None, 'float16', 'a.zarr/chips.parquet', "group='EPSG_32618'"),
    ],
)
def test_each_format_says_how_it_is_loaded(
    tmp_path: Path, name: str, format_: Any, dtype: str, data: str, loading: str
) -> None:
    if name == 'a.zarr':
        pytest.importorskip('zarr')
    output = 'grid' if name in ('maps', 'a.zarr') else 'pooled'
    writer = EmbeddingWriter(tmp_path / name, format_, dtype=dtype)
    predict(writer, Chips(3), Task(output))
    text = write_card(tmp_path / name).read_text()
    assert yaml.safe_load(text.split('---')[1])['configs'][0]['data_files'] == data
    assert loading in text
    assert '**Random weights.**' in text
    assert 'no licence was named' in text
    # What is loaded is there.
    assert list(tmp_path.glob(data))


def test_a_readme_of_ones_own_is_spared(run_cli: Cli, tmp_path: Path) -> None:
    write_grid(tmp_path / 'maps')
    readme = tmp_path / 'README.md'
    readme.write_text('mine')
    code, _, err = run_cli('card', tmp_path / 'maps')
    assert code == 2
    assert 'was not written by this package' in err
    assert '--overwrite' in err
    assert readme.read_text() == 'mine'
    assert run_cli('card', tmp_path / 'maps', '--overwrite')[0] == 0
    assert run_cli('card', tmp_path / 'maps')[0] == 0
    other = tmp_path / 'other.md'
    assert run_cli('card', tmp_path / 'maps', '--output', other)[0] == 0
    assert other.read_text() == readme.read_text()
    with pytest.raises(OutputError, match='is a folder'):
        write_card(tmp_path / 'maps', tmp_path)
    code, _, err = run_cli('card', tmp_path / 'nothing')
    assert code == 2
    assert 'no such file' in err


def test_an_output_without_chips_has_one(tmp_path: Path) -> None:
    predict(EmbeddingWriter(tmp_path / 'a.parquet'), Chips(0), Task())
    assert '| Chips | 0 |' in write_card(tmp_path / 'a.parquet').read_text()


def test_a_card_in_a_store(bucket: str) -> None:
    predict(EmbeddingWriter(f'{bucket}/a.parquet'), Chips(2), Task())
    path = write_card(f'{bucket}/a.parquet')
    assert str(path) == f'{bucket}/README.md'
    assert 'a.parquet' in path.read_text()
