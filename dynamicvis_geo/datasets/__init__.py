"""Datasets: images by place and time, and the chips cut from them."""

from dynamicvis_geo.datasets.chips import ChipDataset
from dynamicvis_geo.datasets.collate import collate
from dynamicvis_geo.datasets.earthengine import EarthEngineDataset, FetchReport
from dynamicvis_geo.datasets.embeddings import PooledEmbeddings
from dynamicvis_geo.datasets.failures import ChipFailure
from dynamicvis_geo.datasets.feature_maps import FeatureMaps
from dynamicvis_geo.datasets.labels import JoinedLabels, join_labels
from dynamicvis_geo.datasets.points import assign_points, read_points
from dynamicvis_geo.datasets.scenes import Scenes, open_scenes

__all__ = (
    'ChipDataset',
    'ChipFailure',
    'EarthEngineDataset',
    'FeatureMaps',
    'FetchReport',
    'JoinedLabels',
    'PooledEmbeddings',
    'Scenes',
    'assign_points',
    'collate',
    'join_labels',
    'open_scenes',
    'read_points',
)
