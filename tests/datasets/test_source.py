"""A source of one's own, from a web server, has all that Earth Engine's has."""

import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from dynamicvis_geo import (
    ChipDataModule,
    ChipDataset,
    ChipProgress,
    EmbeddingWriter,
    FeatureExtraction,
    GridSampler,
    SensorSpec,
)
from dynamicvis_geo.datasets import ChipFailure, RemoteDataset, Source
from dynamicvis_geo.earthengine import WebClient
from dynamicvis_geo.errors import NoImageryError, ServerError, SpecError
from dynamicvis_geo.grid import Grid
from tests.processes import HANG

from .composites import ahead
from .rasters import Areas

WINDOW = ('2024-06-01', '2024-07-01')
AREA = gpd.GeoSeries([shapely.box(499_840, 5_000_000, 501_120, 5_000_640)], crs=32632)
SIZE = 32  # Four columns and two rows of chips of 10 m.


# The source.


class Tiles(RemoteDataset):
    """Images of a web server."""

    def __init__(self, url: str, **options: Any) -> None:
        sensor = SensorSpec(url, ('red', 'green', 'blue'), cloudy_pct=None)
        client = WebClient(max_concurrency=4, timeout=HANG, retry_for=3)
        super().__init__(AREA, WINDOW, sensor, **{'client': client, **options})

    def download(self, grid: Grid, window: tuple[str, str]) -> Any:
        url = f'{self.sensor.collection}/{window[0]}/{grid.col:.0f}/{grid.row:.0f}'
        with urllib.request.urlopen(url, timeout=self.client.timeout) as answer:
            return np.frombuffer(answer.read(), np.uint16).reshape(3, *grid.shape)


# Its server.


