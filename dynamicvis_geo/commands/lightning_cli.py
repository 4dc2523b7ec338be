"""LightningCLI for prediction runs that a YAML file describes."""

import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import dynamicvis_geo
from dynamicvis_geo.callbacks import ChipProgress, EmbeddingWriter
from dynamicvis_geo.commands.chips import is_first, say_plan
from dynamicvis_geo.commands.options import log
from dynamicvis_geo.commands.trainer import quieten_lightning, run_trainer
from dynamicvis_geo.datamodules import ChipDataModule, EarthEngineDataModule
from dynamicvis_geo.datamodules.chips import FEATURES
from dynamicvis_geo.errors import DynamicVisGeoError, SpecError, causes_of, one_line
from dynamicvis_geo.tasks import FeatureExtraction

#: How lines begin in which jsonargparse tells what it tried, not what is wrong.
_TRIED = (
    'Does not validate against any',
    'Subtypes:',
    'Errors:',
    'Given value',
    "Expected a <class 'NoneType'>",
)


class PredictCLI(LightningCLI):
    """Lightning's command line for the task, any data module, and the writer."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the writer, and what the data are if nothing else is said."""
        parser.add_lightning_class_args(EmbeddingWriter, 'writer')
        name = f'{dynamicvis_geo.__name__}.{EarthEngineDataModule.__name__}'
        parser.set_defaults({'data': {'class_path': name}})

    def instantiate_classes(self) -> None:
        """Refuse a place that cannot be written before weights are fetched."""
        EmbeddingWriter(**self.config.writer.as_dict()).check()
        # The writer that is made here may say which shard this is.
        log(quiet=self.config.trainer.enable_progress_bar is False)
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Count chips in the progress bar, unless there is to be none or another."""
        options = self.config_init.trainer
        bars = [isinstance(one, ProgressBar) for one in options.callbacks or ()]
        if options.enable_progress_bar is not False and not any(bars):
            self.trainer_defaults['callbacks'] = [ChipProgress()]
        return super().instantiate_trainer(**kwargs)


def run_configured(arguments: Sequence[str], configs: Sequence[str]) -> int:
    """Run what arguments and files of configuration describe.

    Args:
        arguments: Those of the command.
        configs: The files among them, for errors.

    Returns:
        The exit code.

    Raises:
        SpecError: if they describe nothing that can be run.
    """
    quieten_lightning()
    cli = _assemble(arguments, configs)
    writer = cli.config_init.writer
    if is_first() and isinstance(cli.datamodule, ChipDataModule):
        features = cli.model.feature_shape or FEATURES
        say_plan(cli.datamodule.plan(writer, features), writer.shard)
    return run_trainer(cli.trainer, cli.model, cli.datamodule, writer)


def _assemble(arguments: Sequence[str], configs: Sequence[str]) -> PredictCLI:
    # Lightning warns where it is given arguments beside those of the process.
    warnings.filterwarnings('ignore', "LightningCLI's args parameter")
    try:
        return PredictCLI(
            FeatureExtraction,
            LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=False,
            auto_configure_optimizers=False,
            run=False,
            trainer_defaults={
                'logger': False,
                'enable_checkpointing': False,
                'enable_model_summary': False,
            },
            parser_kwargs={
                'prog': 'dynamicvis-geo predict',
                'description': 'Embed the chips of a data module, and write the '
                'embeddings: a run described by a YAML file (--config), by arguments, '
                'or both.',
                'exit_on_error': False,
            },
            args=list(arguments),
        )
    except DynamicVisGeoError:
        raise
    except (ArgumentError, ValueError, MisconfigurationException) as error:
        ours = [one for one in causes_of(error) if isinstance(one, DynamicVisGeoError)]
        if ours:
            raise SpecError(str(ours[0])) from error
        where = f'correct --config {" and ".join(configs)}, or ' if configs else ''
        raise SpecError(
            f'{_complaint(error)}; {where}see dynamicvis-geo predict --help'
        ) from error


def _complaint(error: Exception) -> str:
    """Return the message of jsonargparse, without all that it tried."""
    lines = (line.strip().removeprefix('- ') for line in str(error).splitlines())
    told = [line for line in lines if line and not line.startswith(_TRIED)]
    return ' '.join(told) or one_line(error)
