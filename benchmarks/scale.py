"""Whether time and memory stay flat as chips and processes grow.

Run it from the root of the repository: ``python -m benchmarks.scale plan``.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable

import psutil

#: A part of Europe across four UTM zones: a million chips of 128 pixels of 10 m.
ROI = '-6,42,12.4,52'
TIME = ('2022-06-01', '2022-09-01')


def peak() -> float:
    """Return the largest resident memory of this process so far, in MB."""
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def plan(options: argparse.Namespace) -> None:
    """Lay out the chips of a large area, as each process of a run does for itself."""
    from dynamicvis_geo import EarthEngineDataModule

    module = EarthEngineDataModule(roi=ROI, time=TIME, size=options.size)
    # Importing takes more than planning, and is the same for one chip.
    EarthEngineDataModule(roi='5.99,50,6.01,50.01', time=TIME, size=64).setup('predict')
    before = psutil.Process().memory_info().rss / 1e6
    rows: list[tuple[str, float, float]] = []
    started = time.perf_counter()

    def note(step: str) -> None:
        rows.append((step, time.perf_counter() - started, peak() - before))

    pairs = module.pairs
    note('grids of the zones, each place once')
    del pairs
    module.setup('predict')
    note('table of the chips, in order')
    chips = module.chips
    wanted = 0
    for batch in module.predict_dataloader().batch_sampler or ():
        wanted += len(batch)
    note('what this process does')
    assert wanted == len(chips)
    zones = len(chips.datasets)
    print(f'{len(chips)} chips of {options.size} px in {zones} UTM zones\n')
    print('| step | s | peak MB more than after the imports |\n|---|---|---|')
    for step, seconds, memory in rows:
        print(f'| {step} | {seconds:.1f} | {memory:.0f} |')


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], None]] = {'plan': plan}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest='what', required=True)
    command = commands.add_parser('plan', help=plan.__doc__)
    command.add_argument('--size', type=int, default=128)
    options = parser.parse_args()
    MEASUREMENTS[options.what](options)


if __name__ == '__main__':
    main()
