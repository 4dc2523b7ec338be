"""Data for a Trainer, put together from files and arguments."""

from dynamicvis_geo.datamodules.embedding import EmbeddingDataModule

__all__ = ('EmbeddingDataModule',)
