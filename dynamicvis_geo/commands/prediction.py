"""What the commands that embed chips have in common."""

import logging
import os
import sys
import warnings
from argparse import Namespace

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus

from dynamicvis_geo import termination
from dynamicvis_geo.callbacks import ChipProgress, EmbeddingWriter, RunSummary
from dynamicvis_geo.commands.options import choose_device, require_launcher
from dynamicvis_geo.datamodules import ChipDataModule
from dynamicvis_geo.errors import RunEndedError
from dynamicvis_geo.tasks import FeatureExtraction

_logger = logging.getLogger(__name__)

#: What the shell sees if the images of some chips could not be had.
SOME_FAILED = 3


def predict(
    data: ChipDataModule,
    module: FeatureExtraction,
    writer: EmbeddingWriter,
    options: Namespace,
) -> int:
    """Embed chips, write them, and print a summary.

    Args:
        data: the chips to embed.
        module: the task.
        writer: where to.
        options: ``device``, ``devices``, ``nodes``, ``precision`` and ``quiet``.

    Returns:
        the exit code: 0, or :data:`SOME_FAILED`.
    """
    quieten_lightning()
    log(options.quiet)
    accelerator, devices = choose_device(options.device, options.devices)
    trainer = Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=options.nodes,
        precision=options.precision,
        callbacks=[writer, ChipProgress()] if not options.quiet else [writer],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=not options.quiet,
    )
    return run_trainer(trainer, module, data, writer)


def run_trainer(
    trainer: Trainer,
    module: FeatureExtraction,
    data: LightningDataModule,
    writer: EmbeddingWriter,
) -> int:
    """Run a prediction, and print a summary.

    Returns:
        the exit code: 0, or :data:`SOME_FAILED`.
    """
    require_launcher(trainer.num_nodes)
    if trainer.num_nodes > 1:
        _logger.info(
            'waiting until the processes of all %d machines have come to %s',
            trainer.num_nodes,
            os.environ.get('MASTER_ADDR', 'the first of them'),
        )
    termination.launch(trainer)
    try:
        trainer.predict(module, datamodule=data, return_predictions=False)
    except RunEndedError:
        # Success all the same, if another process has done all of it.
        chips = getattr(data, 'chips', None)
        if chips is None or len(writer.remaining(chips)):
            raise
        print(f'{writer.path} is finished: another process has made it meanwhile.')
        return SOME_FAILED if writer.failures.exists() else 0
    except termination.Terminated:
        raise
    except SystemExit as error:
        # Lightning's answer to Ctrl-C.
        if trainer.state.status == TrainerStatus.INTERRUPTED:
            raise KeyboardInterrupt from error
        raise
    if writer.summary is None:
        # The first process speaks for all.
        return 0
    print(summary_text(writer.summary, module.output))
    # Of failures, the shard tells that makes the output.
    failed = writer.summary.failed and not writer.summary.missing
    return SOME_FAILED if failed else 0


def summary_text(summary: RunSummary, output: str) -> str:
    """Say in a few sentences what became of a run."""
    kind = 'feature maps' if output == 'grid' else 'embeddings'
    done = (
        f'{kind} of {summary.written} chips in {summary.seconds:.1f} s '
        f'({summary.written / summary.seconds:.2f} chips/s)'
    )
    if summary.missing:
        return (
            f'Done: {done}. {summary.missing} blocks are left to other shards; the '
            f'last of them makes {summary.path}, or dynamicvis-geo merge '
            f'{summary.path} does.'
        )
    if summary.written or not summary.before:
        text = f'Wrote {summary.path}: {done}'
        text += f', beside {summary.before} from before.' if summary.before else '.'
    else:
        text = f'{summary.path} holds {kind} of all {summary.before} chips already.'
    if summary.failed:
        text += (
            f'\n{summary.failed} chips have failed: listed in {summary.failures}; '
            '--retry-failed tries them again.'
        )
    return text


def log(quiet: bool) -> None:
    """Let the package's own messages out, a line each, on standard error."""
    logger = logging.getLogger('dynamicvis_geo')
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter('dynamicvis-geo: %(message)s'))
    # One for each command that a process runs: standard error may have changed.
    logger.handlers = [handler]


def quieten_lightning() -> None:
    """Leave of Lightning's output the progress bar only."""
    logging.getLogger('lightning.pytorch').setLevel(logging.WARNING)
    logging.getLogger('lightning.fabric').setLevel(logging.WARNING)
    for message in ('.*does not have many workers.*', '.*GPU available but not used.*'):
        warnings.filterwarnings('ignore', message)
    # No chips are left, or none for this process: the summary says so.
    warnings.filterwarnings('ignore', '.*Total length of .*is zero.*')
    warnings.filterwarnings('ignore', category=DeprecationWarning)
    warnings.filterwarnings('ignore', category=FutureWarning)
