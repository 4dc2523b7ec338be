"""Lightning callbacks: what is done with predictions."""

from dynamicvis_geo.callbacks.progress import ChipProgress
from dynamicvis_geo.callbacks.writer import EmbeddingWriter, RunSummary

__all__ = ['ChipProgress', 'EmbeddingWriter', 'RunSummary']
