import json
import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import shapely
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from dynamicvis_geo import ChipDataModule, ChipDataset, FeatureExtraction
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.samplers import GridSampler

from ..datasets.rasters import Areas

#: What a process did: chips of each batch, and the features of each chip.
Done = list[dict[str, float]]


class Places(Areas):
    """Images that grow brighter eastwards."""

    def __getitem__(self, query: Any) -> dict[str, Any]:
        image = torch.zeros(3, 8, 8)
        image[0] = (query[0].start - 384_000) / 640 * 50
        return {'image': image}


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Notes(BasePredictionWriter):
    """Takes blocks, as a writer does, and notes what each process does in a file."""

    def __init__(self, folder: Path, blocks: Sequence[Any] | None = None) -> None:
        super().__init__('batch')
        self.folder, self.blocks = folder, blocks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.blocks is not None:
            trainer.datamodule.take(self.blocks[trainer.global_rank])  # type: ignore[attr-defined]

    def write_on_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        prediction: Mapping[str, Tensor] = arguments[1]
        chips = prediction['chip'][:, 0].tolist()
        values = prediction['embedding'][:, 0].tolist()
        with (self.folder / str(trainer.global_rank)).open('a') as file:
            print(json.dumps(dict(zip(chips, values, strict=True))), file=file)


