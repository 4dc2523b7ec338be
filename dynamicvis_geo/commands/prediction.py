"""What the commands that embed chips have in common."""

import logging
import time
import warnings
from argparse import Namespace
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from dynamicvis_geo.callbacks import EmbeddingWriter
from dynamicvis_geo.datasets import ChipDataset, collate
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models.config import BackboneConfig
from dynamicvis_geo.tasks import FeatureExtraction


def backbone_config(weights: str) -> BackboneConfig:
    """Read the environment, and what ``--weights`` says.

    Raises:
        SpecError: if a variable has a value that cannot be used.
    """
    if weights in ('pretrained', 'random'):
        return BackboneConfig.from_env(weights=weights)
    return BackboneConfig.from_env(checkpoint=Path(weights))


def predict(
    chips: ChipDataset,
    module: FeatureExtraction,
    writer: EmbeddingWriter,
    options: Namespace,
) -> str:
    """Embed chips and write them.

    Args:
        chips: what to embed.
        module: the task.
        writer: where to.
        options: ``batch_size``, ``num_workers``, ``device`` and ``precision``.

    Returns:
        a sentence that says what was written, how many chips, and how long it took.
    """
    quieten_lightning()
    loader = DataLoader(
        chips,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        collate_fn=collate,
    )
    accelerator, devices = choose_device(options.device)
    trainer = Trainer(
        accelerator=accelerator,
        devices=devices,
        precision=options.precision,
        callbacks=[writer],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.predict(module, loader, return_predictions=False)
    seconds = time.perf_counter() - start
    kind = 'feature maps' if module.output == 'grid' else 'embeddings'
    return (
        f'Wrote {writer.path}: {kind} of {writer.written} chips in {seconds:.1f} s '
        f'({writer.written / seconds:.2f} chips/s).'
    )


def choose_device(device: str) -> tuple[str, str | int | list[int]]:
    """Turn ``--device`` into Lightning's accelerator and devices.

    Raises:
        SpecError: if there is no such device here.
    """
    kind, colon, number = device.partition(':')
    if kind not in ('auto', 'cpu', 'cuda', 'mps') or (
        colon and not (kind == 'cuda' and number.isdecimal())
    ):
        raise SpecError(
            f'--device {device!r} is unknown: choose auto, cpu, cuda, cuda:N or mps'
        )
    if kind == 'cuda':
        count = torch.cuda.device_count()
        if int(number or 0) >= count:
            raise SpecError(
                f'--device {device}: PyTorch finds {count} CUDA devices here: choose '
                'another, or --device cpu'
            )
        return 'cuda', [int(number or 0)]
    if kind == 'mps' and not torch.backends.mps.is_available():
        raise SpecError('--device mps: PyTorch finds no MPS here: choose --device cpu')
    return kind, 1


def quieten_lightning() -> None:
    """Leave of Lightning's output the progress bar only."""
    logging.getLogger('lightning.pytorch').setLevel(logging.WARNING)
    logging.getLogger('lightning.fabric').setLevel(logging.WARNING)
    for message in ('.*does not have many workers.*', '.*GPU available but not used.*'):
        warnings.filterwarnings('ignore', message)
    warnings.filterwarnings('ignore', category=DeprecationWarning)
    warnings.filterwarnings('ignore', category=FutureWarning)
