"""Fixtures for tests that run documents: a user's files, account and weights."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ee
import ee.deprecation
import google.auth.credentials
import pytest
import torch

from dynamicvis_geo.models import BackboneConfig, weights
from tests.documents.material import write_inputs
from tests.earthengine_server import EarthEngineServer
from tests.models.hub import serve_hub


@pytest.fixture(scope='session')
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('inputs')
    write_inputs(folder)
    return folder


@pytest.fixture
def earth(
    server: EarthEngineServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[EarthEngineServer]:
    """Earth Engine as a user has it who is logged in: it is the server."""
    nothing = ee.deprecation.DeprecatedAsset('', None, None, None)
    monkeypatch.setattr(ee.deprecation, 'deprecated_assets', {'': nothing})
    ee.Reset()
    anonymous = google.auth.credentials.AnonymousCredentials()
    ee.Initialize(anonymous, project='my-project', url=server.url)
    yield server
    ee.Reset()


@pytest.fixture
def published_weights(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Hugging Face has a checkpoint under the official name."""
    with serve_hub(monkeypatch, tmp_path / 'hugging-face') as hub:
        file = BackboneConfig.hf_repo, BackboneConfig.ckpt_file
        hub.files[file] = (inputs / 'weights.pth').read_bytes()
        yield


def untrained(make: Callable[[BackboneConfig], Any]) -> Callable[[BackboneConfig], Any]:
    """Make random weights for small images, whatever is asked for."""

    def small(config: BackboneConfig) -> Any:
        return make(replace(config, weights='random', checkpoint=None, img_size=64))

    return small


@pytest.fixture
def small_backbones(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every backbone is untrained and takes small images."""
    small = untrained(weights._random_backbone)
    monkeypatch.setattr(weights, '_random_backbone', small)
    monkeypatch.setattr(weights, '_pretrained_backbone', small)
    monkeypatch.setattr('dynamicvis_geo.embedding._loaded', [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    show, filters = warnings.showwarning, warnings.filters[:]
    yield
    warnings.showwarning = show
    warnings.filters[:] = filters
    torch.set_num_threads(threads)
