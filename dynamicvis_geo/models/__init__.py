"""The backbone and its weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    """Import PyTorch, and what fetches weights, when they are used."""
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module = 'dynamicvis' if name == 'DynamicVis' else 'weights'
    return getattr(import_module(f'{__name__}.{module}'), name)
