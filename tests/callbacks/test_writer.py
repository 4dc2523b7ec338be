import os
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import torch
from lightning.pytorch import LightningModule, Trainer
from s3fs import S3FileSystem
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from dynamicvis_geo.callbacks import EmbeddingWriter
from dynamicvis_geo.datamodules import ChipDataModule
from dynamicvis_geo.datasets import collate
from dynamicvis_geo.errors import OutputError, SpecError
from dynamicvis_geo.formats.base import RunChips
from dynamicvis_geo.provenance import read_provenance
from tests.callbacks.standins import Chips, Task


def predict(
    writer: EmbeddingWriter,
    dataset: Dataset[Any],
    task: LightningModule | None = None,
    batch_size: int = 4,
    **trainer: Any,
) -> None:
    options: dict[str, Any] = {'accelerator': 'cpu', 'devices': 1, **trainer}
    data: Any = DataLoader(dataset, batch_size=batch_size, collate_fn=collate)
    if isinstance(dataset, RunChips):
        data = ChipDataModule(batch_size=batch_size)
        data.chips = dataset
    Trainer(
        callbacks=[writer],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    ).predict(task or Task(), data, return_predictions=False)


def values(path: Path) -> dict[str, float]:
    frame = gpd.read_parquet(path)
    return {row['id']: float(row['embedding'][0]) for _, row in frame.iterrows()}


def hidden(folder: Path) -> list[Path]:
    return list(folder.glob('.*'))


def test_pooled_embeddings_keep_their_chips(tmp_path: Path) -> None:
    path = tmp_path / 'new' / 'out.parquet'
    writer = EmbeddingWriter(path)
    predict(writer, Chips(10))
    assert values(path) == {f'chip-{i}': float(i) for i in range(10)}
    assert writer.written == 10
    assert hidden(path.parent) == []


def test_subset_and_concatenation_are_seen_through(tmp_path: Path) -> None:
    chips = Chips(10)
    dataset: Dataset[Any] = ConcatDataset([Subset(chips, [7, 3]), Subset(chips, [9])])
    predict(EmbeddingWriter(tmp_path / 'out.parquet'), dataset)
    assert values(tmp_path / 'out.parquet') == {'chip-7': 7, 'chip-3': 3, 'chip-9': 9}


def test_grids_become_a_folder(tmp_path: Path) -> None:
    path = tmp_path / 'maps'
    predict(EmbeddingWriter(path), Chips(3), Task('grid'))
    names = {'chip-0.tif', 'chip-1.tif', 'chip-2.tif', 'metadata.json'}
    assert {file.name for file in path.iterdir()} == names
    with rasterio.open(path / 'chip-2.tif') as image:
        np.testing.assert_array_equal(image.read()[:, 0, 0], [2, 4, 6, 8, 10])
    assert read_provenance(path)['emb:dimensions'] == 5
    assert hidden(tmp_path) == []


