import warnings
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import shapely
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from dynamicvis_geo import ChipDataModule, EmbeddingWriter, FeatureExtraction
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.samplers import GridSampler

from ..datasets.rasters import Areas


class Places(Areas):
    """Images that grow brighter eastwards."""

    def __getitem__(self, query: Any) -> dict[str, Any]:
        image = torch.zeros(3, 8, 8)
        image[0] = (query[0].start - 384_000) / 640 * 50
        return {'image': image}


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


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


def predict(path: Path, module: ChipDataModule, **options: Any) -> gpd.GeoDataFrame:
    trainer = Trainer(
        accelerator='cpu',
        callbacks=[EmbeddingWriter(path)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    task = FeatureExtraction(Mean(), input_range=(0.0, 1000.0))
    trainer.predict(task, datamodule=module, return_predictions=False)
    return gpd.read_parquet(path).sort_values('id', ignore_index=True)


@pytest.mark.parametrize('workers', [0, 1])
def test_all_zones_in_one_run(tmp_path: Path, workers: int) -> None:
    module = data(num_workers=workers, persistent_workers=True, prefetch_factor=3)
    table = predict(tmp_path / 'e.parquet', module, devices=1)
    assert len(table) == len(module.chips) == 11
    for _, zone in table.sort_values('minx').groupby('crs'):
        assert (np.diff([row[0] for row in zone['embedding']]) > 0).all()


def test_chips_set_aside_are_left_out_before_they_are_divided() -> None:
    module = data(batch_size=3)
    module.setup('predict')
    ids = module.chips.chips['chip_id']
    module.chips.restrict(leave_out=ids[:7])
    batches = [
        batch['chip'].flatten().tolist() for batch in module.predict_dataloader()
    ]
    assert batches == [[7, 8, 9], [10]]
    module.setup('predict')
    assert len(module.chips.remaining) == 4
    module.chips.restrict()
    assert len(module.predict_dataloader()) == 4


def test_other_stages_need_no_chips() -> None:
    module = data()
    module.setup('fit')
    assert not hasattr(module, 'chips')


@pytest.mark.parametrize(
    ('strategy', 'devices', 'count'),
    [('ddp_fork', 2, 11), ('ddp_fork', 4, 3), ('ddp_spawn', 2, 1)],
)
def test_processes_do_every_chip_once(
    tmp_path: Path, strategy: str, devices: int, count: int
) -> None:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        # Processes are forked from one that has threads, which they do not use.
        warnings.simplefilter('ignore')
        table = predict(
            tmp_path / 'e.parquet', data(count), strategy=strategy, devices=devices
        )
    alone = predict(tmp_path / 'alone.parquet', data(count), devices=1)
    assert table['id'].tolist() == alone['id'].tolist()
    assert [list(v) for v in table['embedding']] == [
        list(v) for v in alone['embedding']
    ]


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
