"""The Trainer that options describe, and a run of it."""

import logging
import os
import re
import warnings
from argparse import Namespace

from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus

from dynamicvis_geo import termination
from dynamicvis_geo.callbacks import ChipProgress, EmbeddingWriter, RunSummary
from dynamicvis_geo.commands import SOME_FAILED
from dynamicvis_geo.commands.backbone import choose_device
from dynamicvis_geo.commands.options import log
from dynamicvis_geo.datamodules import ChipDataModule
from dynamicvis_geo.errors import RunEndedError, SpecError
from dynamicvis_geo.tasks import FeatureExtraction

_logger = logging.getLogger(__name__)

#: What is raised where memory ends. Of a process that gets images, and that the system
#: ended, PyTorch says no more.
_NO_MEMORY = re.compile(
    r'DataLoader worker .*(exited unexpectedly|signal: (Killed|Bus error))|'
    r'MemoryError|OutOfMemory|allocate memory|not enough memory'
)


def require_launcher(nodes: int) -> None:
    """Refuse a run on several machines of which none knows the others.

    Args:
        nodes: Value of ``--nodes``.

    Raises:
        SpecError: If nothing has started it on several machines: it would wait for
            them for ever.
    """
    # torchrun and Kubeflow set the variable, and so may a user.
    launchers = (SLURMEnvironment, LSFEnvironment, MPIEnvironment)
    if nodes == 1 or 'MASTER_ADDR' in os.environ:
        return
    if not any(launcher.detect() for launcher in launchers):
        raise SpecError(
            f'--nodes {nodes} (trainer.num_nodes): no launcher has started this on '
            f'{nodes} machines, so it would wait for them in vain: start it with srun '
            'or torchrun on each, set MASTER_ADDR, MASTER_PORT and NODE_RANK on each, '
            'or leave out --nodes'
        )


def predict(
    data: ChipDataModule,
    module: FeatureExtraction,
    writer: EmbeddingWriter,
    arguments: Namespace,
) -> int:
    """Embed chips, write them, and print a summary.

    Args:
        data: the chips to embed.
        module: the task.
        writer: where to.
        arguments: ``device``, ``devices``, ``nodes``, ``precision`` and ``quiet``.

    Returns:
        the exit code: 0, or :data:`SOME_FAILED`.
    """
    quieten_lightning()
    log(arguments.quiet)
    accelerator, devices = choose_device(arguments.device, arguments.devices)
    trainer = Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=arguments.nodes,
        precision=arguments.precision,
        callbacks=[writer, ChipProgress()] if not arguments.quiet else [writer],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=not arguments.quiet,
    )
    return run_trainer(trainer, module, data, writer)


def run_trainer(
    trainer: Trainer,
    module: FeatureExtraction,
    data: LightningDataModule,
    writer: EmbeddingWriter,
) -> int:
    """Run a prediction, and print a summary.

    Args:
        trainer: The Trainer.
        module: The task.
        data: The chips.
        writer: Writes the output.

    Returns:
        the exit code: 0, or :data:`SOME_FAILED`.

    Raises:
        SpecError: If the memory seems too small for the batches, or as
            :func:`require_launcher`.
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
    except (MemoryError, RuntimeError) as error:
        if not _NO_MEMORY.search(f'{type(error).__name__}: {error}'):
            raise
        raise SpecError(_too_large(data, error)) from error
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


def _too_large(data: LightningDataModule, error: Exception) -> str:
    """Say which batches there was no memory for."""
    what = 'a batch of images'
    if isinstance(data, ChipDataModule):
        table = data.chips.table
        side = max(int(table[name].max(initial=0)) for name in ('width', 'height'))
        gigabytes = 12 * side**2 * data.batch_size / 1e9
        what = (
            f'batches of {data.batch_size} chips of {side} pixels, {gigabytes:.2g} GB '
            f'each, in {data.num_workers or 1} processes (take smaller numbers)'
        )
    (*_, reason) = str(error).split('\n')
    return f'there seems to be too little memory for {what}: {reason}'


def summary_text(summary: RunSummary, output: str) -> str:
    """Write in a few sentences what became of a run.

    Args:
        summary: Of the run.
        output: The output as the user gave it.
    """
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
