from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from sklearn.linear_model import LogisticRegression

from dynamicvis_geo import EmbeddingDataModule
from dynamicvis_geo.errors import SpecError
from tests.datasets.embedding_parts import vectors, write_part

COUNT = 30
COVER = ['water', 'forest', 'bare'] * 10


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_part(
        tmp_path / 'chips.parquet',
        vectors(COUNT),
        cover=COVER,
        fold=['Training'] * 20 + ['valid'] * 5 + ['test'] * 4 + [None],
        height=np.linspace(0, 1, COUNT),
        provenance={'model': 'm'},
    )


def rows(data: EmbeddingDataModule) -> list[list[int]]:
    return [data.rows(split).tolist() for split in ('train', 'val', 'test')]


@pytest.mark.parametrize('split', ['random', 'stratified', 'spatial'])
def test_splits_divide_the_chips(path: Path, split: str) -> None:
    data = EmbeddingDataModule(path, 'cover', split=split, block_m=3000)
    assert (data.task, data.num_classes, data.dim) == ('multiclass', 3, 6)
    assert data.classes == ('bare', 'forest', 'water')
    assert data.provenance == {'model': 'm'}
    assert data.joined is None
    parts = rows(data)
    assert sorted(chain(*parts)) == list(range(COUNT))
    assert [len(part) for part in parts] == pytest.approx([18, 6, 6], abs=1)
    X, y = data.arrays('val')
    assert (X.dtype, y.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(X, vectors(COUNT)[parts[1]])
    assert [data.classes[label] for label in y] == [COVER[row] for row in parts[1]]
    again = EmbeddingDataModule(path, 'cover', split=split, block_m=3000)
    assert rows(again) == parts
    LogisticRegression().fit(*data.arrays('train'))


def test_split_of_a_column(path: Path) -> None:
    data = EmbeddingDataModule(path, 'cover', split='fold')
    with pytest.warns(UserWarning, match='1 of 30 labelled chips have no value'):
        data.setup()
    assert rows(data) == [list(range(20)), list(range(20, 25)), list(range(25, 29))]


def test_labels_and_split_of_another_file(path: Path, tmp_path: Path) -> None:
    labels = tmp_path / 'plots.csv'
    pd.DataFrame(
        {
            'plot': [f'chip-{i}' for i in range(12)],
            'biomass': np.arange(12) + 0.5,
            'use': ['train', 'val', 'test'] * 4,
        }
    ).to_csv(labels, index=False)
    data = EmbeddingDataModule(path, 'biomass', labels, split='use', on='plot')
    assert (data.task, data.classes, data.num_classes) == ('regression', (), 0)
    assert rows(data) == [list(range(i, 12, 3)) for i in range(3)]
    assert data.arrays('test')[1].tolist() == [2.5, 5.5, 8.5, 11.5]
    assert data.joined is not None
    assert len(data.joined.unmatched) == 18


def test_labels_that_are_not_used_are_told(path: Path) -> None:
    labels = pd.DataFrame(
        {'id': [f'chip-{i}' for i in range(9)] + ['elsewhere'], 'v': COVER[:10]}
    )
    with pytest.warns(UserWarning, match='1 of 10 labels are not used'):
        EmbeddingDataModule(path, 'v', labels).setup()


def test_labels_by_place(path: Path) -> None:
    labels = pd.DataFrame(
        {'lon': 13 + 0.02 * np.arange(9), 'lat': 48.001, 'v': COVER[:9]}
    )
    data = EmbeddingDataModule(path, 'v', labels, max_distance_m=200)
    assert data.joined is not None
    assert data.joined.how == 'nearest'
    assert sorted(chain(*rows(data))) == list(range(9))


@pytest.mark.parametrize('workers', [0, 2])
def test_dataloaders(path: Path, workers: int) -> None:
    data = EmbeddingDataModule(path, 'cover', batch_size=4, num_workers=workers)
    batches = list(data.train_dataloader())
    # Training has 18 chips; a rest would have no full batch.
    assert [len(batch['index']) for batch in batches] == [4] * 4
    seen = torch.cat([batch['index'] for batch in batches]).tolist()
    assert len(set(seen)) == 16
    assert set(seen) <= set(data.rows('train').tolist())
    assert seen != sorted(seen)
    for batch in batches:
        np.testing.assert_array_equal(
            batch['embedding'], vectors(COUNT)[batch['index'].numpy()]
        )
        names = [data.classes[label] for label in batch['label'].tolist()]
        assert names == [COVER[row] for row in batch['index'].tolist()]
    tested = torch.cat([batch['index'] for batch in data.test_dataloader()])
    assert tested.tolist() == data.rows('test').tolist()
    predicted = list(data.predict_dataloader())
    assert torch.cat([batch['index'] for batch in predicted]).tolist() == list(
        range(COUNT)
    )
    assert 'label' not in predicted[0]


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 3)
        self.seen: dict[str, list[int]] = {}

    def _step(self, name: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.seen.setdefault(name, []).extend(batch['index'].tolist())
        scores = self.linear(batch['embedding'])
        return torch.nn.functional.cross_entropy(scores, batch['label'])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self._step('train', batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._step('val', batch)

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.linear(batch['embedding'])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings('ignore:.*does not have many workers')
def test_trainer(path: Path, tmp_path: Path) -> None:
    data = EmbeddingDataModule(path, 'cover', batch_size=4)
    trainer = Trainer(
        accelerator='cpu',
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    model = Model()
    trainer.fit(model, datamodule=data)
    assert len(model.seen['train']) == 16
    assert model.seen['val'] == data.rows('val').tolist()
    predictions = trainer.predict(model, datamodule=data)
    assert predictions is not None
    assert sum(len(part) for part in predictions) == COUNT


def test_arguments_from_yaml(path: Path) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(EmbeddingDataModule, 'data')
    config = f"""
    data:
      path: {path}
      target: height
      split: spatial
      fractions: [0.5, 0.25, 0.25]
      block_m: 4000
    """
    made = parser.instantiate_classes(parser.parse_string(config)).data
    assert made.task == 'regression'
    assert [len(part) for part in rows(made)] == pytest.approx([15, 7, 7], abs=2)


def test_task_can_be_named(path: Path) -> None:
    data = EmbeddingDataModule(path, 'cover', task='multilabel')
    assert data.task == 'multilabel'
    assert data.arrays('train')[1].shape == (18, 3)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'split': 'nearby'}, "split='nearby' is none of random.*id, datetime"),
        ({'split': 'height'}, 'are none of train, val, test'),
        ({'target': 'height', 'split': 'stratified'}, 'one class a sample'),
        ({'target': 'age'}, "no column 'age'"),
        ({'split': 'spatial', 'block_m': 1e6}, 'too few for 3 splits'),
        ({'task': 'binary'}, '3 classes'),
        ({'batch_size': 0}, 'batch_size=0'),
        ({'num_workers': -1}, 'num_workers=-1'),
    ],
)
def test_unusable_arguments(
    path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        EmbeddingDataModule(path, **{'target': 'cover', **arguments}).setup()


def test_empty_split(path: Path) -> None:
    data = EmbeddingDataModule(path, 'cover', fractions=(0.8, 0.0, 0.2))
    assert len(data.rows('val')) == 0
    assert list(data.val_dataloader()) == []
    with pytest.raises(SpecError, match="split 'val' has no samples"):
        data.arrays('val')
    with pytest.raises(SpecError, match="split='dev' is none of"):
        data.rows('dev')
