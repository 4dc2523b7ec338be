"""Whether the model is kept busy: fetching and computing at the same time.

The server is the stand-in of the tests, in a process of its own on this machine; the
backbone takes a set time for each image and no processor, as one on a GPU does. What is
measured is the rate of the whole against the lower of two rates: that of fetching at
its best (requests in flight / latency), and that of computing alone. Beside it, on the
same server and backbone, the way of the established adapter: fetch everything with 8
threads by sampleRectangle, then embed one image at a time. Run it from the root of the
repository: ``python -m benchmarks.pipeline``.
"""

import argparse
import os
import time
import warnings
from typing import Any

import ee
import google.auth.credentials
import numpy as np
import psutil
import torch
from lightning.pytorch import Callback, Trainer
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.fetch import ROI, SENSOR, WINDOW, places, rectangles
from dynamicvis_geo.commands.trainer import quieten_lightning
from dynamicvis_geo.datamodules import ChipDataModule
from dynamicvis_geo.datasets import ChipDataset, EarthEngineDataset, collate
from dynamicvis_geo.earthengine import EarthEngineClient
from dynamicvis_geo.tasks import FeatureExtraction
from tests.earthengine_server import EarthEngineServer


class Costly(nn.Module):
    """Takes a set time for each image."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, images: Tensor) -> Tensor:
        """Give a small map of each image."""
        time.sleep(self.seconds * len(images))
        return images[:, :, :2, :2]


class Clock(Callback):
    """Notes when batches begin and end, and how many chips they have."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.ended: list[float] = []
        self.chips: list[int] = []

    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.begun.append(time.perf_counter())

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time, and the chips of the batch."""
        outputs = args[2]
        self.ended.append(time.perf_counter())
        self.chips.append(len(outputs['embedding']))

    @property
    def steady(self) -> float:
        """Chips a second from the first finished batch to the last."""
        return sum(self.chips[1:]) / (self.ended[-1] - self.ended[0])

    @property
    def busy(self) -> float:
        """Share of that time in which the model had a batch."""
        spans = [end - begin for begin, end in zip(self.begun, self.ended, strict=True)]
        return sum(spans[1:]) / (self.ended[-1] - self.ended[0])


class Processors:
    """Adds up the processor time of this process, its workers, and the server."""

    def __init__(self, server: EarthEngineServer) -> None:
        self.server = psutil.Process(server.process.pid)
        self.before = self._now()

    def _now(self) -> NDArray[np.float64]:
        # Workers count when they have ended; the server, a child too, when it has.
        times = (os.times(), self.server.cpu_times())
        ours, servers = (t.user + t.system for t in times)
        return np.array(
            [ours, times[0].children_user + times[0].children_system, servers]
        )

    def since(self) -> NDArray[np.float64]:
        """Seconds since it was made: this process, workers, server."""
        return self._now() - self.before


def compute_rate(task: FeatureExtraction, size: int, batch: int) -> float:
    """Chips a second of the task alone, with Preprocess and all, undisturbed."""
    images = torch.randint(0, 3000, (batch, 3, size, size)).float()
    seconds = []
    for i in range(8):
        started = time.perf_counter()
        task.predict_step({'image': images}, i)
        seconds.append(time.perf_counter() - started)
    return batch / min(seconds)


def pipeline(
    chips: ChipDataset, task: FeatureExtraction, workers: int, batch: int, ahead: bool
) -> tuple[float, float, float]:
    """Run Trainer.predict.

    Args:
        chips: What to predict.
        task: With what.
        workers: Of the DataLoader.
        batch: Chips a batch.
        ahead: Whether batches are begun ahead, as a data module has it.

    Returns:
        Chips a second in the steady state, and of the whole run; the share of the
        steady state in which the model had a batch.
    """
    clock = Clock()
    trainer = Trainer(
        accelerator='cpu',
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data: ChipDataModule | DataLoader[Any]
    if ahead:
        data = ChipDataModule(batch_size=batch, num_workers=workers)
        data.chips = chips
    else:
        data = DataLoader(chips, batch, num_workers=workers, collate_fn=collate)
    started = time.perf_counter()
    trainer.predict(task, data, return_predictions=False)
    seconds = time.perf_counter() - started
    assert sum(clock.chips) == len(chips)
    return clock.steady, len(chips) / seconds, clock.busy


def adapter(dataset: Any, wanted: list[Any], task: FeatureExtraction) -> float:
    """Chips a second of fetching everything, and then one image at a time."""
    started = time.perf_counter()
    images = list(rectangles(dataset, wanted))
    for image in images:
        task.predict_step({'image': torch.from_numpy(image)[None]}, 0)
    return len(wanted) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--seconds', type=float, default=60, help='that the chips take at the bound'
    )
    parser.add_argument('--size', type=int, default=256)
    parser.add_argument('--latency', type=float, default=0.3)
    parser.add_argument(
        '--spread', type=float, default=0.5, help='of the latency, relative to it'
    )
    parser.add_argument('--concurrency', type=int, default=16)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument(
        '--costs', type=float, nargs='+', default=(5, 19, 40), help='ms an image'
    )
    parser.add_argument('--repeat', type=int, default=1)
    options = parser.parse_args()
    quieten_lightning()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    with EarthEngineServer('--fast', '--side', str(options.size)) as server:
        run(server, options)


def run(server: EarthEngineServer, options: argparse.Namespace) -> None:
    low, high = (options.latency * (1 + f * options.spread) for f in (-1, 1))
    fetch_rate = options.concurrency / options.latency
    ee.deprecation.deprecated_assets = {
        '': ee.deprecation.DeprecatedAsset('', None, None, None)
    }
    anonymous: Any = google.auth.credentials.AnonymousCredentials
    ee.Initialize(anonymous(), project='benchmark', url=server.url)
    client = EarthEngineClient(max_concurrency=options.concurrency)
    dataset = EarthEngineDataset(ROI, WINDOW, SENSOR, client=client, block_size=1)
    print(
        f'chips of {options.size} px, latency {low:.2f} to {high:.2f} s, '
        f'{options.concurrency} requests at a time: {fetch_rate:.1f} chips/s at best; '
        f'{options.workers} workers, batches of {options.batch}\n'
    )
    print(
        '| ms an image | alone | bound | how | chips | chips/s | of the bound | '
        'whole run | model busy | processor, ms a chip: model, workers, server |'
    )
    print('|---|---|---|---|---|---|---|---|---|---|')
    for cost in [*options.costs] * options.repeat:
        task = FeatureExtraction(Costly(cost / 1000))
        alone = compute_rate(task, options.size, options.batch)
        bound = min(alone, fetch_rate)
        for name in ('read ahead', 'as it comes', 'adapter'):
            # The adapter has nothing to get going, and takes three times as long.
            seconds = options.seconds / (4 if name == 'adapter' else 1)
            batches = max(2, round(bound * seconds / options.batch))
            wanted = places(
                dataset,
                batches * options.batch,
                options.size,
                options.size + 40,
                columns=48,
            )
            server.set(latency=[low, high])
            processors = Processors(server)
            if name == 'adapter':
                steady = whole = adapter(dataset, wanted, task)
                busy = whole / alone
            else:
                steady, whole, busy = pipeline(
                    ChipDataset([(dataset, wanted)]),
                    task,
                    options.workers,
                    options.batch,
                    name == 'read ahead',
                )
            spent = processors.since() / len(wanted) * 1000
            print(
                f'| {cost:g} | {alone:.1f} | {bound:.1f} | {name} | {len(wanted)} | '
                f'{steady:.1f} | {steady / bound:.2f} | {whole / bound:.2f} | '
                f'{busy:.2f} | {", ".join(f"{ms:.1f}" for ms in spent)} |',
                flush=True,
            )


if __name__ == '__main__':
    main()
