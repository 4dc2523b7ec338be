"""Datasets: images by place and time, and the chips cut from them."""

from .chips import ChipDataset
from .collate import collate
from .points import assign_points, read_points
from .scenes import Scenes, open_scenes

__all__ = (
    'ChipDataset',
    'Scenes',
    'assign_points',
    'collate',
    'open_scenes',
    'read_points',
)
