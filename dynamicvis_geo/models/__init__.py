"""The backbone and its weights, in pure PyTorch."""

from dynamicvis_geo.models.config import BackboneConfig
from dynamicvis_geo.models.dynamicvis import DynamicVis
from dynamicvis_geo.models.weights import (
    DynamicVis_B_Weights,
    DynamicVis_L_Weights,
    dynamicvis_b,
    dynamicvis_l,
    load_backbone,
)

__all__ = [
    'BackboneConfig',
    'DynamicVis',
    'DynamicVis_B_Weights',
    'DynamicVis_L_Weights',
    'dynamicvis_b',
    'dynamicvis_l',
    'load_backbone',
]
