"""Whether runs that are killed again and again end with the table of one that is not.

Runs over some hundred chips, with faults on the image server, are killed (SIGKILL) at
random moments, from the start to the merge: a parent, one of its ranks, or a worker of
a DataLoader. They are started again until the output is there; then another run begins,
until there were as many kills as asked for. Runs are by turns of two processes (ddp)
and of three shards, which are started in any order, some twice, two at once. Each table
must equal that of an undisturbed run, row by row and byte by byte up to the footer,
which holds the provenance, and nothing else may be left. Linux only.
From the root of the repository: ``python -m benchmarks.interruptions``.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import geopandas as gpd
import psutil
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


def job(url: str, path: Path, chips: int, processes: int, shard: str) -> None:
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
        callbacks=[EmbeddingWriter(path, block_chips=4, shard=shard)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **distributed,
    )
    task = FeatureExtraction(Means())
    trainer.predict(task, datamodule=data, return_predictions=False)


def start(
    url: str, path: Path, chips: int, processes: int = 1, shard: str = '1/1'
) -> psutil.Popen:
    command = [sys.executable, '-m', 'benchmarks.interruptions', '--job', str(path)]
    command += ['--url', url, '--chips', str(chips)]
    command += ['--processes', str(processes), '--shard', shard]
    log = path.with_suffix('.log').open('ab')
    return psutil.Popen(command, stdout=log, stderr=log)


def blocks(path: Path) -> set[str]:
    return {block.name for block in Path(f'{path}.partial').glob('block-*')}


def merging(path: Path) -> bool:
    return any(Path(f'{path}.partial').glob(f'.{path.name}.*'))


def role(job: psutil.Popen, process: psutil.Process) -> str:
    """Name a process that a job has started; others than ranks are forked."""
    if 'multiprocessing' in ' '.join(process.cmdline()):
        return 'helper'
    launched = process.ppid() == job.pid and 'LOCAL_RANK' in process.environ()
    return 'rank' if launched else 'worker'


class Run:
    """One output, and all that was started to make it."""

    def __init__(
        self, url: str, path: Path, chips: int, chance: random.Random, sharded: bool
    ) -> None:
        self.url, self.path, self.chips, self.chance = url, path, chips, chance
        self.shards = [f'{i}/3' for i in (1, 2, 3)] if sharded else ['1/1']
        self.processes = 1 if sharded else 2
        self.started: list[psutil.Process] = []
        self.kills = 0

    def start(self, shard: str) -> psutil.Popen:
        """Start a shard."""
        return start(self.url, self.path, self.chips, self.processes, shard)

    def disturb(self, most: int) -> None:
        """Kill what is started, so often at most, or until the output is there."""
        while self.kills < most and not self.path.exists():
            # Two shards at once, which may be the same one.
            shards = self.chance.choices(self.shards, k=len(self.shards[:2]))
            jobs = [self.start(shard) for shard in shards]
            for one in jobs:
                self.strike(one)
            for one in jobs:
                self.wait(one)

    def strike(self, job: psutil.Popen) -> None:
        """Kill a process of a job at a random moment."""
        known = blocks(self.path)
        moment = self.chance.choice(('start', 'block', 'blocks', 'merge'))
        most = {'block': 1, 'blocks': self.chance.randint(2, 10)}.get(moment)
        while job.poll() is None:
            if moment == 'start' or (moment == 'merge' and merging(self.path)):
                break
            if most is not None and len(blocks(self.path) - known) >= most:
                break
            time.sleep(0.002)
        time.sleep(self.chance.random() * {'start': 12, 'merge': 0.05}.get(moment, 0.5))
        try:
            family = [job, *job.children(recursive=True)]
            self.started += family
            names = ['parent', *(role(job, one) for one in family[1:])]
            # A rank or worker as often as the parent, though there are more.
            name = self.chance.choice(sorted(set(names)))
            victim = self.chance.choice(
                [one for one, it in zip(family, names, strict=True) if it == name]
            )
            victim.kill()
        except psutil.NoSuchProcess:
            return
        self.kills += 1
        print(
            f'{self.path.stem}, kill {self.kills}: {name}, at {moment}; '
            f'{len(blocks(self.path))} blocks{", merging" * merging(self.path)}',
            flush=True,
        )

    def wait(self, job: psutil.Popen) -> int:
        """Return how a job ends."""
        try:
            return int(job.wait(300))
        except psutil.TimeoutExpired:
            print(f'{self.path.stem}: HUNG', flush=True)
            job.kill()
            return -1

    def end(self) -> list[int]:
        """Start all that there is to start once more, and wait for everything."""
        jobs = [self.start(shard) for shard in self.shards]
        codes = [self.wait(one) for one in jobs]
        _, alive = psutil.wait_procs(self.started, timeout=120)
        for one in alive:
            # A rank waits half an hour for a parent that it has not met.
            print(f'{self.path.stem}: {one.pid} is still there', flush=True)
            one.kill()
        return codes


def content(path: Path) -> bytes:
    """Return a Parquet file without its footer."""
    whole = path.read_bytes()
    return whole[: -8 - int.from_bytes(whole[-8:-4], 'little')]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--kills-a-run', type=int, default=15)
    parser.add_argument('--chips', type=int, default=300)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--job', type=Path, help=argparse.SUPPRESS)
    parser.add_argument('--url', help=argparse.SUPPRESS)
    parser.add_argument('--processes', type=int, help=argparse.SUPPRESS)
    parser.add_argument('--shard', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        job(options.url, options.job, options.chips, options.processes, options.shard)
        return
    with tempfile.TemporaryDirectory() as folder, EarthEngineServer() as server:
        undisturbed = Path(folder, 'undisturbed.parquet')
        assert start(server.url, undisturbed, options.chips).wait() == 0
        expected = gpd.read_parquet(undisturbed)
        server.set(kinds=FAULTS, rate=0.1)
        chance, kills, number = random.Random(options.seed), 0, 0
        while kills < options.kills:
            number += 1
            path = Path(folder, f'run-{number}.parquet')
            sharded = number % 2 == 0
            run = Run(server.url, path, options.chips, chance, sharded)
            run.disturb(min(options.kills_a_run, options.kills - kills))
            codes = run.end()
            kills += run.kills
            if any(codes):
                print(path.with_suffix('.log').read_text()[-5000:])
            table = gpd.read_parquet(path)
            left = sorted(e.name for e in Path(folder).glob(f'*run-{number}.*'))
            print(
                f'{path.stem} by {"shards" if sharded else "ddp"}: killed {run.kills} '
                f'times, ended with {codes}; {len(table)} of {len(expected)} rows; '
                f'equal row by row: {table.equals(expected)}, '
                f'byte by byte: {content(path) == content(undisturbed)}; '
                f'files: {", ".join(left)}',
                flush=True,
            )
        print(f'{kills} kills in {number} runs')


if __name__ == '__main__':
    main()
