import pytest


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('dynamicvis_geo.earthengine.web.FIRST_WAIT', 0.01)
