"""Whether time and memory stay flat as chips and processes grow.

Run it from the root of the repository: ``python -m benchmarks.scale plan``,
``python -m benchmarks.scale blocks``, or ``python -m benchmarks.scale predict``.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

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
    from dynamicvis_geo.callbacks.blocks import make_plan

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
    run = make_plan(chips.table, chips.source_crs, 1024, strides=chips.strides)
    note('blocks of the run')
    wanted = 0
    for batch in module.predict_dataloader().batch_sampler or ():
        wanted += len(batch)
    note('what this process does')
    assert wanted == len(chips)
    zones = len(chips.datasets)
    print(f'{len(chips)} chips of {options.size} px in {zones} UTM zones, ')
    print(f'{len(run)} blocks\n')
    print('| step | s | peak MB more than after the imports |\n|---|---|---|')
    for step, seconds, memory in rows:
        print(f'| {step} | {seconds:.1f} | {memory:.0f} |')


def blocks(options: argparse.Namespace) -> None:
    """Cut a square grid and as many points into blocks; tell what is left of them."""
    import numpy as np
    import pyarrow as pa
    from pyproj import CRS

    from dynamicvis_geo.callbacks import blocks as of
    from dynamicvis_geo.callbacks.shards import Shard
    from dynamicvis_geo.callbacks.store import Store
    from dynamicvis_geo.datasets.chip_table import CHIP

    side, crs, before = round(options.chips**0.5), [CRS(32633)], peak()
    count = side * side
    table = np.zeros(count, CHIP)
    table['width'] = table['height'] = 128
    table['xres'] = table['yres'] = 10
    table['x'] = np.tile(np.arange(side) * 1280.0, side)
    table['y'] = np.repeat(np.arange(side) * 1280.0, side)
    scattered = table.copy()
    scattered['x'] += np.random.default_rng(0).integers(0, 1000, count) * 10
    ids = pa.array([f'plot {i}' for i in range(count)])
    print(f'{count} chips in two tables, {peak() - before:.0f} MB with all ids\n')
    print('| plan | s | peak MB, tables included |\n|---|---|---|')

    def measure(name: str, do: Callable[[], of.Plan]) -> of.Plan:
        started = time.perf_counter()
        plan = do()
        took = time.perf_counter() - started
        print(f'| {name} | {took:.2f} | {peak() - before:.0f} |', flush=True)
        return plan

    measure('grid', lambda: of.make_plan(table, crs, 1024, strides=[(128, 128)]))
    measure('points', lambda: of.make_plan(scattered, crs, 1024, point_ids=ids))
    print('\n| blocks, half of them done | s to tell what is left |\n|---|---|')
    for block_chips in (1024, 32, 1):
        plan = of.make_plan(table, crs, block_chips)
        with tempfile.TemporaryDirectory() as folder:
            run = of.begin(Store(folder), of.describe(plan, {}, {}))
            for number in range(0, len(plan), 2):
                Path(folder, of.block_name(run, number, '.parquet')).touch()
            started = time.perf_counter()
            done = of.finished(Store(folder), run, '.parquet')
            left = of.share(done, Shard())
            took = time.perf_counter() - started
            assert len(left) == len(plan) // 2
        print(f'| {len(plan)} | {took:.3f} |', flush=True)


def predict(options: argparse.Namespace) -> None:
    """Embed many chips of a synthetic dataset with a small model, and watch memory."""
    print('| processes | writer | s | chips/s | MB at a tenth | MB at the end | peak |')
    print('|---|---|---|---|---|---|---|')
    seconds: dict[tuple[int, bool], float] = {}
    for processes in options.processes:
        for writer in (False, True) if processes == 1 else (True,):
            with tempfile.TemporaryDirectory() as folder:
                found = watch(Path(folder), options.chips, processes, writer)
            seconds[processes, writer] = found[0]
            rate = options.chips / found[0]
            memory = ' | '.join(f'{value:.0f}' for value in found[1:])
            name = 'yes' if writer else 'no'
            print(
                f'| {processes} | {name} | {found[0]:.1f} | {rate:.0f} | {memory} |',
                flush=True,
            )
    if (1, False) in seconds:
        cost = (seconds[1, True] - seconds[1, False]) / options.chips * 1000
        print(f'\nThe writer costs {cost:.2f} ms a chip, in one process.')


def watch(
    folder: Path, chips: int, processes: int, writer: bool
) -> tuple[float, float, float, float]:
    """Run a job; return its seconds, and the memory of all its processes in MB."""
    command = [sys.executable, '-m', 'benchmarks.scale_job', str(folder), str(chips)]
    job = psutil.Popen([*command, str(processes), str(int(writer))])
    tenth = last = most = started = ended = 0.0
    while job.poll() is None:
        done = sum(
            int(file.read_text() or 0) for file in folder.glob('count-*') if file.stat()
        )
        try:
            family = [job, *job.children(recursive=True)]
            memory = sum(one.memory_info().rss for one in family) / 1e6
        except psutil.NoSuchProcess:
            continue
        if done and not started:
            started = time.perf_counter()
        if done >= chips // 10 and not tenth:
            tenth = memory
        if done >= chips and not ended:
            ended = time.perf_counter()
        if not (folder / 'returned').exists():
            # What Python does when it ends is no part of the run.
            last, most = memory or last, max(most, memory)
        time.sleep(0.05)
    if job.returncode:
        raise subprocess.CalledProcessError(job.returncode, command)
    return (ended or time.perf_counter()) - started, tenth, last, most


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], None]] = {
    'plan': plan,
    'blocks': blocks,
    'predict': predict,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest='what', required=True)
    command = commands.add_parser('plan', help=plan.__doc__)
    command.add_argument('--size', type=int, default=128)
    command = commands.add_parser('blocks', help=blocks.__doc__)
    command.add_argument('--chips', type=int, default=1_000_000)
    command = commands.add_parser('predict', help=predict.__doc__)
    command.add_argument('--chips', type=int, default=20_000)
    command.add_argument('--processes', type=int, nargs='+', default=[1, 2, 4])
    options = parser.parse_args()
    MEASUREMENTS[options.what](options)


if __name__ == '__main__':
    main()
