from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from dynamicvis_geo.cli import main

MakeScene = Callable[..., Path]


@pytest.fixture(autouse=True)
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest backbone input, so that a chip costs little."""
    monkeypatch.setenv('RS_EMBED_DYNAMICVIS_IMG', '64')


@pytest.fixture
def make_scene(tmp_path: Path) -> MakeScene:
    """Write a GeoTIFF whose corner is on the grid of 64-pixel chips of 10 m."""

    def make(name: str = 'scene.tif', **changes: Any) -> Path:
        bands, height, width = changes.pop('shape', (3, 128, 192))
        profile = {
            'driver': 'GTiff',
            'count': bands,
            'height': height,
            'width': width,
            'dtype': 'uint16',
            'crs': 'EPSG:32633',
            'transform': from_origin(640 * 600, 640 * 8000, 10, 10),
        } | changes
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(0).integers(0, 4000, (bands, height, width))
        with rasterio.open(path, 'w', **profile) as file:
            file.write(values.astype(profile['dtype']))
        return path

    return make


@pytest.fixture
def run_cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command; gives its exit code, standard output and standard error."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run
