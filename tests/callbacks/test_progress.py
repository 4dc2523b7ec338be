import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import shapely
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dynamicvis_geo import (
    BackboneConfig,
    ChipDataModule,
    EmbeddingDataModule,
    EmbeddingWriter,
    FeatureExtraction,
    LinearProbe,
    ScenesDataModule,
)
from dynamicvis_geo.callbacks import ChipProgress
from dynamicvis_geo.datasets import collate
from dynamicvis_geo.errors import SourceError
from dynamicvis_geo.samplers import GridSampler
from tests.commands.conftest import scene_in
from tests.datasets.rasters import Areas


class Some(Areas):
    """Has no image of every third chip."""

    def __getitem__(self, query: Any) -> dict[str, Any]:
        if query[0].start % 30 == 0:
            raise SourceError('no image')
        return {'image': torch.zeros(3, 8, 8)}


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def data() -> ChipDataModule:
    dataset = Some([shapely.box(0, 0, 90, 10)])
    return ChipDataModule([(dataset, GridSampler(dataset, 1))], on_error='skip')


def predict(data: LightningDataModule | DataLoader[Any]) -> None:
    Trainer(
        accelerator='cpu',
        devices=1,
        callbacks=[ChipProgress()],
        logger=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    ).predict(FeatureExtraction(Mean()), data, return_predictions=False)


@pytest.mark.parametrize('own', [False, True])
def test_bar_counts_chips_and_failures(
    own: bool, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    module = data()
    module.setup()
    with caplog.at_level('INFO', 'dynamicvis_geo'):
        predict(
            DataLoader(module.chips, batch_size=4, collate_fn=collate)
            if own
            else module
        )
    last = capsys.readouterr().err.split('\r')[-1]
    assert '9/9' in last
    assert 'retries=0, failed=3' in last
    assert 'chip/s' in last
    lines = [record.getMessage() for record in caplog.records]
    assert 'process 0 of 1: 9 chips on cpu' in lines
    assert 'process 0 of 1: done, 6 chips, 3 failed' in lines


def test_bar_knows_what_a_process_takes(capsys: pytest.CaptureFixture[str]) -> None:
    module = data()
    module.take([np.arange(5, 7), np.arange(2)])
    predict(module)
    assert '4/4' in capsys.readouterr().err.split('\r')[-1]


def test_a_run_in_python_says_no_more_than_lightning(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Commands that ran in this process have let messages out.
    monkeypatch.setattr(logging.getLogger('dynamicvis_geo'), 'handlers', [])
    monkeypatch.setattr(logging.getLogger('dynamicvis_geo'), 'level', 0)
    table = tmp_path / 'e.parquet'
    Trainer(
        callbacks=[EmbeddingWriter(table)],
        logger=False,
        accelerator='cpu',
        enable_progress_bar=False,
    ).predict(
        FeatureExtraction(BackboneConfig(weights='random', img_size=32)),
        datamodule=ScenesDataModule(scene_in(tmp_path), size=64),
        return_predictions=False,
    )
    labels = tmp_path / 'labels.csv'
    chips = pd.read_parquet(table)[['id']]
    chips.assign(kind=list('ababab')).to_csv(labels, index=False)
    plots = EmbeddingDataModule(table, 'kind', labels, split='random')
    plots.setup('fit')
    Trainer(
        max_epochs=1,
        logger=False,
        accelerator='cpu',
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    ).fit(LinearProbe(plots.task, plots.dim, plots.classes), datamodule=plots)
    assert 'chip' not in ''.join(capfd.readouterr())
    ours = [str(one.message) for one in recwarn if 'dynamicvis_geo' in one.filename]
    assert [text[:16] for text in ours] == ["weights='random'"]
