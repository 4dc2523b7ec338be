"""A stand-in for Google Earth Engine on 127.0.0.1, with a world of its own.

It speaks as much of the REST interface as the client library needs to initialise and to
compute pixels, evaluates the expressions that this package sends, and can be told to
fail in many ways. ``python -m tests.earthengine_server`` starts it.
"""

from tests.earthengine_server.process import EarthEngineServer

__all__ = ('EarthEngineServer',)
