"""``dynamicvis-geo fetch``: chips from Earth Engine into a cache."""

from argparse import Namespace

from dynamicvis_geo.commands.imagery import earthengine
from dynamicvis_geo.commands.planning import goes_ahead
from dynamicvis_geo.commands.prediction import log
from dynamicvis_geo.datasets.earthengine import EarthEngineDataset
from dynamicvis_geo.errors import SpecError


def run(arguments: Namespace) -> None:
    """Fetch what is not there yet, and print what was done."""
    if arguments.cache is None:
        raise SpecError('fetch needs --cache FOLDER: where the chips are kept')
    log(quiet=False)
    data = earthengine(arguments)
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
        f'{arguments.cache} holds all {chips} chips: fetched {fetched} '
        f'({empty} without imagery) in {requests} requests ({retries} of them again), '
        f'{received / 1e6:.1f} MB, {seconds:.1f} s.'
    )
