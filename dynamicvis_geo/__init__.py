"""Features of the frozen DynamicVis backbone for any place and any dates."""

from typing import TYPE_CHECKING, Any

from dynamicvis_geo.lazy import importer

if TYPE_CHECKING:
    from dynamicvis_geo.callbacks import ChipProgress, EmbeddingWriter
    from dynamicvis_geo.datamodules import (
        ChipDataModule,
        EarthEngineDataModule,
        EmbeddingDataModule,
        ScenesDataModule,
    )
    from dynamicvis_geo.datasets import (
        ChipDataset,
        EarthEngineDataset,
        FeatureMaps,
        PooledEmbeddings,
        collate,
        open_scenes,
    )
    from dynamicvis_geo.earthengine import ChipCache, EarthEngineClient
    from dynamicvis_geo.embedding import Embedding, get_embedding, get_embeddings_batch
    from dynamicvis_geo.models import (
        BackboneConfig,
        DynamicVis,
        DynamicVis_B_Weights,
        DynamicVis_L_Weights,
        dynamicvis_b,
        dynamicvis_l,
        load_backbone,
    )
    from dynamicvis_geo.provenance import read_provenance
    from dynamicvis_geo.samplers import GridSampler, PointSampler
    from dynamicvis_geo.specs import (
        BBox,
        OutputSpec,
        PointBuffer,
        SensorSpec,
        TemporalSpec,
    )
    from dynamicvis_geo.tasks import FeatureExtraction, LinearProbe
    from dynamicvis_geo.transforms import Preprocess

    __version__: str

# Importing PyTorch and TorchGeo takes seconds.
_MODULES = {
    'BBox': 'specs',
    'BackboneConfig': 'models',
    'ChipCache': 'earthengine',
    'ChipDataModule': 'datamodules',
    'ChipDataset': 'datasets',
    'ChipProgress': 'callbacks',
    'DynamicVis': 'models',
    'DynamicVis_B_Weights': 'models',
    'DynamicVis_L_Weights': 'models',
    'EarthEngineClient': 'earthengine',
    'EarthEngineDataModule': 'datamodules',
    'EarthEngineDataset': 'datasets',
    'Embedding': 'embedding',
    'EmbeddingDataModule': 'datamodules',
    'EmbeddingWriter': 'callbacks',
    'FeatureExtraction': 'tasks',
    'FeatureMaps': 'datasets',
    'GridSampler': 'samplers',
    'LinearProbe': 'tasks',
    'OutputSpec': 'specs',
    'PointBuffer': 'specs',
    'PointSampler': 'samplers',
    'PooledEmbeddings': 'datasets',
    'Preprocess': 'transforms',
    'ScenesDataModule': 'datamodules',
    'SensorSpec': 'specs',
    'TemporalSpec': 'specs',
    'collate': 'datasets',
    'dynamicvis_b': 'models',
    'dynamicvis_l': 'models',
    'get_embedding': 'embedding',
    'get_embeddings_batch': 'embedding',
    'load_backbone': 'models',
    'open_scenes': 'datasets',
    'read_provenance': 'provenance',
}

__all__ = [
    'BBox',
    'BackboneConfig',
    'ChipCache',
    'ChipDataModule',
    'ChipDataset',
    'ChipProgress',
    'DynamicVis',
    'DynamicVis_B_Weights',
    'DynamicVis_L_Weights',
    'EarthEngineClient',
    'EarthEngineDataModule',
    'EarthEngineDataset',
    'Embedding',
    'EmbeddingDataModule',
    'EmbeddingWriter',
    'FeatureExtraction',
    'FeatureMaps',
    'GridSampler',
    'LinearProbe',
    'OutputSpec',
    'PointBuffer',
    'PointSampler',
    'PooledEmbeddings',
    'Preprocess',
    'ScenesDataModule',
    'SensorSpec',
    'TemporalSpec',
    'collate',
    'dynamicvis_b',
    'dynamicvis_l',
    'get_embedding',
    'get_embeddings_batch',
    'load_backbone',
    'open_scenes',
    'read_provenance',
]


_import = importer(__name__, _MODULES)


def __getattr__(name: str) -> Any:
    if name == '__version__':
        from importlib.metadata import version

        return version('dynamicvis-geo')
    return _import(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, '__version__'})
