import pytest

from tests.earthengine_server.fixtures import running_server, server

__all__ = ('running_server', 'server')


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('dynamicvis_geo.earthengine.client.FIRST_WAIT', 0.01)
