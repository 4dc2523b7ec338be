import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import torch
from lightning.pytorch import LightningModule, Trainer

from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.provenance import (
    PROVENANCE_KEY,
    carries_provenance,
    describe_embeddings,
    jsonable,
    read_provenance,
    run_provenance,
    to_json,
)
from tests.outputs import PROVENANCE, write_grid, write_pooled
from tests.stores import Upload


@dataclass(frozen=True)
class Config:
    path: Path
    scale: float


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        (Config(Path('a/b'), 0.1), {'path': 'a/b', 'scale': 0.1}),
        ({1: (np.float32(0.5), np.int64(3))}, {'1': [0.5, 3]}),
        ([float('nan'), float('inf'), np.nan, pd.NaT], [None] * 4),
        (np.array([[1, 2]]), [[1, 2]]),
        (pd.Timestamp('2024-06-01'), '2024-06-01T00:00:00'),
        (torch.float32, 'torch.float32'),
        ({'b', 'a'}, ['a', 'b']),
        (True, True),
    ],
)
def test_jsonable(value: Any, expected: Any) -> None:
    assert jsonable(value) == expected
    assert json.loads(to_json({'value': value})) == {'value': expected}


class Task(LightningModule):
    provenance: ClassVar = {'weights': 'random', 'mean': np.float32(0.25)}


def test_run_provenance_says_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('sys.argv', ['dynamicvis-geo', 'embed', 'my scene.tif'])
    trainer = Trainer(
        accelerator='cpu', precision='bf16-mixed', devices=1, logger=False
    )
    module = Task()
    provenance = run_provenance(trainer, module, {'paths': [Path('a.tif')]})
    assert provenance['run'] == {
        'command': "dynamicvis-geo embed 'my scene.tif'",
        'precision': 'bf16-mixed',
        'device': 'cpu',
        'processes': 1,
    }
    assert provenance['model'] == {'weights': 'random', 'mean': 0.25}
    assert provenance['source'] == {'paths': ['a.tif']}
    assert provenance['processing:software']['torch'] == torch.__version__
    created = datetime.fromisoformat(provenance['processing:datetime'])
    assert created.tzinfo == UTC
    assert json.loads(to_json(provenance)) == provenance


def test_module_without_provenance() -> None:
    trainer = Trainer(accelerator='cpu', devices=1, logger=False)
    assert run_provenance(trainer, LightningModule(), {})['model'] == {}


def test_describe_embeddings() -> None:
    assert describe_embeddings('chip', 768) == {
        'emb:type': 'chip',
        'emb:dimensions': 768,
        'data_type': 'float32',
    }


def test_read_back_under_any_name(tmp_path: Path) -> None:
    text = to_json({'model': 'größer'})
    table = pa.table({'a': [1]}).replace_schema_metadata({PROVENANCE_KEY: text})
    pq.write_table(table, tmp_path / 'renamed')
    assert read_provenance(tmp_path / 'renamed') == {'model': 'größer'}


def test_nothing_to_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({'a': [1]}), tmp_path / 'other.parquet')
    (tmp_path / 'other.txt').write_text('x')
    (tmp_path / 'truncated.parquet').write_bytes(b'PAR1 and no more')
    (tmp_path / 'truncated.tif').write_bytes(b'II*\0')
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'damaged').mkdir()
    (tmp_path / 'damaged' / 'metadata.json').write_text('{"model":')
    with rasterio.open(
        tmp_path / 'other.tif', 'w', driver='GTiff', dtype='uint8', count=1,
        width=2, height=2,
        crs='EPSG:32618', transform=rasterio.Affine(1, 0, 9, 0, -1, 9),
    ):  # fmt: skip
        pass
    names = [entry.name for entry in tmp_path.iterdir()] + ['missing.tif']
    assert len(names) == 8
    for name in names:
        with pytest.raises(OutputError, match=name):
            read_provenance(tmp_path / name)


def test_stores_are_read_too(tmp_path: Path, upload: Upload) -> None:
    write_pooled(tmp_path / 'e.parquet')
    write_grid(tmp_path / 'maps')
    store = tmp_path / 'maps.zarr'
    (store / 'EPSG_32633').mkdir(parents=True)
    (store / 'EPSG_32633' / 'zarr.json').write_text('{}')
    (store / 'metadata.json').write_text(to_json(PROVENANCE))
    maps = upload(tmp_path / 'maps')
    for url in (
        upload(tmp_path / 'e.parquet'),
        maps,
        next(maps.glob('*.tif')),
        maps / 'metadata.json',
        upload(store),
    ):
        assert read_provenance(url) == read_provenance(str(url)) == PROVENANCE
        assert carries_provenance(url) == ('.' in url.name and url.suffix != '.zarr')
    other = upload(tmp_path / 'maps.zarr' / 'EPSG_32633' / 'zarr.json', 'other.json')
    assert not carries_provenance(other)
    for url in (other, maps / 'none.tif', maps.parent / 'none'):
        with pytest.raises(OutputError, match=str(url)):
            read_provenance(url)
