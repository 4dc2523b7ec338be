"""Samplers: which chips to cut from a dataset, and which of them a process takes."""

from dynamicvis_geo.samplers.grid import GridSampler
from dynamicvis_geo.samplers.point import PointSampler

__all__ = ('GridSampler', 'PointSampler')
