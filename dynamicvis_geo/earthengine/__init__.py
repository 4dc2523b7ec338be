"""Pixels from a server, Google Earth Engine above all: client, composites, cache."""

from typing import TYPE_CHECKING

from dynamicvis_geo.lazy import importer

if TYPE_CHECKING:
    from dynamicvis_geo.earthengine.cache import CacheInfo, ChipCache
    from dynamicvis_geo.earthengine.client import EarthEngineClient
    from dynamicvis_geo.earthengine.web import WebClient

# A cache needs no client.
_MODULES = {
    'CacheInfo': 'earthengine.cache',
    'ChipCache': 'earthengine.cache',
    'EarthEngineClient': 'earthengine.client',
    'WebClient': 'earthengine.web',
}

__all__ = ('CacheInfo', 'ChipCache', 'EarthEngineClient', 'WebClient')

__getattr__ = importer(__name__, _MODULES)
