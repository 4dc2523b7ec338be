"""Whether time and memory stay flat as chips and processes grow.

Run it from the root of the repository: ``python -m benchmarks.scale plan``,
and ``blocks``, ``merge`` or ``predict`` in place of ``plan``.
"""

import argparse
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
    module.take([run.block(number) for number in range(len(run))])
    wanted = module.predict_dataloader().dataset.chips
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
    from dynamicvis_geo.datasets.chip_table import CHIP
    from dynamicvis_geo.store import Store

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

    def measure(name: str, do: Callable[[], of.BlockPlan]) -> of.BlockPlan:
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
            run = of.offer(Store(folder), of.describe(plan, {}, {}))
            for number in range(0, len(plan), 2):
                Path(folder, of.block_name(run, number, '.parquet')).touch()
            started = time.perf_counter()
            done = of.finished(Store(folder), run, '.parquet')
            left = of.share(done, Shard())
            took = time.perf_counter() - started
            assert len(left) == len(plan) // 2
        print(f'| {len(plan)} | {took:.3f} |', flush=True)


def merge(options: argparse.Namespace) -> None:
    """Join blocks of random embeddings; compare with a plain copy of their bytes."""
    print('| chips of a block | blocks | GB | copy, MB/s | merge | CPU s | GB | MB |')
    print('|---|---|---|---|---|---|---|---|')
    for block_chips in options.block_chips:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, 'out.parquet')
            apart(write_blocks, path, options.chips, block_chips)
            blocks = sorted(Path(f'{path}.partial').glob('block-*'))
            size = sum(block.stat().st_size for block in blocks)
            copied = [copy(blocks, Path(folder, 'copy'))]
            seconds, used, memory = apart(join_blocks, path)
            copied.append(copy(blocks, Path(folder, 'copy')))
            disk = 2 * size / 1e6 / sum(copied)
            speed = size / 1e6 / seconds
            output = path.stat().st_size / 1e9
            print(
                f'| {block_chips} | {len(blocks)} | {size / 1e9:.2f} | {disk:.0f} | '
                f'{speed:.0f} ({speed / disk:.2f}) | {used:.1f} | {output:.2f} | '
                f'{memory:.0f} |',
                flush=True,
            )


def apart(do: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        return pool.submit(do, *arguments).result()


def write_blocks(path: Path, chips: int, block_chips: int) -> None:
    """Have all blocks of an output of random embeddings, D = 768."""
    import numpy as np

    from benchmarks.scale_job import strip
    from dynamicvis_geo import ChipDataset
    from dynamicvis_geo.callbacks.blocks import block_name, describe, make_plan, offer
    from dynamicvis_geo.formats.base import Predictions
    from dynamicvis_geo.formats.block_files import SUFFIX, encode_block
    from dynamicvis_geo.store import Store

    there = ChipDataset([strip(chips)])
    plan = make_plan(there.table, there.source_crs, block_chips, strides=there.strides)
    store = Store(f'{path}.partial')
    run = offer(store, describe(plan, {'dtype': 'float32', 'format': 'geoparquet'}, {}))
    random = np.random.default_rng(0)
    for number in range(len(plan)):
        rows = plan.block(number)
        features = random.standard_normal((len(rows), 768), np.float32)
        predictions = [Predictions(rows, features, np.ones(len(rows), np.float32))]
        content = encode_block(there, rows, predictions, datetime.now(UTC))
        # Not Store.put, which waits for the disk each time.
        Path(store.url, block_name(run, number, SUFFIX)).write_bytes(content)
    os.sync()


def copy(files: Sequence[Path], to: Path) -> float:
    """Read files and write one, on disk at the end; return the seconds."""
    started = time.perf_counter()
    with to.open('wb') as target:
        for file in files:
            target.write(file.read_bytes())
        target.flush()
        os.fsync(target.fileno())
    return time.perf_counter() - started


def join_blocks(path: Path) -> tuple[float, float, float]:
    """Return seconds, those of the CPU, and MB at most, above those of the imports."""
    import dynamicvis_geo.callbacks.writer  # noqa: F401
    from dynamicvis_geo.callbacks.blocks import read_description
    from dynamicvis_geo.callbacks.output import join_blocks
    from dynamicvis_geo.formats.geoparquet import GeoParquet
    from dynamicvis_geo.store import Location

    before = psutil.Process().memory_info().rss / 1e6
    target = Location.of(str(path))
    run = read_description(target.blocks)
    assert run is not None
    started, used = time.perf_counter(), time.process_time()
    join_blocks(GeoParquet(str(path), 'float32'), target, run)
    seconds, used = time.perf_counter() - started, time.process_time() - used
    return seconds, used, peak() - before


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
    'merge': merge,
    'predict': predict,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest='what', required=True)
    command = commands.add_parser('plan', help=plan.__doc__)
    command.add_argument('--size', type=int, default=128)
    command = commands.add_parser('blocks', help=blocks.__doc__)
    command.add_argument('--chips', type=int, default=1_000_000)
    command = commands.add_parser('merge', help=merge.__doc__)
    command.add_argument('--chips', type=int, default=1_000_000)
    command.add_argument('--block-chips', type=int, nargs='+', default=[4096])
    command = commands.add_parser('predict', help=predict.__doc__)
    command.add_argument('--chips', type=int, default=20_000)
    command.add_argument('--processes', type=int, nargs='+', default=[1, 2, 4])
    options = parser.parse_args()
    MEASUREMENTS[options.what](options)


if __name__ == '__main__':
    main()
