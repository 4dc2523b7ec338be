"""Pixels from a server, Google Earth Engine above all: client, composites, cache."""

from dynamicvis_geo.earthengine.cache import CacheInfo, ChipCache
from dynamicvis_geo.earthengine.client import EarthEngineClient
from dynamicvis_geo.earthengine.web import WebClient

__all__ = ('CacheInfo', 'ChipCache', 'EarthEngineClient', 'WebClient')