def data(count: int = 11, **options: Any) -> ChipDataModule:
    zones = [
        Places([shapely.box(384_000, 0, 384_000 + 640 * part, 640)], crs=crs)
        for crs, part in (
            ('EPSG:32618', count - count // 3),
            ('EPSG:32619', count // 3),
        )
        if part
    ]
    return ChipDataModule([(zone, GridSampler(zone, 64)) for zone in zones], **options)


def predict(
    folder: Path, module: ChipDataModule, blocks: Any = None, **options: Any
) -> list[Done]:
    """Return what each process did."""
    folder.mkdir()
    trainer = Trainer(
        accelerator='cpu',
        callbacks=[Notes(folder, blocks)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    task = FeatureExtraction(Mean(), input_range=(0.0, 1000.0))
    trainer.predict(task, datamodule=module, return_predictions=False)
    files = [folder / str(rank) for rank in range(trainer.world_size)]
    return [
        [json.loads(line) for line in file.read_text().splitlines()]
        if file.exists()
        else []
        for file in files
    ]


def rows_of(batches: Sequence[Mapping[str, float]]) -> list[list[int]]:
    return [[*map(int, batch)] for batch in batches]


def in_processes(*arguments: Any, **options: Any) -> list[Done]:
    with warnings.catch_warnings():
        # Processes are forked from one that has threads, which they do not use.
        warnings.simplefilter('ignore')
        return predict(*arguments, **options)


@pytest.mark.parametrize('workers', [0, 1, 2])
def test_all_zones_in_one_run(tmp_path: Path, workers: int) -> None:
    module = data(num_workers=workers, persistent_workers=True, prefetch_factor=3)
    (batches,) = predict(tmp_path / 'a', module, devices=1)
    values = {int(row): value for batch in batches for row, value in batch.items()}
    assert sorted(values) == [*range(len(module.chips))] == [*range(11)]
    for _, zone in module.chips.chips.sort_values('minx').groupby('crs'):
        assert (np.diff([values[row] for row in zone.index]) > 0).all()
    # They can be had after a run as before.
    assert module.chips[3]['chip'].tolist() == [3]
    # No batch has chips of two zones.
    zones = module.chips.table['source']
    assert all(len({*zones[rows]}) == 1 for rows in rows_of(batches))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_process_does_what_it_takes(tmp_path: Path, workers: int) -> None:
    module = data(batch_size=3, num_workers=workers)
    blocks = [[np.array([7, 8, 9, 10]), np.array([2])]]
    for name in ('a', 'again'):
        (batches,) = predict(tmp_path / name, module, blocks, devices=1)
        assert rows_of(batches) == [[7, 8, 9], [10], [2]]
    # Until the next time.
    assert len(module.predict_dataloader()) == 3
    assert predict(tmp_path / 'nothing', module, [[]], devices=1) == [[]]
    module.take(None)
    (batches,) = predict(tmp_path / 'all', module, devices=1)
    assert sum(len(batch) for batch in batches) == 11


def test_other_stages_need_no_chips() -> None:
    module = data()
    module.setup('fit')
    assert not hasattr(module, 'chips')


@pytest.mark.parametrize(
    ('devices', 'count'),
    [(2, 11), (4, 3), (2, 1)],
)
def test_processes_do_the_batches_that_one_does(
    tmp_path: Path, devices: int, count: int
) -> None:
    options = {'strategy': 'ddp_fork', 'devices': devices}
    # As it comes to processes that are not forked.
    module = pickle.loads(pickle.dumps(data(count, batch_size=1)))
    shares = in_processes(tmp_path / 'shares', module, **options)
    (alone,) = predict(tmp_path / 'alone', data(count, batch_size=1), devices=1)
    joined = [*chain(*shares)]
    assert sorted(joined, key=str) == sorted(alone, key=str)
    assert len(joined) == count
    if count > 4:
        assert all(shares)


@pytest.mark.parametrize('workers', [0, 1])
def test_processes_take_unequal_shares(tmp_path: Path, workers: int) -> None:
    blocks = [[np.arange(5)], [np.arange(5, 7), np.arange(9, 11)], []]
    module = data(num_workers=workers)
    done = in_processes(tmp_path / 'a', module, blocks, strategy='ddp_fork', devices=3)
    assert [*map(rows_of, done)] == [[[0, 1, 2, 3], [4]], [[5, 6], [9, 10]], []]


def test_lightning_says_nothing_of_how_batches_are_dealt_out(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        predict(tmp_path / 'all', data(num_workers=2), devices=1)
        predict(tmp_path / 'nothing', data(num_workers=2), [[]], devices=1)
    words = ('IterableDataset', 'batch indices', 'length')
    messages = [str(warning.message) for warning in said]
    assert not [text for text in messages if any(word in text for word in words)]


class Table(Dataset[dict[str, Tensor]]):
    """Chips of one's own."""

    def __init__(self, chips: ChipDataset) -> None:
        self.table, self.source_crs = chips.table, chips.source_crs
        self.strides, self.point_ids = chips.strides, chips.point_ids

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {'image': torch.full((3, 8, 8), 9.0), 'chip': torch.tensor([row])}


def test_chips_of_ones_own_are_kept(tmp_path: Path) -> None:
    other = data(count=5)
    other.setup()
    module = ChipDataModule(num_workers=1)
    module.chips = Table(other.chips)  # type: ignore[assignment]
    (batches,) = predict(tmp_path / 'a', module, devices=1)
    assert sorted(chain(*rows_of(batches))) == [*range(5)]


@dataclass
class Writer:
    """The part of a writer that a plan asks."""

    rows: NDArray[np.int64]
    overwrite: bool = False

    def chip_bytes(self, features: tuple[int, int, int]) -> Literal[40]:
        return 40

    def remaining(self, chips: ChipDataset) -> NDArray[np.int64]:
        assert len(chips) == 11
        return self.rows


def test_a_plan_tells_what_a_writer_has_already() -> None:
    module = data()
    plans: list[Any] = [
        module.plan(Writer(np.array([1, 4, 9]), overwrite))  # type: ignore[arg-type]
        for overwrite in (False, True)
    ]
    assert [(plan.chips, plan.finished) for plan in plans] == [(11, 8), (11, 0)]
    assert plans[0].write_bytes == 3 * 40


@pytest.mark.parametrize(
    'wrong',
    [
        {'batch_size': 0},
        {'num_workers': -1},
        {'prefetch_factor': 0},
        {'batch_size': 1.5},
    ],
)
def test_numbers_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(wrong))):
        data(**wrong)
