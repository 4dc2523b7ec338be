import pytest

from dynamicvis_geo.models import dynamicvis


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backbones of arch b with 10 mixers instead of 26: quick to make and to run.

    For what does not depend on their number.
    """
    monkeypatch.setattr(dynamicvis, '_DEPTHS', {'b': (1, 2, 6, 1)})
