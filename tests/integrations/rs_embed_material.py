"""What the tests of rs-embed have in common; they skip where it is not installed."""

# ruff: noqa: E402
from collections.abc import Iterator

import pytest

from dynamicvis_geo import EarthEngineClient
from tests.earthengine_server import EarthEngineServer
from tests.places import DATES

rs_embed = pytest.importorskip('rs_embed')
from dynamicvis_geo.integrations.rs_embed import register_provider

S2 = 'COPERNICUS/S2_SR_HARMONIZED'
PLOT = rs_embed.PointBuffer(lon=10.3, lat=50.4, buffer_m=330)
BOX = rs_embed.BBox(minlon=12.3, minlat=50.4, maxlon=12.306, maxlat=50.403)
#: As in tests.places: the world of the server never shows it.
NOWHERE = rs_embed.PointBuffer(lon=10.5, lat=40.5, buffer_m=330)
TEMPORAL = rs_embed.TemporalSpec.range(*DATES)


@pytest.fixture
def provided(
    server: EarthEngineServer, quick: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[EarthEngineClient]:
    """The provider goes to the server by this client, and images are small."""
    monkeypatch.setenv('RS_EMBED_DYNAMICVIS_IMG', '64')
    client = EarthEngineClient(project='x', url=server.url)
    register_provider(client)
    yield client
    register_provider()
    rs_embed.reset_runtime()
