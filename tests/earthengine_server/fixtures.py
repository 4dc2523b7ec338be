"""Fixtures for tests that need the server."""

from collections.abc import Iterator

import pytest

from tests.earthengine_server import EarthEngineServer


@pytest.fixture(scope='session')
def running_server() -> Iterator[EarthEngineServer]:
    with EarthEngineServer() as server:
        yield server


@pytest.fixture
def server(running_server: EarthEngineServer) -> EarthEngineServer:
    """The server, without faults, having seen nothing yet."""
    running_server.set()
    return running_server
