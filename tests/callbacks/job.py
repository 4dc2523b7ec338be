"""A prediction run as a process of its own, to be killed: ``python -m`` this module."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from dynamicvis_geo.callbacks import EmbeddingWriter
from dynamicvis_geo.datamodules import ChipDataModule
from tests.callbacks.standins import Chips, Task


class Held(Task):
    """Stops before a batch that is to be computed, for as long as a file is there."""

    def __init__(self, output: str, hold: Path, hold_at: int) -> None:
        super().__init__(output)
        self.hold, self.hold_at, self.computed = hold, hold_at, 0

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        while self.computed == self.hold_at and self.hold.exists():
            time.sleep(0.05)
        self.computed += 'image' in batch
        return super().predict_step(batch, batch_idx)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('path', type=Path)
    parser.add_argument('--chips', type=int, default=40)
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--strategy', default='ddp')
    parser.add_argument('--output', default='pooled')
    parser.add_argument('--nodes', type=int, default=1)
    parser.add_argument('--workers', type=int, default=0)
    parser.add_argument('--shard')
    parser.add_argument('--hold', type=Path, default=Path('/nowhere'))
    parser.add_argument('--hold-at', type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    processes = options.processes if options.nodes == 1 else 1
    distributed: dict[str, Any] = {'devices': processes, 'num_nodes': options.nodes}
    if options.processes > 1:
        distributed['strategy'] = options.strategy
    data = ChipDataModule(batch_size=2, num_workers=options.workers)
    data.chips = Chips(options.chips)  # type: ignore[assignment]
    Trainer(
        accelerator='cpu',
        callbacks=[EmbeddingWriter(options.path, block_chips=4, shard=options.shard)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **distributed,
    ).predict(
        Held(options.output, options.hold, options.hold_at),
        data,
        return_predictions=False,
    )


if __name__ == '__main__':
    sys.exit(main())