@pytest.mark.parametrize('dtype', ['float16', 'int8'])
def test_small_types_keep_the_values(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / 'out.parquet'
    predict(EmbeddingWriter(path, dtype=dtype), Chips(10))
    frame = gpd.read_parquet(path).sort_values('centre_lon')
    stored = np.stack(frame['embedding'].to_list())
    assert stored.dtype == dtype
    scale = frame['scale'].to_numpy()[:, None] if dtype == 'int8' else 1
    expected = np.arange(10)[:, None] * np.arange(1, 6)
    step = expected.max(axis=1, keepdims=True) / 127 / 2 if dtype == 'int8' else 0
    assert (np.abs(stored * scale - expected) <= step + 1e-6).all()
    assert read_provenance(path)['data_type'] == dtype


@pytest.mark.parametrize(
    ('name', 'dtype'), [('a.parquet', 'float64'), ('maps', 'float16')]
)
def test_type_that_cannot_be_stored(tmp_path: Path, name: str, dtype: str) -> None:
    with pytest.raises(SpecError, match=dtype):
        EmbeddingWriter(tmp_path / name, dtype=dtype)


def test_features_beyond_float16_are_refused(tmp_path: Path) -> None:
    task = Task(dimensions=60_000)
    with pytest.raises(OutputError, match='float16'):
        predict(
            EmbeddingWriter(tmp_path / 'a.parquet', dtype='float16'), Chips(3), task
        )


@pytest.mark.parametrize('name', ['out', 'emb_v1.0'])
def test_folder_of_geoparquet(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    predict(EmbeddingWriter(path, format='geoparquet'), Chips(10))
    assert {f.name for f in path.iterdir()} == {'data-00000.parquet', '_metadata.json'}
    assert values(path) == {f'chip-{i}': float(i) for i in range(10)}
    assert gpd.read_parquet(path).crs == 'EPSG:4326'
    assert read_provenance(path)['emb:type'] == 'chip'


@pytest.mark.parametrize('limit', [0, 1])
def test_a_part_makes_no_output(
    tmp_path: Path, limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / 'out.parquet'
    writer = EmbeddingWriter(path, block_chips=2)
    predict(writer, Chips(5), batch_size=2, limit_predict_batches=limit)
    assert f'{5 - 2 * limit} chips have not come' in caplog.text
    assert not path.exists()
    assert writer.summary is None
    chips = Chips(5)
    predict(EmbeddingWriter(path), chips, batch_size=2)
    assert len(chips.asked) == 5 - 2 * limit
    assert len(values(path)) == 5


def test_no_chips_give_a_valid_empty_file(tmp_path: Path) -> None:
    path = tmp_path / 'out.parquet'
    predict(EmbeddingWriter(path), Chips(0))
    frame = gpd.read_parquet(path)
    assert len(frame) == 0
    assert frame.crs == 'EPSG:4326'
    assert pq.read_schema(path).field('embedding').type.list_size == 5


def test_no_chips_give_an_empty_folder(tmp_path: Path) -> None:
    predict(EmbeddingWriter(tmp_path / 'maps'), Chips(0), Task('grid'))
    assert [f.name for f in (tmp_path / 'maps').iterdir()] == ['metadata.json']


# What does not fit is refused before a chip is computed.


class Unreachable(Task):
    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        raise AssertionError('a chip was computed')


@pytest.mark.parametrize(
    ('name', 'output', 'remedy'),
    [
        ('out.parquet', 'grid', 'folder'),
        ('out', 'pooled', r'\.parquet'),
    ],
)
def test_output_that_does_not_fit_the_path(
    tmp_path: Path, name: str, output: str, remedy: str
) -> None:
    with pytest.raises(OutputError, match=remedy):
        predict(EmbeddingWriter(tmp_path / name), Chips(2), Unreachable(output))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('name', 'format_'),
    [('out.csv', None), ('out', 'shapefile'), ('out.parquet', 'geotiff')],
)
def test_format_that_cannot_be(tmp_path: Path, name: str, format_: str | None) -> None:
    with pytest.raises(OutputError, match=format_ or 'csv'):
        EmbeddingWriter(tmp_path / name, format=format_)


def test_shape_that_contradicts_the_format(tmp_path: Path) -> None:
    task = Task('grid')
    task.output = None  # type: ignore[assignment]  # a module that does not say
    task.predict_step = lambda batch, batch_idx: {  # type: ignore[method-assign]
        'embedding': torch.zeros(2, 5, 4, 4),
        'chip': batch['chip'],
    }
    with pytest.raises(OutputError, match=r'\(2, 5, 4, 4\).*pooled'):
        predict(EmbeddingWriter(tmp_path / 'out.parquet'), Chips(2), task)
    assert list(tmp_path.iterdir()) == []


def test_dataset_without_chips(tmp_path: Path) -> None:
    dataset = TensorDataset(torch.zeros(2, 3))
    with pytest.raises(OutputError, match=r'TensorDataset.*ChipDataset'):
        predict(EmbeddingWriter(tmp_path / 'out.parquet'), dataset, Unreachable())
    assert list(tmp_path.iterdir()) == []


def test_two_chip_tables(tmp_path: Path) -> None:
    dataset: Dataset[Any] = ConcatDataset([Chips(2), Chips(2)])
    with pytest.raises(OutputError, match='2 ChipDatasets'):
        predict(EmbeddingWriter(tmp_path / 'out.parquet'), dataset, Unreachable())


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('x')
    with pytest.raises(OutputError, match="file' is a file"):
        predict(
            EmbeddingWriter(tmp_path / 'file' / 'out.parquet'), Chips(2), Unreachable()
        )


@pytest.mark.skipif(
    not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write anywhere'
)
def test_parent_without_permission(tmp_path: Path) -> None:
    (tmp_path / 'locked').mkdir(mode=0o500)
    with pytest.raises(OutputError, match='Permission denied'):
        predict(
            EmbeddingWriter(tmp_path / 'locked' / 'a' / 'out.parquet'),
            Chips(2),
            Unreachable(),
        )


# Existing outputs.


def test_existing_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / 'out.parquet'
    path.write_text('mine')
    for overwrite in (False, True):
        with pytest.raises(OutputError, match='carries no provenance'):
            predict(EmbeddingWriter(path, overwrite=overwrite), Chips(2), Unreachable())
    assert path.read_text() == 'mine'
    assert [entry.name for entry in tmp_path.iterdir()] == ['out.parquet']


def test_overwrite_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / 'out.parquet'
    predict(EmbeddingWriter(path), Chips(5))
    predict(EmbeddingWriter(path, overwrite=True), Chips(2))
    assert len(values(path)) == 2


def test_overwrite_replaces_a_folder_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / 'maps'
    predict(EmbeddingWriter(path), Chips(5), Task('grid'))
    (path / 'chip-0.tif.aux.xml').write_text('what QGIS leaves')
    predict(EmbeddingWriter(path, overwrite=True), Chips(2), Task('grid'))
    assert len(list(path.iterdir())) == 3
    assert {entry.name for entry in tmp_path.iterdir()} == {'maps', 'maps.stac'}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file()
    }


@pytest.mark.parametrize('foreign', ['thesis.docx', 'scene.tif'])
@pytest.mark.parametrize('others', [None, '{"camera": "Hasselblad"}'])
def test_overwrite_spares_a_folder_of_others(
    tmp_path: Path, foreign: str, others: str | None
) -> None:
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images' / foreign).write_text('years of work')
    if others is not None:
        (tmp_path / 'images' / 'metadata.json').write_text(others)
    before = contents(tmp_path)
    for name, options in (('images', {}), ('images', {'format': 'geoparquet'})):
        writer = EmbeddingWriter(tmp_path / name, overwrite=True, **options)
        output = 'pooled' if options else 'grid'
        with pytest.raises(OutputError, match='images'):
            predict(writer, Chips(2), Unreachable(output))
    assert contents(tmp_path) == before


@pytest.mark.parametrize('kind', ['geotiff', 'geoparquet'])
def test_overwrite_spares_a_file_among_our_own(tmp_path: Path, kind: str) -> None:
    path = tmp_path / 'out'
    output = 'pooled' if kind == 'geoparquet' else 'grid'
    predict(EmbeddingWriter(path, kind), Chips(2), Task(output))
    name = 'data-00007.parquet' if kind == 'geoparquet' else 'photo.tif'
    (path / name).write_text('years of work')
    before = contents(tmp_path)
    writer = EmbeddingWriter(path, kind, overwrite=True)
    with pytest.raises(OutputError, match='did not write'):
        predict(writer, Chips(2), Unreachable(output))
    assert contents(tmp_path) == before
    (path / name).unlink()
    predict(EmbeddingWriter(path, kind, overwrite=True), Chips(1), Task(output))


@pytest.mark.parametrize('beside', ['out.parquet.partial/mine', 'out.failures.parquet'])
def test_what_lies_beside_an_output_is_spared(tmp_path: Path, beside: str) -> None:
    (tmp_path / beside).parent.mkdir(exist_ok=True)
    (tmp_path / beside).write_text('years of work')
    before = contents(tmp_path)
    for overwrite in (False, True):
        writer = EmbeddingWriter(tmp_path / 'out.parquet', overwrite=overwrite)
        with pytest.raises(OutputError, match='choose another name'):
            predict(writer, Chips(2), Unreachable())
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ('url', 'told'),
    [
        ('nowhere://bucket/maps', 'no URL of a known kind'),
        ('https://example.org/x.parquet', 'can only be read'),
        ('/vsis3/bucket/maps', 'only images are read'),
    ],
)
def test_urls_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=told):
        EmbeddingWriter(url)
    assert not list(tmp_path.iterdir())


