"""Pixels from Google Earth Engine: client, composites, cache."""

from dynamicvis_geo.earthengine.cache import CacheInfo, ChipCache
from dynamicvis_geo.earthengine.client import EarthEngineClient

__all__ = ('CacheInfo', 'ChipCache', 'EarthEngineClient')
