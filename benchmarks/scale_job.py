"""A run that ``benchmarks.scale`` watches: FOLDER CHIPS PROCESSES WRITER."""

import sys
from pathlib import Path
from typing import Any

import geopandas as gpd
import pandas as pd
import shapely
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torchgeo.datasets import GeoDataset

from dynamicvis_geo import (
    ChipDataModule,
    EmbeddingWriter,
    FeatureExtraction,
    GridSampler,
)

SIZE = 32


class Synthetic(GeoDataset):
    """Images whose pixels follow from their place."""

    def __init__(self, side: int) -> None:
        self.index = gpd.GeoDataFrame(
            geometry=[shapely.box(0, 0, side * SIZE * 10, side * SIZE * 10)],
            index=pd.IntervalIndex.from_tuples(
                [(pd.Timestamp('2024-06-01'), pd.Timestamp('2024-06-30'))],
                closed='both',
                name='datetime',
            ),
            crs='EPSG:32632',
        )
        self._res = (10.0, 10.0)

    def __getitem__(self, query: Any) -> dict[str, Any]:
        x, y = query[0].start, query[1].start
        ramp = torch.arange(SIZE * SIZE * 3, dtype=torch.float32)
        return {'image': ((ramp + x + y) % 3000).reshape(3, SIZE, SIZE)}


class Count(Callback):
    """Says how many chips a process has done."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the chips of a batch."""
        self.count += len(outputs['embedding'])
        file = self.folder / f'count-{trainer.global_rank}'
        new = file.with_name(f'.{file.name}')
        new.write_text(str(self.count))
        new.replace(file)


def strip(chips: int) -> tuple[Synthetic, GridSampler]:
    """Return some chips, 100 in a row."""
    dataset = Synthetic(-(-chips // 100))
    roi = shapely.box(0, 0, 100 * SIZE * 10, chips // 100 * SIZE * 10)
    return dataset, GridSampler(dataset, SIZE, roi=roi)


def main() -> None:
    folder, chips, processes, writer = Path(sys.argv[1]), *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    callbacks: list[Callback] = [Count(folder)]
    if writer:
        # As fast as a GPU: blocks of 64, as on a CPU, would be 50 a second.
        callbacks.append(EmbeddingWriter(folder / 'out.parquet', block_chips=1024))
    distributed: dict[str, Any] = {'strategy': 'ddp'} if processes > 1 else {}
    trainer = Trainer(
        accelerator='cpu',
        devices=processes,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **distributed,
    )
    task = FeatureExtraction(nn.Conv2d(3, 768, 16, 16))
    data = ChipDataModule([strip(chips)], batch_size=32)
    trainer.predict(task, datamodule=data, return_predictions=False)
    (folder / 'returned').touch()


if __name__ == '__main__':
    main()