def test_a_store_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith('AWS_')]:
        monkeypatch.delenv(name)
    monkeypatch.setenv('AWS_EC2_METADATA_DISABLED', 'true')
    monkeypatch.setenv('AWS_ENDPOINT_URL', 'http://127.0.0.1:9')
    S3FileSystem.clear_instance_cache()
    with pytest.raises(OutputError, match=r"'s3://bucket.*credentials"):
        predict(EmbeddingWriter('s3://bucket/x.parquet'), Chips(2), Unreachable())
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize('path', ['', ' ', '/', '.' * 300, '~nobody-of-this-name/x'])
def test_paths_that_are_none(path: str) -> None:
    with pytest.raises(OutputError):
        EmbeddingWriter(path)


def test_empty_folder_is_used(tmp_path: Path) -> None:
    predict(EmbeddingWriter(tmp_path), Chips(2), Task('grid'))
    assert len(list(tmp_path.glob('*.tif'))) == 2


@pytest.mark.parametrize(('name', 'output'), [('a.parquet', 'pooled'), ('b', 'grid')])
def test_file_and_folder_are_not_confused(
    tmp_path: Path, name: str, output: str
) -> None:
    path = tmp_path / name
    if output == 'pooled':
        path.mkdir()
    else:
        path.write_text('mine')
    writer = EmbeddingWriter(path, overwrite=True)
    with pytest.raises(OutputError, match='another name'):
        predict(writer, Chips(2), Unreachable(output))
