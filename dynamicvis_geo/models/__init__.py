"""The backbone and its weights."""

from typing import TYPE_CHECKING

from dynamicvis_geo.lazy import importer
from dynamicvis_geo.models.config import BackboneConfig

if TYPE_CHECKING:
    from dynamicvis_geo.models.dynamicvis import DynamicVis
    from dynamicvis_geo.models.weights import (
        DynamicVis_B_Weights,
        DynamicVis_L_Weights,
        dynamicvis_b,
        dynamicvis_l,
        load_backbone,
    )

# The configuration alone needs neither PyTorch nor what fetches weights.
_MODULES = {
    'DynamicVis': 'models.dynamicvis',
    'DynamicVis_B_Weights': 'models.weights',
    'DynamicVis_L_Weights': 'models.weights',
    'dynamicvis_b': 'models.weights',
    'dynamicvis_l': 'models.weights',
    'load_backbone': 'models.weights',
}

__all__ = [
    'BackboneConfig',
    'DynamicVis',
    'DynamicVis_B_Weights',
    'DynamicVis_L_Weights',
    'dynamicvis_b',
    'dynamicvis_l',
    'load_backbone',
]

__getattr__ = importer(__name__, _MODULES)
