"""Pixels from Google Earth Engine: client, composites, cache."""

from .cache import CacheInfo, ChipCache
from .client import EarthEngineClient

__all__ = ('CacheInfo', 'ChipCache', 'EarthEngineClient')
