"""How fast chips come from Earth Engine, against what a user would write without us.

The server is the stand-in of the tests, in a process of its own on this machine, which
answers each request after a fixed latency with pixels that cost it nothing. Run it from
the root of the repository: ``python -m benchmarks.fetch``.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ee
import google.auth.credentials
import numpy as np
from torch.utils.data import DataLoader

from dynamicvis_geo.datasets import EarthEngineDataset, collate
from dynamicvis_geo.earthengine import EarthEngineClient
from dynamicvis_geo.earthengine.composite import build_composite
from dynamicvis_geo.specs import BBox, SensorSpec
from tests.earthengine_server import EarthEngineServer

WINDOW = ('2022-06-01', '2022-07-01')
SENSOR = SensorSpec()
ROI = BBox(8, 49, 11, 51.5)


def places(
    dataset: Any, count: int, size: int, stride: int, columns: int = 16
) -> list[Any]:
    """Chips in rows of so many columns, *stride* pixels apart."""
    x, y, t = dataset.bounds
    left, bottom = round(x.start + 30_000, -1), round(y.start + 30_000, -1)
    found = []
    for i in range(count):
        east = left + i % columns * stride * 10
        north = bottom + i // columns * stride * 10
        found.append(
            (slice(east, east + size * 10, 10), slice(north, north + size * 10, 10), t)
        )
    return found


def plain(dataset: Any, wanted: list[Any]) -> Iterator[Any]:
    """A loop of computePixels."""
    for x, y, _ in wanted:
        grid = {
            'dimensions': {
                'width': round((x.stop - x.start) / 10),
                'height': round((y.stop - y.start) / 10),
            },
            'affineTransform': {
                'scaleX': 10,
                'translateX': x.start,
                'scaleY': -10,
                'translateY': y.stop,
            },
            'crsCode': 'EPSG:32632',
        }
        pixels = ee.data.computePixels(
            {
                'expression': build_composite(SENSOR, WINDOW, [(9, 50, 9.1, 50.1)]),
                'fileFormat': 'NUMPY_NDARRAY',
                'bandIds': list(SENSOR.bands),
                'grid': grid,
            }
        )
        yield np.stack([pixels[band] for band in SENSOR.bands]).astype(np.float32)


def rectangles(dataset: Any, wanted: list[Any]) -> Iterator[Any]:
    """JSON of sampleRectangle in EPSG:3857, with 8 threads."""

    def fetch(_: Any) -> Any:
        image = build_composite(SENSOR, WINDOW, [(9, 50, 9.1, 50.1)])
        region = ee.Geometry.Rectangle([9, 50, 9.1, 50.1], 'EPSG:4326', False)
        sampled = image.reproject('EPSG:3857', None, 10).sampleRectangle(
            region, None, 0
        )
        properties = sampled.getInfo()['properties']
        return np.array([properties[band] for band in SENSOR.bands], np.float32)

    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(fetch, wanted)


def batch(dataset: Any, wanted: list[Any]) -> list[Any]:
    """One batch of all chips."""
    return dataset.__getitems__(wanted)


def loader(workers: int) -> Callable[[Any, list[Any]], Iterator[Any]]:
    """Build a DataLoader with some workers, in batches of 32."""

    def run(dataset: Any, wanted: list[Any]) -> Iterator[Any]:
        batches = DataLoader(
            dataset, 32, sampler=wanted, num_workers=workers, collate_fn=collate
        )
        for samples in batches:
            yield from samples['image']

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--chips', type=int, default=128)
    parser.add_argument('--size', type=int, default=256)
    parser.add_argument('--latency', type=float, default=0.3)
    parser.add_argument('--concurrency', type=int, default=16)
    options = parser.parse_args()
    size, count = options.size, options.chips
    with EarthEngineServer('--fast', '--side', str(size)) as server:
        ee.deprecation.deprecated_assets = {
            '': ee.deprecation.DeprecatedAsset('', None, None, None)
        }
        anonymous: Any = google.auth.credentials.AnonymousCredentials
        ee.Initialize(anonymous(), project='benchmark', url=server.url)
        client = EarthEngineClient(max_concurrency=options.concurrency)

        def dataset(block: int, cache: str | None = None) -> Any:
            return EarthEngineDataset(
                ROI, WINDOW, SENSOR, client=client, block_size=block, cache=cache
            )

        alone = dataset(1)
        alone[places(alone, 1, size, size)[0]]
        cached = dataset(1, tempfile.mkdtemp())
        ideal = options.chips * options.latency / options.concurrency
        print(
            f'{count} chips of {size} px, latency {options.latency} s, '
            f'{options.concurrency} requests at a time: at best {ideal:.1f} s\n'
        )
        print(
            '| chips | how | s | chips/s | of the best | requests a chip | Mpx a chip |'
        )
        print('|---|---|---|---|---|---|---|')
        # Scattered, side by side, and half overlapping.
        for kind, stride in (
            ('apart', size + 40),
            ('dense', size),
            ('half', size // 2),
        ):
            runs: list[tuple[str, Any, Any]] = [
                ('one batch, a request each', alone, batch),
                ('one batch, blocks of 1024', dataset(1024), batch),
                ('one batch, blocks of 2048', dataset(2048), batch),
            ]
            if kind == 'apart':
                runs += [
                    ('computePixels in a loop', alone, plain),
                    ('sampleRectangle, 8 threads', alone, rectangles),
                    ('one batch into a cache', cached, batch),
                    ('one batch from the cache', cached, batch),
                    *(
                        (f'DataLoader, {workers} workers', alone, loader(workers))
                        for workers in (0, 2, 4)
                    ),
                ]
            for name, source, run in runs:
                wanted = places(source, count, size, stride)
                server.set(latency=options.latency)
                started = time.perf_counter()
                done = sum(1 for _ in run(source, wanted))
                seconds = time.perf_counter() - started
                assert done == count
                requests = server.counts()['requests']
                pixels = sum(
                    entry['grid']['dimensions']['width']
                    * entry['grid']['dimensions']['height']
                    for entry in server.log()
                    if entry['grid']
                )
                print(
                    f'| {kind} | {name} | {seconds:.1f} | {count / seconds:.1f} | '
                    f'{seconds / ideal:.2f} | {requests / count:.2f} | '
                    f'{pixels / count / 1e6:.3f} |',
                    flush=True,
                )


if __name__ == '__main__':
    main()
