"""Data for a Trainer, put together from files and arguments."""

from dynamicvis_geo.datamodules.chips import ChipDataModule
from dynamicvis_geo.datamodules.earthengine import EarthEngineDataModule
from dynamicvis_geo.datamodules.plan import Plan
from dynamicvis_geo.datamodules.scenes import ScenesDataModule
from dynamicvis_geo.evaluation.datamodule import EmbeddingDataModule

__all__ = (
    'ChipDataModule',
    'EarthEngineDataModule',
    'EmbeddingDataModule',
    'Plan',
    'ScenesDataModule',
)
