"""Datasets: images by place and time, and the chips cut from them."""

from typing import TYPE_CHECKING, Any

from dynamicvis_geo.datasets.chips import ChipDataset
from dynamicvis_geo.datasets.collate import collate
from dynamicvis_geo.datasets.earthengine import EarthEngineDataset
from dynamicvis_geo.datasets.embeddings import PooledEmbeddings
from dynamicvis_geo.datasets.feature_maps import FeatureMaps
from dynamicvis_geo.datasets.prefetch import FetchReport
from dynamicvis_geo.datasets.remote import RemoteDataset
from dynamicvis_geo.datasets.requests import assign_points, read_points
from dynamicvis_geo.datasets.scenes import Scenes, open_scenes
from dynamicvis_geo.datasets.source import ChipFailure, Source

if TYPE_CHECKING:
    from dynamicvis_geo.evaluation.labels import JoinedLabels, join_labels

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


def __getattr__(name: str) -> Any:
    # Labels are of evaluation, which builds on this: earlier versions had them here.
    if name in ('JoinedLabels', 'join_labels'):
        from dynamicvis_geo.evaluation import labels

        return getattr(labels, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
