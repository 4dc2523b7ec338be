"""Whether a prediction run of several processes does each chip once."""

from collections.abc import Sized
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from dynamicvis_geo.errors import SpecError

_WAY_OUT = (
    'Give the chips as a ChipDataset in a data module of dynamicvis_geo '
    '(ChipDataModule, EarthEngineDataModule), or in a DataLoader with '
    'sampler=ContiguousSampler(chips.remaining)'
)


def refuse_unsharded(trainer: Trainer) -> None:
    """Refuse predict dataloaders that several processes cannot share.

    Lightning divides what an ordinary sampler yields among the processes. What it
    cannot divide, it passes on with a warning at most.

    Args:
        trainer: The trainer, once it has made its dataloaders; with one process
            anything goes.

    Raises:
        SpecError: If chips would be done by every process, twice, or not at all.
    """
    if trainer.world_size < 2:
        return
    loaders = trainer.predict_dataloaders
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        problem = _problem(loader, trainer.world_size)
        if problem is not None:
            raise SpecError(
                f'predict runs in {trainer.world_size} processes, but {problem}. '
                f'{_WAY_OUT}.'
            )


def _problem(loader: Any, processes: int) -> str | None:
    """Say what would happen to the chips of a dataloader; None if all is well."""
    if not isinstance(loader, DataLoader):
        return (
            f'{type(loader).__name__} is no DataLoader: every process would do all of '
            'its batches'
        )
    if isinstance(loader.dataset, IterableDataset):
        return (
            f'{type(loader.dataset).__name__} is an iterable dataset, which cannot be '
            'divided: every process would do all of it'
        )
    sampler = _sampler(loader)
    if not isinstance(sampler, DistributedSampler):
        return (
            f'{type(sampler).__name__} is not divided among them: every process would '
            'do all of its chips'
        )
    # Lightning wraps what it divides, twice.
    divided = getattr(getattr(sampler, 'dataset', None), '_sampler', None)
    if _is_random(divided):
        return (
            f'{type(divided).__name__} draws its chips at random without a common seed '
            '(shuffle=True does): the processes would draw different ones, some twice '
            'and some not at all'
        )
    chips = getattr(sampler, 'dataset', None)
    if isinstance(chips, Sized) and sampler.total_size != len(chips):
        return (
            f'{type(sampler).__name__} makes {sampler.total_size} of {len(chips)} '
            f'chips, which do not divide by {processes}: some would be done twice or '
            'not at all'
        )
    return None


def _sampler(loader: DataLoader[Any]) -> Any:
    """Find what decides which chips a process gets."""
    batches: Any = loader.batch_sampler
    # Lightning wraps it to keep track of the indices.
    batches = getattr(batches, '_batch_sampler', batches)
    if batches is None:
        return loader.sampler
    return getattr(batches, 'sampler', batches)


def _is_random(sampler: Any) -> bool:
    """Whether a sampler draws from the state that each process has for itself."""
    unseeded = hasattr(sampler, 'generator') and sampler.generator is None
    return unseeded and getattr(sampler, 'shuffle', True)
