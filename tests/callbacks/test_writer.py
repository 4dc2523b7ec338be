import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.multiprocessing.spawn import ProcessRaisedException, spawn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from dynamicvis_geo.callbacks import EmbeddingWriter, geoparquet
from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.provenance import read_provenance
from tests.callbacks.standins import Chips, Task


def predict(
    writer: EmbeddingWriter,
    dataset: Dataset[Any],
    task: LightningModule | None = None,
    batch_size: int = 4,
    collate_fn: Callable[..., Any] | None = None,
    **trainer: Any,
) -> None:
    options: dict[str, Any] = {'accelerator': 'cpu', 'devices': 1, **trainer}
    Trainer(
        callbacks=[writer],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    ).predict(
        task or Task(),
        DataLoader(dataset, batch_size=batch_size, collate_fn=collate_fn),
        return_predictions=False,
    )


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


def test_many_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geoparquet, 'ROW_GROUP_BYTES', 8 * 5 * 4)
    path = tmp_path / 'out.parquet'
    predict(EmbeddingWriter(path), Chips(30))
    assert pq.ParquetFile(path).num_row_groups == 4
    assert values(path) == {f'chip-{i}': float(i) for i in range(30)}


@pytest.mark.parametrize(('count', 'limit'), [(0, 1.0), (3, 0)])
def test_no_chips_give_a_valid_empty_file(
    tmp_path: Path, count: int, limit: float
) -> None:
    path = tmp_path / 'out.parquet'
    predict(EmbeddingWriter(path), Chips(count), limit_predict_batches=limit)
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
    with pytest.raises(OutputError, match='overwrite'):
        predict(EmbeddingWriter(path), Chips(2), Unreachable())
    assert path.read_text() == 'mine'


def test_overwrite_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / 'out.parquet'
    predict(EmbeddingWriter(path), Chips(5))
    predict(EmbeddingWriter(path, overwrite=True), Chips(2))
    assert len(values(path)) == 2


def test_overwrite_replaces_a_folder_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / 'maps'
    predict(EmbeddingWriter(path), Chips(5), Task('grid'))
    with pytest.raises(OutputError, match='exists'):
        predict(EmbeddingWriter(path), Chips(2), Unreachable('grid'))
    (path / 'chip-0.tif.aux.xml').write_text('what QGIS leaves')
    predict(EmbeddingWriter(path, overwrite=True), Chips(2), Task('grid'))
    assert len(list(path.iterdir())) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ['maps']


@pytest.mark.parametrize('foreign', ['thesis.docx', 'scene.tif'])
def test_overwrite_spares_a_folder_of_others(tmp_path: Path, foreign: str) -> None:
    (tmp_path / foreign).write_text('years of work')
    writer = EmbeddingWriter(tmp_path, overwrite=True)
    with pytest.raises(OutputError):
        predict(writer, Chips(2), Unreachable('grid'))
    assert (tmp_path / foreign).read_text() == 'years of work'


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


# Interrupted runs.


@pytest.mark.parametrize(('name', 'output'), [('a.parquet', 'pooled'), ('b', 'grid')])
@pytest.mark.parametrize('error', [RuntimeError('broken'), KeyboardInterrupt()])
def test_failure_leaves_the_old_output_and_nothing_else(
    tmp_path: Path,
    name: str,
    output: str,
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(geoparquet, 'ROW_GROUP_BYTES', 1)
    path = tmp_path / name
    predict(EmbeddingWriter(path), Chips(2), Task(output))
    before = read_provenance(path)
    # Lightning turns an interrupt into SystemExit.
    with pytest.raises((RuntimeError, SystemExit)):
        predict(
            EmbeddingWriter(path, overwrite=True),
            Chips(9),
            Task(output, fail_at=2, error=error),
            batch_size=2,
        )
    assert read_provenance(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_failure_of_a_first_run_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match='the model failed'):
        predict(EmbeddingWriter(tmp_path / 'out'), Chips(9), Task('grid', fail_at=1))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files that may not grow: what a process sees of a full disk."""
    resource = pytest.importorskip('resource', reason='POSIX')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures('full_disk')
@pytest.mark.parametrize(('name', 'output'), [('a.parquet', 'pooled'), ('b', 'grid')])
@pytest.mark.parametrize('row_group', [1, geoparquet.ROW_GROUP_BYTES])
def test_full_disk(
    tmp_path: Path,
    name: str,
    output: str,
    row_group: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(geoparquet, 'ROW_GROUP_BYTES', row_group)
    with pytest.raises(OutputError, match='cannot write'):
        predict(
            EmbeddingWriter(tmp_path / name), Chips(20), Task(output, dimensions=4000)
        )
    assert list(tmp_path.iterdir()) == []


# Several processes.


class FailsInOneProcess(Task):
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        if self.global_rank == 1:
            raise RuntimeError('the model failed')
        return super().predict_step(batch, batch_idx)


def run_as_rank(rank: int, port: int, folder: Path) -> None:
    # What torchrun sets for the processes that it starts.
    os.environ.update(
        LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port)
    )
    two: dict[str, Any] = {'devices': 2, 'strategy': 'ddp', 'batch_size': 2}
    predict(EmbeddingWriter(folder / 'a.parquet'), Chips(11), Task(), **two)
    predict(EmbeddingWriter(folder / 'b'), Chips(11), Task('grid'), **two)
    predict(EmbeddingWriter(folder / 'c'), Chips(4), FailsInOneProcess('grid'), **two)


@pytest.mark.skipif(sys.platform == 'win32', reason='gloo')
def test_two_processes_write_every_chip_once(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    # Which of the two processes is heard first is left to chance.
    failed = 'the model failed|another process has failed'
    with pytest.raises(ProcessRaisedException, match=failed):
        spawn(run_as_rank, (port, tmp_path), nprocs=2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ['a.parquet', 'b']
    frame = gpd.read_parquet(tmp_path / 'a.parquet')
    assert len(frame) == 11
    assert values(tmp_path / 'a.parquet') == {f'chip-{i}': i for i in range(11)}
    geo = json.loads(pq.read_metadata(tmp_path / 'a.parquet').metadata[b'geo'])
    np.testing.assert_allclose(
        geo['columns']['geometry']['bbox'], frame.total_bounds, rtol=0, atol=1e-12
    )
    assert len(list((tmp_path / 'b').glob('*.tif'))) == 11
    for name in ('a.parquet', 'b'):
        assert read_provenance(tmp_path / name)['run']['processes'] == 2
