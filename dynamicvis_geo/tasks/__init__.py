"""Lightning modules."""

from dynamicvis_geo.tasks.features import FeatureExtraction

__all__ = ['FeatureExtraction']
