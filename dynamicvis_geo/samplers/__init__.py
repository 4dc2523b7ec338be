"""Samplers: which chips to cut from a dataset."""

from .grid import GridSampler
from .point import PointSampler

__all__ = ('GridSampler', 'PointSampler')
