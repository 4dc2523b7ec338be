from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from dynamicvis_geo.callbacks import ChipProgress, EmbeddingWriter
from dynamicvis_geo.datasets import collate
from tests.callbacks.standins import Chips, Task
from tests.callbacks.test_resume import Failing


def predict(path: Path, task: Task, count: int = 9) -> None:
    Trainer(
        accelerator='cpu',
        devices=1,
        callbacks=[EmbeddingWriter(path), ChipProgress()],
        logger=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    ).predict(
        task,
        DataLoader(Chips(count), batch_size=4, collate_fn=collate),
        return_predictions=False,
    )


def test_bar_counts_chips_and_failures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level('INFO', 'dynamicvis_geo'):
        predict(tmp_path / 'a.parquet', Failing())
    last = capsys.readouterr().err.split('\r')[-1]
    assert '9/9' in last
    assert 'failed=3' in last
    assert 'chip/s' in last
    lines = [record.getMessage() for record in caplog.records]
    assert 'process 0 of 1: 9 chips on cpu' in lines
    assert 'process 0 of 1: done, 6 chips, 3 failed' in lines


def test_bar_knows_what_is_left_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(tmp_path / 'a.parquet', Task(), 5)
    capsys.readouterr()
    predict(tmp_path / 'a.parquet', Task(), 9)
    assert '4/4' in capsys.readouterr().err.split('\r')[-1]
