"""Lightning callbacks: what is done with predictions."""

from dynamicvis_geo.callbacks.writer import EmbeddingWriter

__all__ = ['EmbeddingWriter']
