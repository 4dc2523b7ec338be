"""What the commands that embed chips have in common."""

import logging
import time
import warnings
from argparse import Namespace

from lightning.pytorch import Trainer

from dynamicvis_geo.callbacks import EmbeddingWriter
from dynamicvis_geo.commands.options import choose_device
from dynamicvis_geo.datamodules import ChipDataModule
from dynamicvis_geo.tasks import FeatureExtraction


def predict(
    data: ChipDataModule,
    module: FeatureExtraction,
    writer: EmbeddingWriter,
    options: Namespace,
) -> str:
    """Embed chips and write them.

    Args:
        data: the chips to embed.
        module: the task.
        writer: where to.
        options: ``device`` and ``precision``.

    Returns:
        a sentence that says what was written, how many chips, and how long it took.
    """
    quieten_lightning()
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
    trainer.predict(module, datamodule=data, return_predictions=False)
    seconds = time.perf_counter() - start
    kind = 'feature maps' if module.output == 'grid' else 'embeddings'
    return (
        f'Wrote {writer.path}: {kind} of {writer.written} chips in {seconds:.1f} s '
        f'({writer.written / seconds:.2f} chips/s).'
    )


def quieten_lightning() -> None:
    """Leave of Lightning's output the progress bar only."""
    logging.getLogger('lightning.pytorch').setLevel(logging.WARNING)
    logging.getLogger('lightning.fabric').setLevel(logging.WARNING)
    for message in ('.*does not have many workers.*', '.*GPU available but not used.*'):
        warnings.filterwarnings('ignore', message)
    warnings.filterwarnings('ignore', category=DeprecationWarning)
    warnings.filterwarnings('ignore', category=FutureWarning)
