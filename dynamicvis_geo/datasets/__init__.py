"""Datasets: images by place and time, and the chips cut from them."""

from typing import TYPE_CHECKING

from dynamicvis_geo.lazy import importer

if TYPE_CHECKING:
    from dynamicvis_geo.datasets.chips import ChipDataset
    from dynamicvis_geo.datasets.collation import collate
    from dynamicvis_geo.datasets.earthengine import EarthEngineDataset
    from dynamicvis_geo.datasets.embeddings import PooledEmbeddings
    from dynamicvis_geo.datasets.feature_maps import FeatureMaps
    from dynamicvis_geo.datasets.prefetch import FetchReport
    from dynamicvis_geo.datasets.remote import RemoteDataset
    from dynamicvis_geo.datasets.requests import assign_points, read_points
    from dynamicvis_geo.datasets.scenes import Scenes, open_scenes
    from dynamicvis_geo.datasets.source import ChipFailure, Source
    from dynamicvis_geo.evaluation.labels import JoinedLabels, join_labels

# Footprints and vector files are read by commands that need no PyTorch.
_MODULES = {
    'ChipDataset': 'datasets.chips',
    'ChipFailure': 'datasets.source',
    'EarthEngineDataset': 'datasets.earthengine',
    'FeatureMaps': 'datasets.feature_maps',
    'FetchReport': 'datasets.prefetch',
    # Labels are of evaluation, which builds on this: earlier versions had them here.
    'JoinedLabels': 'evaluation.labels',
    'PooledEmbeddings': 'datasets.embeddings',
    'RemoteDataset': 'datasets.remote',
    'Scenes': 'datasets.scenes',
    'Source': 'datasets.source',
    'assign_points': 'datasets.requests',
    'collate': 'datasets.collation',
    'join_labels': 'evaluation.labels',
    'open_scenes': 'datasets.scenes',
    'read_points': 'datasets.requests',
}

__all__ = (
    'ChipDataset',
    'ChipFailure',
    'EarthEngineDataset',
    'FeatureMaps',
    'FetchReport',
    'JoinedLabels',
    'PooledEmbeddings',
    'RemoteDataset',
    'Scenes',
    'Source',
    'assign_points',
    'collate',
    'join_labels',
    'open_scenes',
    'read_points',
)

__getattr__ = importer(__name__, _MODULES)
