"""``dynamicvis-geo fetch``: chips from Earth Engine into a cache.

Fill a cache ahead of embed, which with the same options then needs no network.
Interrupted and started again, it continues where it stopped.
"""

from argparse import ArgumentParser, Namespace

from dynamicvis_geo.commands.chips import (
    add_chips,
    add_earthengine,
    add_plan,
    earthengine,
    goes_ahead,
    set_by,
)
from dynamicvis_geo.commands.options import (
    add_examples,
    log,
)
from dynamicvis_geo.errors import SpecError


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.usage = '%(prog)s [options] --cache FOLDER'
    add_examples(
        parser,
        'dynamicvis-geo fetch --points plots.csv --year 2022 --buffer 640 '
        '--cache chips',
    )
    add_chips(parser.add_argument_group('chips'))
    add_earthengine(parser.add_argument_group('Earth Engine'))
    add_plan(parser)


def run(arguments: Namespace) -> None:
    """Fetch what is not there yet, and print what was done.

    Args:
        arguments: The options.

    Raises:
        SpecError: If no cache is named.
    """
    cache = set_by(arguments, 'data').get('cache')
    if cache is None:
        raise SpecError('fetch needs --cache FOLDER: where the chips are kept')
    log(quiet=False)
    given = earthengine(arguments)
    # What takes seconds to import comes after what can be told without.
    from dynamicvis_geo.datamodules import EarthEngineDataModule
    from dynamicvis_geo.datasets import EarthEngineDataset

    data = EarthEngineDataModule(**given)
    if not goes_ahead(data, data.plan_fetch(), arguments):
        return
    reports = [
        dataset.prefetch(sampler)
        for dataset, sampler in data.pairs
        if isinstance(dataset, EarthEngineDataset)
    ]
    chips, fetched, empty, requests, retries, received = (
        sum(getattr(report, name) for report in reports)
        for name in (
            *('chips', 'fetched', 'without_imagery', 'requests', 'retries', 'bytes'),
        )
    )
    seconds = sum(report.seconds for report in reports)
    print(
        f'{cache} holds all {chips} chips: fetched {fetched} '
        f'({empty} without imagery) in {requests} requests ({retries} of them again), '
        f'{received / 1e6:.1f} MB, {seconds:.1f} s.'
    )
