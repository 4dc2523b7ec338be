"""The stand-in server itself."""

import pytest

from tests.earthengine_server.faults import Faults


def test_its_log_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('tests.earthengine_server.faults.KEPT', 10)
    faults = Faults()
    for i in range(100):
        with faults.request({'i': i}):
            pass
    assert [entry['grid']['i'] for entry in faults.log] == [*range(90, 100)]
    assert faults.counts['served'] == 100
