"""Whether a run that is killed again and again ends with the table of one that is not.

A run of two processes over some hundred chips, with faults on the image server, is
killed (SIGKILL) at random moments, the parent or one of its processes, and started
again, until it ends; then another such run begins, until there were as many kills as
asked for. Each table must equal that of an undisturbed run, row by row. Linux only.
From the root of the repository: ``python -m benchmarks.interruptions``.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import geopandas as gpd
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from dynamicvis_geo import (
    EarthEngineClient,
    EarthEngineDataModule,
    EmbeddingWriter,
    FeatureExtraction,
    SensorSpec,
)
from tests.earthengine_server import EarthEngineServer

FAULTS = ('reset', 'close', 'truncated', 'short', 500, 503, 429)


class Means(nn.Module):
    """A backbone that costs nothing and tells images apart."""

    img_size = (64, 64)

    def forward(self, images: Tensor) -> Tensor:
        """Average 8 x 8 parts of an image."""
        return nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)[..., None, None]


def job(url: str, path: Path, chips: int, processes: int) -> None:
    """Run to the end."""
    torch.set_num_threads(1)
    side = round(chips**0.5)
    west, north = 600_000, 5_600_000
    corner = f'{west} {north}, {west + side * 640 - 1} {north}'
    corner += f', {west + side * 640 - 1} {north - side * 640 + 1}'
    corner += f', {west} {north - side * 640 + 1}, {west} {north}'
    data = EarthEngineDataModule(
        roi=gpd.GeoSeries.from_wkt([f'POLYGON (({corner}))'], crs='EPSG:32632'),
        time=('2022-06-01', '2022-07-21'),
        size=64,
        sensor=SensorSpec(cloudy_pct=None),
        client=EarthEngineClient(project='x', url=url, max_concurrency=8),
        on_missing='fill',
        batch_size=2,
        num_workers=1,
    )
    distributed: dict[str, Any] = {'strategy': 'ddp'} if processes > 1 else {}
    trainer = Trainer(
        accelerator='cpu',
        devices=processes,
        callbacks=[EmbeddingWriter(path, flush_chips=4)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **distributed,
    )
    task = FeatureExtraction(Means())
    trainer.predict(task, datamodule=data, return_predictions=False)


def start(url: str, path: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    command = [sys.executable, '-m', 'benchmarks.interruptions', '--job', str(path)]
    command += ['--url', url, '--chips', str(options.chips)]
    command += ['--processes', str(options.processes)]
    log = path.with_suffix('.log').open('ab')
    return subprocess.Popen(command, stdout=log, stderr=log)


def family(process: int) -> list[int]:
    """A process and those that it started which are of the run, not their workers."""
    file = Path(f'/proc/{process}/task/{process}/children')
    children = [int(child) for child in file.read_text().split()]
    return [process, *children]


def disturb(
    path: Path,
    url: str,
    options: argparse.Namespace,
    chance: random.Random,
    most: int,
) -> int:
    """Kill runs until there were enough, or one has ended; return how many."""
    for kills in range(most):
        process = start(url, path, options)
        folder = Path(f'{path}.partial')
        known = set(folder.glob('part-*.parquet'))
        # From before the first chip, to some chips on, to the last moments.
        parts = chance.choice((0, 0, 1, 1, 2, 3))
        while (
            process.poll() is None
            and len(set(folder.glob('part-*.parquet')) - known) < parts
        ):
            time.sleep(0.01)
        time.sleep(chance.random() * (12.0 if parts == 0 else 0.5))
        if process.poll() is not None:
            return kills
        victim = chance.choice(family(process.pid))
        os.kill(victim, signal.SIGKILL)
        process.wait()
        finished = len(list(folder.glob('part-*.parquet')))
        who = 'parent' if victim == process.pid else 'child'
        print(f'{path.stem}, kill {kills + 1}: {who}; {finished} parts', flush=True)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--chips', type=int, default=300)
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--job', type=Path, help=argparse.SUPPRESS)
    parser.add_argument('--url', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        job(options.url, options.job, options.chips, options.processes)
        return
    with tempfile.TemporaryDirectory() as folder, EarthEngineServer() as server:
        undisturbed = Path(folder, 'undisturbed.parquet')
        assert start(server.url, undisturbed, options).wait() == 0
        expected = gpd.read_parquet(undisturbed)
        server.set(kinds=FAULTS, rate=0.1)
        chance, kills, run = random.Random(options.seed), 0, 0
        while kills < options.kills:
            run += 1
            path = Path(folder, f'run-{run}.parquet')
            more = disturb(path, server.url, options, chance, options.kills - kills)
            kills += more
            code = start(server.url, path, options).wait()
            if code != 0:
                print(path.with_suffix('.log').read_text()[-5000:])
            table = gpd.read_parquet(path)
            left = sorted(e.name for e in Path(folder).glob(f'*run-{run}.*'))
            print(
                f'{path.stem}: killed {more} times, ended with {code}; {len(table)} of '
                f'{len(expected)} rows; equal row by row: {table.equals(expected)}; '
                f'files: {", ".join(left)}',
                flush=True,
            )
        print(f'{kills} kills in {run} runs')


if __name__ == '__main__':
    main()
