import sys
import warnings
from collections.abc import Callable
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from dynamicvis_geo.cli import main
from dynamicvis_geo.models import BackboneConfig, load_backbone

MakeScene = Callable[..., Path]


@pytest.fixture(autouse=True)
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest backbone input, so that a chip costs little."""
    monkeypatch.setenv('RS_EMBED_DYNAMICVIS_IMG', '64')


@cache
def _load(config: BackboneConfig) -> tuple[Any, dict[str, Any], list[str]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        backbone, described = load_backbone(config)
    return backbone, described, [str(warning.message) for warning in said]


@pytest.fixture(autouse=True)
def shared_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights are made once: they are frozen, and the same each time."""

    def load(config: BackboneConfig) -> tuple[Any, dict[str, Any]]:
        if config.weights != 'random':
            return load_backbone(config)
        backbone, described, said = _load(config)
        for message in said:
            warnings.warn(message, stacklevel=2)
        return backbone, dict(described)

    monkeypatch.setattr('dynamicvis_geo.tasks.features.load_backbone', load)


def scene_in(folder: Path, name: str = 'scene.tif', **changes: Any) -> Path:
    """Write a GeoTIFF whose corner is on the grid of 64-pixel chips of 10 m."""
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
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).integers(0, 4000, (bands, height, width))
    with rasterio.open(path, 'w', **profile) as file:
        file.write(values.astype(profile['dtype']))
    return path


@pytest.fixture
def make_scene(tmp_path: Path) -> MakeScene:
    return partial(scene_in, tmp_path)


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


@pytest.fixture
def run_apart(
    capfd: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int | None, str, str]]:
    """Run a command as run_cli does, in a process that ends with it.

    It is forked, so that nothing has to be imported again.
    """

    def run(
        *arguments: str | Path, prepare: Callable[[], Any] = bool
    ) -> tuple[int | None, str, str]:
        def command() -> None:
            prepare()
            sys.exit(main([str(argument) for argument in arguments]))

        process = get_context('fork').Process(target=command)
        process.start()
        process.join()
        captured = capfd.readouterr()
        return process.exitcode, captured.out, captured.err

    return run
