"""Embed plots from Earth Engine into one GeoParquet file, in Python.

    python examples/embed_points.py examples/plots.csv plots.parquet

The same on the command line is ``dynamicvis-geo embed --points ...``. Interrupted and
started again, either computes only what is missing.
"""

import sys

from lightning.pytorch import Trainer

from dynamicvis_geo import (
    BackboneConfig,
    ChipProgress,
    EarthEngineDataModule,
    EmbeddingWriter,
    FeatureExtraction,
    SensorSpec,
)


def main(points: str, output: str) -> None:
    """Embed one chip of 1.28 km around each point."""
    data = EarthEngineDataModule(
        points=points,
        time=('2022-06-01', '2022-09-01'),
        buffer_m=640,
        sensor=SensorSpec(cloudy_pct=50),
        cache='chips',
        on_missing='skip',
    )
    writer = EmbeddingWriter(output)
    trainer = Trainer(
        callbacks=[writer, ChipProgress()], logger=False, enable_checkpointing=False
    )
    # BackboneConfig.from_env() reads RS_EMBED_DYNAMICVIS_* as the command line does.
    trainer.predict(
        FeatureExtraction(BackboneConfig.from_env()),
        datamodule=data,
        return_predictions=False,
    )
    print(writer.summary)


if __name__ == '__main__':
    main(*sys.argv[1:])
