"""The backbone, in pure PyTorch."""

from dynamicvis_geo.models.dynamicvis import DynamicVis

__all__ = ['DynamicVis']
