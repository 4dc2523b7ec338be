import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import geopandas as gpd
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Subset

from dynamicvis_geo.callbacks import EmbeddingWriter
from dynamicvis_geo.callbacks.output import merge
from dynamicvis_geo.datasets import collate
from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.formats import FORMATS
from dynamicvis_geo.models import DynamicVis
from dynamicvis_geo.provenance import read_provenance
from dynamicvis_geo.store import Store
from tests.callbacks.standins import Chips, Task
from tests.callbacks.test_writer import predict, values

OUTPUTS = pytest.mark.parametrize(
    ('name', 'output', 'format_'),
    [
        ('a.parquet', 'pooled', None),
        ('folder', 'pooled', 'geoparquet'),
        ('maps', 'grid', None),
    ],
)


def fail(writer: EmbeddingWriter, chips: Any, task: Task) -> None:
    task.error = task.error or RuntimeError('the model failed')
    # Lightning turns an interrupt into SystemExit.
    with pytest.raises((RuntimeError, SystemExit)):
        predict(writer, chips, task, batch_size=2)


@OUTPUTS
@pytest.mark.parametrize('error', [RuntimeError('broken'), KeyboardInterrupt()])
def test_what_is_done_is_not_done_again(
    tmp_path: Path,
    name: str,
    output: str,
    format_: str | None,
    error: BaseException,
) -> None:
    path, chips = tmp_path / name, Chips(11)
    first = EmbeddingWriter(path, format_, block_chips=2)
    fail(first, chips, Task(output, fail_at=3, error=error))
    done, chips.asked = chips.asked[:6], []
    writer = EmbeddingWriter(path, format_)
    assert sorted({*done, *writer.remaining(chips)}) == list(range(11))
    predict(writer, chips, Task(output), batch_size=2)
    assert sorted([*done, *chips.asked]) == list(range(11))
    assert writer.summary is not None
    assert (writer.summary.before, writer.summary.written) == (6, 5)
    assert {entry.name for entry in tmp_path.iterdir()} == {name, f'{name}.stac'}
    if output == 'pooled':
        assert values(path) == {f'chip-{i}': float(i) for i in range(11)}
    else:
        assert len(list(path.glob('*.tif'))) == 11
    # It is one run, however often it was interrupted.
    assert len(read_provenance(path)['runs']) == 1


@OUTPUTS
def test_second_run_computes_and_changes_nothing(
    tmp_path: Path, name: str, output: str, format_: str | None
) -> None:
    path, chips = tmp_path / name, Chips(5)
    predict(EmbeddingWriter(path, format_), chips, Task(output))
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob('*')}
    chips.asked = []
    writer = EmbeddingWriter(path, format_)
    predict(writer, chips, Task(output))
    assert chips.asked == []
    after = {file: file.stat().st_mtime_ns for file in tmp_path.rglob('*')}
    assert {f for f in files if f.is_file()} == {f for f in after if f.is_file()}
    assert all(files[f] == after[f] for f in files if f.is_file())


@OUTPUTS
def test_output_is_extended_by_more_chips(
    tmp_path: Path, name: str, output: str, format_: str | None
) -> None:
    path = tmp_path / name
    predict(EmbeddingWriter(path, format_), Chips(3), Task(output))
    chips = Chips(7)
    predict(EmbeddingWriter(path, format_), chips, Task(output))
    assert sorted(chips.asked) == [3, 4, 5, 6]
    assert len(read_provenance(path)['runs']) == 2
    assert count_of(path, output) == 7


def count_of(path: Path, output: str) -> int:
    return len(values(path)) if output == 'pooled' else len(list(path.glob('*.tif')))


def test_rows_of_an_interrupted_run_equal_those_of_another(tmp_path: Path) -> None:
    chips = Chips(30, points=True)
    fail(EmbeddingWriter(tmp_path / 'a.parquet'), chips, Task(fail_at=4))
    predict(EmbeddingWriter(tmp_path / 'a.parquet'), chips)
    backwards = Subset(chips, range(29, -1, -1))
    predict(EmbeddingWriter(tmp_path / 'b.parquet', block_chips=3), backwards)
    one, two = (
        gpd.read_parquet(tmp_path / name) for name in ('a.parquet', 'b.parquet')
    )
    assert len(one) == 30
    assert one.equals(two)


