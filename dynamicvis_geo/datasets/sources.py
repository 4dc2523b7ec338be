"""What chips are cut from, as plain values for the provenance of a file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from pyproj import CRS
from torchgeo.datasets import GeoDataset

from dynamicvis_geo.projections import crs_name


def describe(dataset: GeoDataset, sampler: Iterable[Any]) -> dict[str, Any]:
    """Return what a source is, and what it and its sampler say of themselves."""
    return {
        **_describe_dataset(dataset),
        'sampler': {
            'name': type(sampler).__name__,
            **getattr(sampler, 'provenance', {}),
        },
    }


def _describe_dataset(dataset: GeoDataset) -> dict[str, Any]:
    described: dict[str, Any] = {
        'dataset': type(dataset).__name__,
        'crs': crs_name(CRS.from_user_input(dataset.crs)),
        'res': [float(res) for res in dataset.res],
    }
    parts = getattr(dataset, 'datasets', None)
    if parts is not None:
        described['datasets'] = [_describe_dataset(part) for part in parts]
    bands = getattr(dataset, 'bands', None)
    if bands:
        described['bands'] = [
            band if isinstance(band, str) else int(band) for band in bands
        ]
    if 'filepath' in dataset.index:
        files = sorted(
            os.path.basename(str(path)) for path in dataset.index['filepath']
        )
        described['files'] = {'count': len(files), 'first': files[:3]}
    return {**described, **getattr(dataset, 'provenance', {})}
