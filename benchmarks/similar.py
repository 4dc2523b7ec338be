"""Time and memory of finding the rows most like examples among a million.

Run it from the root of the repository: ``python -m benchmarks.similar``. It needs 7 GB
of disk in the folder for temporary files.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import shapely

from dynamicvis_geo.formats.mapped_vectors import vector_blocks
from dynamicvis_geo.formats.parquet_files import Extent, GeoParquetWriter
from dynamicvis_geo.similarity import search
from dynamicvis_geo.similarity.collections import Chips, open_collection

#: Rows of a row group, as a run writes them.
GROUP = 5_000
DEGREES = 0.01
BOUNDS = ('xmin', 'ymin', 'xmax', 'ymax')


def write(path: Path, rows: int, dimensions: int, spread: float) -> None:
    """Write made-up embeddings of chips side by side."""
    random = np.random.default_rng(0)
    middle = random.standard_normal(dimensions, dtype=np.float32)
    schema = pa.schema(
        {
            'id': pa.string(),
            'embedding': pa.list_(pa.float32(), dimensions),
            'centre_lon': pa.float64(),
            'centre_lat': pa.float64(),
            'crs': pa.string(),
            'geometry': pa.binary(),
            'bbox': pa.struct([(name, pa.float64()) for name in BOUNDS]),
        }
    )
    extent = Extent()
    extent.types = {'Polygon'}
    extent.lower, extent.upper = np.zeros(2), np.array([100 * DEGREES, rows])
    with GeoParquetWriter(path, schema, extent, {}, compression='none') as file:
        for first in range(0, rows, GROUP):
            number = np.arange(first, min(first + GROUP, rows))
            values = random.standard_normal((len(number), dimensions), dtype=np.float32)
            values = middle + spread * values
            lon, lat = (np.array(np.divmod(number, 10_000)) + 0.5) * DEGREES
            half = DEGREES / 2
            boxes = shapely.box(lon - half, lat - half, lon + half, lat + half)
            columns = [
                pa.array([f'chip-{i}' for i in number]),
                pa.FixedSizeListArray.from_arrays(values.reshape(-1), dimensions),
                pa.array(lon),
                pa.array(lat),
                pa.array(['EPSG:4326'] * len(number)),
                pa.array(shapely.to_wkb(boxes)),
                pa.StructArray.from_arrays([*shapely.bounds(boxes).T], names=BOUNDS),
            ]
            file.write(pa.table(columns, schema=schema))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rows', type=int, default=1_000_000)
    parser.add_argument('--dimensions', type=int, default=768)
    parser.add_argument(
        '--spread',
        type=float,
        default=1.0,
        help='of vectors around their mean: 0.001 makes all cosines nearly 1',
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'embeddings.parquet')
        write(path, options.rows, options.dimensions, options.spread)
        first, _ = timed(partial(open_collection, path))
        print(f'opened for the first time in {first:.1f} s\n')
        # In a process of its own, the memory of which is that of searching alone.
        process = multiprocessing.get_context('spawn').Process(
            target=measure, args=(path, options.rows)
        )
        process.start()
        process.join()
        sys.exit(process.exitcode)


def measure(path: Path, rows: int) -> None:
    """Search a file that has been opened before."""
    opened = open_collection(path)
    assert isinstance(opened, Chips)
    (mapped,) = path.parent.glob('.*.npy')
    before = peak()
    print('| examples | s | CPU s | times reading the bytes once | peak MB |')
    print('|---|---|---|---|---|')
    vectors = opened.vectors(np.arange(0, rows, rows // 20))
    cases: dict[str, tuple[Any, Any]] = {
        'a vector': (vectors[0], None),
        '10, and 10 counter-examples': (vectors[:10], vectors[10:]),
        'an id': (f'chip-{rows // 2}', None),
        'a place': ((0.5 * DEGREES, 0.5 * DEGREES), None),
    }
    for name, (like, unlike) in cases.items():
        read, _ = timed(lambda: [None for _ in vector_blocks(mapped)])
        cpu = time.process_time()
        took, found = timed(partial(search, [opened], like, unlike, 50, False))
        cpu = time.process_time() - cpu
        assert len(found.table) == 50
        print(
            f'| {name} | {took:.2f} | {cpu:.2f} | {took / read:.1f} | '
            f'{peak() - before:.0f} |',
            flush=True,
        )


def timed(do: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that something takes, and what it gives."""
    started = time.perf_counter()
    given = do()
    return time.perf_counter() - started, given


def peak() -> float:
    """Return the largest resident memory of this process so far, in MB (Linux)."""
    # What getrusage tells is also that of the process that has started this one.
    status = Path('/proc/self/status').read_text()
    return float(status.partition('VmHWM:')[2].split()[0]) / 1e3


if __name__ == '__main__':
    main()
