"""What a run will do, said before it starts."""

import logging
import warnings
from argparse import Namespace
from dataclasses import replace

from lightning.pytorch.utilities import rank_zero_only

from dynamicvis_geo.callbacks.shards import Shard
from dynamicvis_geo.datamodules import ChipDataModule, EarthEngineDataModule
from dynamicvis_geo.datamodules.plan import LARGEST_SIDE, Plan
from dynamicvis_geo.errors import EarthEngineError, SpecError

_logger = logging.getLogger(__name__)

_ALL = Shard()


def goes_ahead(
    data: ChipDataModule, plan: Plan, options: Namespace, shard: Shard = _ALL
) -> bool:
    """Say what will be done; return whether to do it.

    Args:
        data: The chips.
        plan: What will be done.
        options: ``dry_run`` and ``yes``.
        shard: Which of several runs this is, that do the plan together.

    Raises:
        SpecError: If it is so much that it may be a mistake, unless ``yes``.
    """
    whose = f'all {shard.count} shards together: ' if shard.count > 1 else ''
    excess = ' and '.join(plan.excess)
    if options.dry_run:
        if is_first():
            print(f'{whose}{_with_scenes(data, plan)}')
        if excess and not options.yes:
            warnings.warn(f'{excess}: without --yes it is refused', stacklevel=2)
        return False
    if excess and not options.yes:
        raise SpecError(
            f'{excess}: {plan}. Give --yes if that is meant, else a smaller area, or '
            'another --size, --stride or --scale'
        )
    if is_first():
        _logger.info('%s%s', whose, plan)
    return True


def is_first() -> bool:
    """Whether this process speaks for all of a run."""
    return getattr(rank_zero_only, 'rank', 0) == 0


def _with_scenes(data: ChipDataModule, plan: Plan) -> Plan:
    if not isinstance(data, EarthEngineDataModule) or plan.side > LARGEST_SIDE:
        return plan
    try:
        return replace(plan, scenes=data.count_scenes())
    except EarthEngineError as error:
        warnings.warn(f'scenes a chip could not be counted: {error}', stacklevel=2)
        return plan
