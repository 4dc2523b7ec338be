"""The backbone and its weights."""

from typing import TYPE_CHECKING, Any

from dynamicvis_geo.models.config import BackboneConfig
from dynamicvis_geo.models.dynamicvis import DynamicVis

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    """Import what fetches weights when it is used: the model needs PyTorch alone."""
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from dynamicvis_geo.models import weights

    return getattr(weights, name)
