"""Names at the place that earlier versions documented; they are in ``evaluation``."""

from dynamicvis_geo.evaluation.labels import JoinedLabels, join_labels

__all__ = ('JoinedLabels', 'join_labels')
