"""The stand-in server itself."""

import re
import sys
from pathlib import Path

import pytest

from dynamicvis_geo.datasets import EarthEngineDataset
from dynamicvis_geo.earthengine import EarthEngineClient
from tests.datasets.composites import ROI, SENSOR, WINDOW, grid
from tests.earthengine_server import EarthEngineServer
from tests.earthengine_server.faults import Faults


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_its_memory_does_not_grow_with_requests_in_flight() -> None:
    with EarthEngineServer() as server:
        client = EarthEngineClient('p', server.url)
        dataset = EarthEngineDataset(ROI, WINDOW, SENSOR, client=client, block_size=1)
        dataset.__getitems__(grid(dataset, 1, 1, 512) * 8)
        status = Path(f'/proc/{server.process.pid}/status').read_text()
    # All at a time, they took 1.5 GB.
    (peak,) = re.findall(r'VmHWM:\s+(\d+) kB', status)
    assert int(peak) < 800_000


def test_its_log_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('tests.earthengine_server.faults.KEPT', 10)
    faults = Faults()
    for i in range(100):
        with faults.request({'i': i}):
            pass
    assert [entry['grid']['i'] for entry in faults.log] == [*range(90, 100)]
    assert faults.counts['served'] == 100