def test_two_points_in_one_chip_both_have_a_row(tmp_path: Path) -> None:
    class Coinciding(Chips):
        def rows(self, indices: Any) -> gpd.GeoDataFrame:
            rows = super().rows(indices)
            rows['chip_id'] = 'the same'
            return rows

    path, chips = tmp_path / 'a.parquet', Coinciding(4, points=True)
    fail(EmbeddingWriter(path), chips, Task(fail_at=1))
    predict(EmbeddingWriter(path), chips)
    points = gpd.read_parquet(path)['point_id'].tolist()
    assert sorted(points) == [f'plot {i}' for i in range(4)]


@OUTPUTS
def test_an_extension_that_lacked_only_its_completion_is_completed(
    tmp_path: Path,
    name: str,
    output: str,
    format_: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / name
    predict(EmbeddingWriter(path, format_), Chips(3), Task(output))
    writer = EmbeddingWriter(path, format_)
    with monkeypatch.context() as patch:
        patch.setattr(FORMATS[writer._output.format_name], 'merge', full)
        with pytest.raises(OutputError, match='No space left'):
            predict(writer, Chips(8), Task(output))
    chips = Chips(8)
    last = EmbeddingWriter(path, format_)
    predict(last, chips, Task(output))
    assert chips.asked == []
    assert {entry.name for entry in tmp_path.iterdir()} == {name, f'{name}.stac'}
    assert count_of(path, output) == 8


def full(*_: Any, **__: Any) -> None:
    raise OutputError('No space left on device')


@OUTPUTS
def test_an_extension_that_was_placed_and_not_cleared_away_is_not_doubled(
    tmp_path: Path,
    name: str,
    output: str,
    format_: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / name
    predict(EmbeddingWriter(path, format_), Chips(3), Task(output))
    with monkeypatch.context() as patch:
        patch.setattr(Store, 'clear', full)
        with pytest.raises(OutputError, match='No space left'):
            predict(EmbeddingWriter(path, format_), Chips(8), Task(output))
    held = (file for file in path.parent.rglob(f'{name}*/*') if file.is_file())
    placed = {file: file.read_bytes() for file in held}
    placed |= {path: path.read_bytes()} if path.is_file() else {}
    chips = Chips(8)
    predict(EmbeddingWriter(path, format_), chips, Task(output))
    assert chips.asked == []
    assert {entry.name for entry in tmp_path.iterdir()} == {name, f'{name}.stac'}
    assert count_of(path, output) == 8
    files = [path] if path.is_file() else list(path.iterdir())
    assert {file: file.read_bytes() for file in files} == {
        file: content for file, content in placed.items() if file in files
    }


class OwnDataModule(LightningDataModule):
    """Shows its chips to nobody before the run."""

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Chips(9), batch_size=2, collate_fn=collate)


def test_data_modules_of_others_are_continued_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / 'a.parquet'
    for task in (Task(fail_at=2, error=RuntimeError('the model failed')), Task()):
        trainer = Trainer(
            accelerator='cpu',
            devices=1,
            callbacks=[EmbeddingWriter(path, block_chips=2)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        with suppress(RuntimeError):
            trainer.predict(task, datamodule=OwnDataModule(), return_predictions=False)
    assert values(path) == {f'chip-{i}': float(i) for i in range(9)}
    assert len(gpd.read_parquet(path)) == 9
    assert 'chips are finished, and will be computed again' in caplog.text
    assert read_provenance(path)['source']['dataset'] == 'stand-in'


# Other settings.


@pytest.mark.parametrize('finished', [True, False])
def test_other_settings_are_refused_with_a_table(
    tmp_path: Path, finished: bool
) -> None:
    path = tmp_path / 'a.parquet'
    if finished:
        predict(EmbeddingWriter(path), Chips(3))
    else:
        fail(EmbeddingWriter(path), Chips(9), Task(fail_at=1))
    task = Task()
    task.provenance = {'backbone': 'another', 'weights': 'random'}
    chips = Chips(3 if finished else 9)
    with pytest.raises(OutputError) as caught:
        predict(EmbeddingWriter(path, dtype='float16'), chips, task)
    lines = str(caught.value).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ['setting', 'there', 'now'],
        ['dtype', 'float32', 'float16'],
        ['model.backbone', 'stand-in', 'another'],
    ]
    assert 'overwrite' in lines[-1]
    assert chips.asked == []
    predict(EmbeddingWriter(path), Chips(9))
    assert len(values(path)) == 9


def backbone_of_the_first_version() -> dict[str, Any]:
    return {
        'weights': 'pretrained',
        'repository': None,
        'file': 'dynamicvis_b.pth',
        'revision': None,
        'sha256': 'a' * 64,
        'loaded_keys': 311,
        'trained_settings': {'spatial_token_keep_ratios': [8, 4, 2, 1]},
        'arch': 'b',
        'path_type': 'forward_reverse_mean',
        'sampling_scale': 0.1,
        'mamba2': False,
        'img_size': [64, 64],
        'implementation': 'native',
        'dtype': 'float32',
        'scan': 'c',
        'parameters': {'count': 37_000_000, 'mean': 0.123456789},
    }


@pytest.mark.parametrize('finished', [True, False])
def test_output_of_the_first_version_is_continued_under_its_settings(
    tmp_path: Path, finished: bool
) -> None:
    path = tmp_path / 'a.parquet'
    old = Task(fail_at=None if finished else 1)
    old.provenance = {'backbone': backbone_of_the_first_version()}
    if finished:
        predict(EmbeddingWriter(path), Chips(3), old)
    else:
        fail(EmbeddingWriter(path), Chips(9), old)
    with torch.device('meta'):
        same = DynamicVis(img_size=64)
        other = DynamicVis(img_size=64, spatial_token_keep_ratios=(1, 1, 1, 1))
    described = backbone_of_the_first_version() | {'scan': 'auto', 'file': 'b.pth'}
    numerics = {'precision': '32-true', 'kernel': 'torch', 'tf32': False}
    task = Task()
    task.provenance = {
        'backbone': described | {'settings': other.settings},
        'numerics': numerics,
    }
    with pytest.raises(OutputError) as caught:
        predict(EmbeddingWriter(path), Chips(9), task)
    lines = str(caught.value).splitlines()[2:-1]
    assert [' '.join(line.split()) for line in lines] == [
        'model.backbone.settings.spatial_token_keep_ratios [8, 4, 2, 1] [1, 1, 1, 1]'
    ]
    task.provenance['backbone'] = described | {'settings': same.settings}
    predict(EmbeddingWriter(path), Chips(9), task)
    assert len(values(path)) == 9


def test_overwrite_starts_anew_after_an_interrupted_run(tmp_path: Path) -> None:
    path = tmp_path / 'a.parquet'
    fail(EmbeddingWriter(path), Chips(9), Task(fail_at=2))
    task = Task()
    task.provenance = {'backbone': 'another'}
    predict(EmbeddingWriter(path, overwrite=True), Chips(2), task)
    assert len(values(path)) == 2
    assert len(read_provenance(path)['runs']) == 1


def test_other_places_wait_for_the_end_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / 'a.parquet'
    fail(EmbeddingWriter(path), Chips(9), Task(fail_at=1))
    with pytest.raises(OutputError, match='merge --partial') as caught:
        predict(EmbeddingWriter(path), Chips(12))
    rows = [line.split()[:2] for line in str(caught.value).splitlines()[2:-1]]
    assert rows == [['chips', '9,']]
    merged = merge(path, partial=True)
    assert (merged.rows, merged.missing) == (2, 4)
    shutil.rmtree(tmp_path / 'a.parquet.partial')
    chips = Chips(12)
    predict(EmbeddingWriter(path), chips)
    assert len(chips.asked) == 10
    assert len(values(path)) == 12


def test_a_process_that_is_late_finds_the_plan_of_the_first(tmp_path: Path) -> None:
    # It sees GeoTIFFs of a run that it takes part in, and would leave them out.
    path, chips = tmp_path / 'maps', Chips(9)
    fail(EmbeddingWriter(path, block_chips=4), chips, Task('grid', fail_at=3))
    late = EmbeddingWriter(path)
    assert len(list(path.glob('*.tif'))) >= 4
    left = late.remaining(chips)
    chips.asked = []
    predict(late, chips, Task('grid'))
    assert sorted(chips.asked) == left.tolist()
    assert len(list(path.glob('*.tif'))) == 9


# Failures.


class Failing(Task):
    """Cannot have the image of every third chip, as ChipDataset tells of it."""

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        prediction = super().predict_step(batch, batch_idx)
        if 'chip' not in prediction:
            return prediction
        good = batch['chip'].flatten() % 3 != 0
        bad = batch['chip'][~good].flatten().tolist()
        kept = {key: value[good] for key, value in prediction.items()}
        failures = [(row, 'NoImageryError', f'no imagery of {row}') for row in bad]
        return {**kept, 'failures': failures}


@pytest.mark.parametrize('points', [False, True])
@OUTPUTS
def test_failures_are_listed_left_alone_and_tried_again(
    tmp_path: Path, name: str, output: str, format_: str | None, points: bool
) -> None:
    path = tmp_path / name
    writer = EmbeddingWriter(path, format_)
    predict(writer, Chips(9, points=points), Failing(output))
    assert writer.summary is not None
    assert (writer.summary.written, writer.summary.failed) == (6, 3)
    listed = gpd.read_parquet(writer.failures)
    assert listed['id'].tolist() == ['chip-0', 'chip-3', 'chip-6']
    assert set(listed['reason']) == {'NoImageryError'}
    assert listed['message'][1] == 'no imagery of 3'
    assert listed.geometry.is_valid.all()

    chips = Chips(10, points=points)
    again = EmbeddingWriter(path, format_)
    predict(again, chips, Task(output))
    assert chips.asked == [9]
    assert again.summary is not None
    assert again.summary.failed == 3

    chips.asked = []
    retry = EmbeddingWriter(path, format_, retry_failed=True)
    predict(retry, chips, Task(output))
    assert sorted(chips.asked) == [0, 3, 6]
    assert retry.summary is not None
    assert (retry.summary.written, retry.summary.failed) == (3, 0)
    assert not retry.failures.exists()


def test_failures_survive_an_interrupted_run(tmp_path: Path) -> None:
    path = tmp_path / 'a.parquet'
    first = Chips(9)
    fail(EmbeddingWriter(path, block_chips=2), first, Failing(fail_at=2))
    chips = Chips(9)
    writer = EmbeddingWriter(path)
    predict(writer, chips, Failing())
    assert not set(first.asked[:4]) & set(chips.asked)
    assert gpd.read_parquet(writer.failures)['id'].tolist() == [
        'chip-0',
        'chip-3',
        'chip-6',
    ]


# What the file system does.


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files that may not grow: what a process sees of a full disk."""
    resource = pytest.importorskip('resource', reason='POSIX')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures('full_disk')
@OUTPUTS
def test_full_disk(tmp_path: Path, name: str, output: str, format_: str | None) -> None:
    writer = EmbeddingWriter(tmp_path / name, format_)
    with pytest.raises(OutputError, match='cannot write'):
        predict(writer, Chips(20), Task(output, dimensions=4000))
    assert not [file for file in tmp_path.rglob('*.parquet') if file.is_file()]
    assert not list(tmp_path.rglob('*.tif'))


@pytest.mark.parametrize(
    ('name', 'format_'), [('a.parquet', None), ('b', 'geoparquet')]
)
def test_full_disk_in_the_merge(
    tmp_path: Path, request: pytest.FixtureRequest, name: str, format_: str | None
) -> None:
    path, chips = tmp_path / name, Chips(8)
    request.getfixturevalue('full_disk')
    writer = EmbeddingWriter(path, format_, block_chips=1)
    with pytest.raises(OutputError, match='cannot write'):
        predict(writer, chips, Noise(dimensions=4000))
    assert len(list(tmp_path.glob('*.partial/block-*'))) == 8
    assert not list(tmp_path.rglob('data-*')) + list(tmp_path.glob('*.parquet'))
    resource = pytest.importorskip('resource')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1], limits[1]))
    chips.asked = []
    predict(EmbeddingWriter(path, format_), chips, Noise(dimensions=4000))
    assert chips.asked == []
    assert {entry.name for entry in tmp_path.iterdir()} == {name, f'{name}.stac'}


class Noise(Task):
    """Embeddings that cannot be compressed."""

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        prediction = super().predict_step(batch, batch_idx)
        prediction['embedding'] = torch.rand_like(prediction['embedding'])
        return prediction


@OUTPUTS
def test_failures_in_an_unfinished_run_are_tried_again(
    tmp_path: Path, name: str, output: str, format_: str | None
) -> None:
    path, first = tmp_path / name, Chips(9)
    failing = Failing(output, fail_at=3)
    fail(EmbeddingWriter(path, format_, block_chips=2), first, failing)
    chips = Chips(9)
    writer = EmbeddingWriter(path, format_, retry_failed=True)
    predict(writer, chips, Task(output))
    assert writer.summary is not None
    assert writer.summary.failed == 0
    assert not writer.failures.exists()
    # A block is done as a whole.
    assert {0, 3, 6} <= set(chips.asked)
    assert len(chips.asked) < 9
    assert count_of(path, output) == 9


def test_folder_of_the_run_that_is_gone(tmp_path: Path) -> None:
    class Removing(Task):
        def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            (tmp_path / 'a.parquet.partial' / 'run.json').unlink(missing_ok=True)
            return super().predict_step(batch, batch_idx)

    with pytest.raises(OutputError, match='is gone'):
        predict(EmbeddingWriter(tmp_path / 'a.parquet'), Chips(5), Removing())
    assert not (tmp_path / 'a.parquet').exists()
