"""Samplers: the chips to cut from a dataset."""

from dynamicvis_geo.samplers.grid import GridSampler
from dynamicvis_geo.samplers.point import PointSampler

__all__ = ('GridSampler', 'PointSampler')