class Server(ThreadingHTTPServer):
    """Sends images, unless it has been told how to fail on one."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.asked: Counter[tuple[int, int]] = Counter()
        self.faults: dict[int, list[int]] = {}
        #: Requests that are answered when so many are there.
        self.together = threading.Barrier(1, timeout=HANG)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        col, row = map(int, self.path.split('/')[-2:])
        self.server.asked[col, row] += 1
        self.server.together.wait()
        faults = self.server.faults.get(col)
        if faults:
            self.send_error(faults.pop(0))
            return
        body = image(col, row).tobytes()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


def image(col: int, row: int) -> Any:
    """The place of each pixel, so that none can be taken for another."""
    i, j = np.mgrid[row : row + SIZE, col : col + SIZE] % 10_000
    return np.stack([i, j, i * 0 + 7]).astype(np.uint16)


@pytest.fixture(scope='module')
def running() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr('dynamicvis_geo.earthengine.web.FIRST_WAIT', 0.01)
    running.asked.clear()
    running.faults = {}
    running.together = threading.Barrier(1, timeout=HANG)
    return running


def chips_of(server: Server, on_error: Any = 'raise', **options: Any) -> ChipDataset:
    tiles = Tiles(server.url, **options)
    return ChipDataset([(tiles, GridSampler(tiles, SIZE))], on_error=on_error)


def assert_right(chips: ChipDataset, row: int, pixels: Tensor) -> None:
    chip = chips.table[row]
    expected = image(round(chip['x'] / 10), round(-chip['y'] / 10))
    assert pixels.dtype == torch.float32
    assert (pixels.numpy() == expected).all()


def test_many_images_at_once(server: Server) -> None:
    chips = chips_of(server)
    server.together = threading.Barrier(4, timeout=HANG)
    found = chips.__getitems__(range(8))
    for row in range(8):
        assert_right(chips, row, found[row]['image'])  # type: ignore[index]
    assert len(server.asked) == server.asked.total() == 8
    assert chips.survey(range(8)) == (0, 8, 8 * 3 * SIZE * SIZE * 2)


@pytest.mark.parametrize('workers', [0, 1])
def test_images_ahead_of_their_use(server: Server, workers: int) -> None:
    chips = chips_of(server)
    # Of batches of one, four are in flight only if three are ahead.
    server.together = threading.Barrier(4, timeout=HANG)
    for row, batch in enumerate(ahead(chips, 1, workers)):
        assert_right(chips, row, batch['image'][0])
    assert server.asked.total() == 8


def test_a_second_run_asks_for_nothing(server: Server, tmp_path: Path) -> None:
    first = chips_of(server, cache=tmp_path).__getitems__(range(8))
    second = chips_of(server, cache=tmp_path)
    assert second.survey(range(8)) == (8, 0, 0)
    for one, again in zip(first, second.__getitems__(range(8)), strict=True):
        assert (one['image'] == again['image']).all()  # type: ignore[index]
    assert server.asked.total() == 8

    class Others(Tiles):
        """Other images of the same places."""

    assert Others(server.url, cache=tmp_path).survey(
        list(GridSampler(Tiles(server.url), SIZE))
    ) == (0, 8, 8 * 3 * SIZE * SIZE * 2)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def run(server: Server, path: Path, **options: Any) -> EmbeddingWriter:
    tiles = Tiles(server.url, cache=path.parent / 'cache')
    data = ChipDataModule(
        [(tiles, GridSampler(tiles, SIZE))], on_error='skip', num_workers=1
    )
    writer = EmbeddingWriter(path, **options)
    Trainer(
        accelerator='cpu',
        logger=False,
        callbacks=[writer, ChipProgress()],
        enable_model_summary=False,
    ).predict(FeatureExtraction(Mean()), data, return_predictions=False)
    return writer


def test_failures_and_progress(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / 'out.parquet'
    # One that comes with the third try, and a column of two that do not exist.
    server.faults = {49_984: [503, 429], 50_016: [404, 404]}
    writer = run(server, path)
    last = capsys.readouterr().err.split('\r')[-1]
    assert '8/8' in last
    assert 'retries=2, failed=2' in last
    assert len(gpd.read_parquet(path)) == 6
    failures = pd.read_parquet(str(writer.failures))
    assert failures['reason'].tolist() == ['SourceError'] * 2
    assert failures['message'].str.contains('HTTP status 404').all()
    assert server.asked.total() == 10

    # Without more, a finished output is left alone; the failures are tried again.
    run(server, path)
    assert server.asked.total() == 10
    run(server, path, retry_failed=True)
    assert server.asked.total() == 12
    assert len(gpd.read_parquet(path)) == 8
    assert not writer.failures.exists()


def test_a_server_that_stays_away_ends_the_run() -> None:
    client = WebClient(retry_for=0.1)
    tiles = Tiles('http://127.0.0.1:9', client=client)
    chips = ChipDataset([(tiles, GridSampler(tiles, SIZE))], on_error='skip')
    with pytest.raises(ServerError, match=r'x\d{6}_.*refused'):
        chips.__getitems__([0, 1])


def test_images_that_are_not_there(server: Server) -> None:
    class Bare(Tiles):
        def download(self, grid: Grid, window: tuple[str, str]) -> Any:
            raise NoImageryError('none')

    queries = list(GridSampler(Tiles(server.url), SIZE))[:2]
    with pytest.raises(NoImageryError, match='no imagery'):
        Bare(server.url)[queries[0]]
    filled = Bare(server.url, on_missing='fill')[queries[0]]
    assert filled is not None
    assert filled['valid_fraction'] == 0
    for options, on_error in (
        ({'on_missing': 'skip'}, 'raise'),
        ({'on_missing': 'raise'}, 'skip'),
    ):
        found = Bare(server.url, **options).submit(queries, on_error)()  # type: ignore[arg-type]
        assert [(one.chip, one.reason) for one in found] == [  # type: ignore[union-attr]
            (0, 'NoImageryError'),
            (1, 'NoImageryError'),
        ]


def test_an_image_of_another_shape_is_no_image(server: Server) -> None:
    class Cut(Tiles):
        def download(self, grid: Grid, window: tuple[str, str]) -> Any:
            return super().download(grid, window)[:, 1:]

    tiles = Cut(server.url, client=WebClient(retry_for=0.1))
    (found,) = tiles.submit([next(iter(GridSampler(tiles, SIZE)))])()
    assert isinstance(found, ChipFailure)
    assert found.reason == 'SourceError'
    assert '(3, 31, 32) of uint16, instead of (3, 32, 32)' in found.message


class Labels(Areas):
    def __getitem__(self, query: Any) -> dict[str, Any]:
        return {'mask': torch.tensor([query[0].start])}


def test_images_beside_files(server: Server) -> None:
    tiles = Tiles(server.url)
    both = tiles & Labels([*AREA], [WINDOW], AREA.crs)
    assert isinstance(tiles, Source)
    assert not isinstance(both, Source)
    chips = ChipDataset([(both, GridSampler(both, SIZE))], on_error='skip')
    server.together = threading.Barrier(4, timeout=HANG)
    for row, one in enumerate(chips.__getitems__(range(8))):
        assert isinstance(one, dict)
        assert_right(chips, row, one['image'])
        assert one['mask'] == chips.table[row]['x']
    server.together = threading.Barrier(1)
    server.faults = {49_984: [503, 404]}
    found = chips.__getitems__(range(8))
    (failure,) = (one for one in found if isinstance(one, ChipFailure))
    assert found[failure.chip] is failure
    assert chips.retries == 1


def test_numbers_are_checked() -> None:
    with pytest.raises(SpecError, match='retry_for=0'):
        WebClient(retry_for=0)
