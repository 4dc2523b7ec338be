"""Lightning modules."""

from dynamicvis_geo.tasks.features import FeatureExtraction
from dynamicvis_geo.tasks.probe import LinearProbe, load_probe

__all__ = ('FeatureExtraction', 'LinearProbe', 'load_probe')
