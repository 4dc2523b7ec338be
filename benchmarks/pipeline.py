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
import time
import warnings
from typing import Any

import ee
import google.auth.credentials
import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.fetch import ROI, SENSOR, WINDOW, places, rectangles
from dynamicvis_geo.commands.prediction import quieten_lightning
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


def compute_rate(task: FeatureExtraction, size: int, batch: int) -> float:
    """Chips a second of the task alone, with Preprocess and all."""
    images = torch.randint(0, 3000, (batch, 3, size, size)).float()
    task.predict_step({'image': images}, 0)
    started = time.perf_counter()
    for i in range(8):
        task.predict_step({'image': images}, i)
    return 8 * batch / (time.perf_counter() - started)


def pipeline(
    chips: ChipDataset, task: FeatureExtraction, workers: int, batch: int
) -> tuple[float, float, float]:
    """Run Trainer.predict.

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
    loader = DataLoader(chips, batch, num_workers=workers, collate_fn=collate)
    started = time.perf_counter()
    trainer.predict(task, loader, return_predictions=False)
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
    parser.add_argument('--chips', type=int, default=480)
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
    wanted = places(dataset, options.chips, options.size, options.size + 40)
    print(
        f'{options.chips} chips of {options.size} px, latency {low:.2f} to {high:.2f} '
        f's, {options.concurrency} requests at a time: {fetch_rate:.1f} chips/s at '
        f'best; {options.workers} workers, batches of {options.batch}\n'
    )
    print(
        '| ms an image | alone | bound | how | chips/s | of the bound | whole run | '
        'model busy |'
    )
    print('|---|---|---|---|---|---|---|---|')
    for cost in [*options.costs] * options.repeat:
        task = FeatureExtraction(Costly(cost / 1000))
        alone = compute_rate(task, options.size, options.batch)
        bound = min(alone, fetch_rate)
        for name in ('read ahead', 'as it comes', 'adapter'):
            server.set(latency=[low, high])
            if name == 'adapter':
                steady = whole = adapter(dataset, wanted, task)
                busy = whole / alone
            else:
                chips = ChipDataset([(dataset, wanted)])
                if name == 'read ahead':
                    chips.expect(np.arange(len(chips)))
                steady, whole, busy = pipeline(
                    chips, task, options.workers, options.batch
                )
            print(
                f'| {cost:g} | {alone:.1f} | {bound:.1f} | {name} | {steady:.1f} | '
                f'{steady / bound:.2f} | {whole / bound:.2f} | {busy:.2f} |',
                flush=True,
            )


if __name__ == '__main__':
    main()
